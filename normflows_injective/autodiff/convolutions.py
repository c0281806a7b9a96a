r"""Convolutions whose products with a Jacobian are cheap to differentiate again.

The product of a convolution :math:`y = W x + b` with a cotangent is :math:`W^\top u`. Torch takes
both this and the gradient of the weight by one function, and when the product is differentiated,
that function gives the gradients of all its arguments, needed or not. The products :math:`W v` are
its derivatives by :math:`u`, so that for every tangent :math:`v` a gradient of the weight would be
computed and thrown away, which costs as much as the product. Here :math:`W^\top u` is a
convolution by itself, which torch differentiates only where it must.

The gradient of the weight is a node of its own, to which no gradient by :math:`x` leads, because
an ``autograd.Function`` cannot know which of its gradients are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .transforms import Function

_TRANSPOSED: tuple[Function, ...] = (
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)
CONVOLUTIONS: tuple[Function, ...] = (F.conv1d, F.conv2d, F.conv3d, *_TRANSPOSED)


class _Options(NamedTuple):
    """The arguments of ``torch.convolution`` after the tensors."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


def convolve(
    func: Function, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any, **kwargs: Any
) -> Tensor:
    """One of ``CONVOLUTIONS``, cheap to differentiate by the cotangent of its derivative."""
    options = None
    if _is_simple(x, weight, bias):
        options = (_transposed if func in _TRANSPOSED else _direct)(x, weight, *rest, **kwargs)
    if options is None:
        return func(x, weight, bias, *rest, **kwargs)
    with torch.no_grad():
        value = func(x, weight, bias, *rest, **kwargs)
    shift = _Parameters.apply(weight, bias, [x], value.shape, options)  # type: ignore[no-untyped-call]
    y: Tensor = _Input.apply(x, shift, [weight, value], options)  # type: ignore[no-untyped-call]
    return y


def _is_simple(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = [weight] if bias is None else [weight, bias]
    same = all(tensor.dtype == x.dtype for tensor in tensors)
    if x.is_meta or not same or x.dim() != weight.dim():  # The meta device knows no autocast.
        return False
    return not torch.is_autocast_enabled(x.device.type)


def _direct(
    x: Tensor,
    weight: Tensor,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Options | None:
    if isinstance(padding, str):
        return None
    steps, pads, gaps = (_each(size, weight) for size in (stride, padding, dilation))
    # Elements beyond the last stride would be padding of the transposed map's output, which
    # torch fails to differentiate three times.
    sizes = zip(x.shape[2:], weight.shape[2:], steps, pads, gaps, strict=True)
    rests = [
        (length + 2 * pad - gap * (width - 1) - 1) % step
        for length, width, step, pad, gap in sizes
    ]
    return None if any(rests) else _Options(steps, pads, gaps, False, [0] * len(rests), groups)


def _transposed(
    x: Tensor,
    weight: Tensor,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> _Options | None:
    steps, pads, gaps = (_each(size, weight) for size in (stride, padding, dilation))
    more = _each(output_padding, weight)
    # Else a convolution of the output has more elements than the input.
    fits = all(added < step for added, step in zip(more, steps, strict=True))
    return _Options(steps, pads, gaps, True, more, groups) if fits else None


def _each(size: int | Sequence[int], weight: Tensor) -> list[int]:
    sizes = [size] if isinstance(size, int) else list(size)
    return sizes * (weight.dim() - 2) if len(sizes) == 1 else sizes


def _adjoint(options: _Options) -> _Options:
    """Options of the transposed map."""
    none = [0] * len(options.stride)
    return options._replace(transposed=not options.transposed, output_padding=none)


class _Input(torch.autograd.Function):
    """The output, as a function of the input; parameters have gradients by the shift alone."""

    # Tensors that come in a list have no edge from this node.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor, weight_and_value: list[Tensor], options: _Options
    ) -> Tensor:
        weight, value = weight_and_value
        ctx.save_for_backward(weight)
        ctx.options = _adjoint(options)
        return value

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        product = None
        if ctx.needs_input_grad[0]:
            product = torch.convolution(cotangent, weight, None, *ctx.options)
        return product, cotangent, None, None


class _Parameters(torch.autograd.Function):
    """Zeros of the shape of the output, through which parameters have gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        x: list[Tensor],
        shape: Sequence[int],
        options: _Options,
    ) -> Tensor:
        ctx.save_for_backward(*x, weight)
        ctx.options = options
        return weight.new_zeros(()).expand(shape)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        options, ends = ctx.options, (cotangent, x)
        if options.transposed:
            # The same sum of products, without the padding of outputs, which torch fails to
            # differentiate three times.
            options, ends = _adjoint(options), (x, cotangent)
        by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            only_weight = [False, True, False]
            _, by_weight, _ = torch.ops.aten.convolution_backward(
                *ends, weight, None, *options, only_weight
            )
        if ctx.needs_input_grad[1]:
            by_bias = cotangent.sum((0, *range(2, cotangent.dim())))
        return by_weight, by_bias, None, None, None

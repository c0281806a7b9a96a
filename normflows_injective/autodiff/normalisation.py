r"""Group and layer normalisation with second derivatives in few kernels.

Let :math:`\hat x = r (x - \mu)` be the normalised group of :math:`M` values and :math:`r` its
reciprocal standard deviation. With the symmetric matrix
:math:`P = I - \tfrac1M 1 1^\top - \tfrac1M \hat x \hat x^\top`

.. math:: \frac{\partial \hat x}{\partial x} = r P, \qquad
          \frac{\partial r}{\partial x} = -\frac{r^2}{M} \hat x^\top.

A reverse pass is :math:`h \mapsto r P h`. Pairing it with :math:`b` gives
:math:`\varphi = r\, b^\top P h`, whose derivatives are

.. math:: \partial_h \varphi = r P b, \qquad \partial_r \varphi = (P b)^\top h, \qquad
          \partial_{\hat x} \varphi =
          -\tfrac{r}{M} \big((b^\top \hat x) h + (h^\top \hat x) b\big).

:math:`\hat x` and :math:`r` are therefore two outputs of one function, and the chain rule from
there to :math:`x` costs nothing new: it is the product with :math:`P` that the backward pass of
the loss makes in any case. torch writes the derivatives of group normalisation out in some
seventy kernels. As :math:`P` is symmetric, forward products are reverse products, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .transforms import is_batching

__all__ = [
    "affine",
    "group_norm",
    "layer_norm",
    "per_channel",
    "push_group_norm",
    "push_layer_norm",
]


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Group normalisation that is cheap to differentiate twice; arguments as in torch.

    Args:
        x: Contiguous tensor of shape (B, C, *).
        num_groups: Number of groups of channels.
        weight: Scale of shape (C,), or None.
        bias: Shift of shape (C,), or None.
        eps: Added to the variances.

    Returns:
        Tensor of the shape of ``x``.

    Examples:
        >>> group_norm(torch.tensor([[1.0, 3.0]]), 1, eps=0.0)
        tensor([[-1.,  1.]])
    """
    # What torch refuses it shall refuse in its own words.
    wrong = x.numel() <= num_groups or x.dim() < 2 or x.shape[1] % num_groups != 0
    if wrong or not _fit((weight, bias), x.shape[1:2]):
        return F.group_norm(x, num_groups, weight, bias, eps)
    normalised, _ = _normalise(_group_rows(x, num_groups), eps)
    return affine(normalised.view_as(x), per_channel(weight, x), per_channel(bias, x))


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalisation that is cheap to differentiate twice; arguments as in torch.

    Args:
        x: Contiguous tensor of shape (*, normalized_shape).
        normalized_shape: Trailing dimensions to normalise over.
        weight: Scale of that shape, or None.
        bias: Shift of that shape, or None.
        eps: Added to the variances.

    Returns:
        Tensor of the shape of ``x``.

    Examples:
        >>> layer_norm(torch.tensor([[1.0, 3.0]]), (2,), eps=0.0)
        tensor([[-1.,  1.]])
    """
    shape = tuple(normalized_shape)
    wrong = x.numel() == 0 or tuple(x.shape[-len(shape) :]) != shape
    if wrong or not _fit((weight, bias), shape):
        return F.layer_norm(x, list(normalized_shape), weight, bias, eps)
    normalised, _ = _normalise(_trailing_rows(x, normalized_shape), eps)
    return affine(normalised.view_as(x), weight, bias)


def push_group_norm(
    tangent: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Product of the Jacobian of :func:`group_norm` at x with a tangent of its shape.

    Examples:
        >>> push_group_norm(torch.ones(1, 2), torch.tensor([[1.0, 3.0]]), 1, eps=0.0)
        tensor([[0., 0.]])
    """
    normalised, r = _normalised_rows(_group_rows(x, num_groups), eps)
    pushed = _pull(_group_rows(tangent, num_groups), normalised, r)
    return affine(pushed.view_as(x), per_channel(weight, x), None)


def push_layer_norm(
    tangent: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Product of the Jacobian of :func:`layer_norm` at x with a tangent of its shape.

    Examples:
        >>> push_layer_norm(torch.ones(1, 2), torch.tensor([[1.0, 3.0]]), (2,), eps=0.0)
        tensor([[0., 0.]])
    """
    normalised, r = _normalised_rows(_trailing_rows(x, normalized_shape), eps)
    pushed = _pull(_trailing_rows(tangent, normalized_shape), normalised, r)
    return affine(pushed.view_as(x), weight, None)


def _fit(parameters: tuple[Tensor | None, ...], shape: Sequence[int]) -> bool:
    return all(part is None or tuple(part.shape) == tuple(shape) for part in parameters)


def _group_rows(x: Tensor, num_groups: int) -> Tensor:
    return x.reshape(-1, x.shape[1:].numel() // num_groups)


def _trailing_rows(x: Tensor, normalized_shape: Sequence[int]) -> Tensor:
    return x.reshape(-1, math.prod(normalized_shape))


def per_channel(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """A parameter (C,) in a shape that broadcasts over x of shape (B, C, *)."""
    return None if parameter is None else parameter.view(-1, *(1 for _ in x.shape[2:]))


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The product with a weight plus a bias, where there are any."""
    if weight is not None and bias is not None:
        return torch.addcmul(bias, x, weight)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _normalise(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normalised, r = _Normalise.apply(rows, eps)  # type: ignore[no-untyped-call]
    return normalised, r


def _normalised_rows(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normalised, _, r = torch.ops.aten.native_layer_norm(x, [x.shape[1]], None, None, eps)
    return normalised, r


def _pull(h: Tensor, normalised: Tensor, r: Tensor) -> Tensor:
    """The product r P h; h has shape (R, M), or (K, R, M) with K probes."""
    pulled: Tensor
    if is_batching():
        pulled = _PullProbes.apply(h, normalised, r)  # type: ignore[no-untyped-call]
    elif torch.is_grad_enabled() and any(part.requires_grad for part in (h, normalised, r)):
        pulled = _NormaliseBackward.apply(h, normalised, r)  # type: ignore[no-untyped-call]
    elif h.dim() == 2:
        pulled = _project(h, normalised).mul_(r)
    else:
        # One kernel for each probe: fetching memory for intermediate results would cost more.
        pulled = torch.stack([_project(probe, normalised).mul_(r) for probe in h])
    return pulled


class _Normalise(torch.autograd.Function):
    """Rows (R, M) normalised, and their reciprocal standard deviations (R, 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normalised, r = _normalised_rows(x, eps)
        ctx.save_for_backward(normalised, r)
        return normalised, r

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, cotangent_r: Tensor) -> tuple[Tensor, None]:
        normalised, r = ctx.saved_tensors
        along = cotangent_r * r.square() / normalised.shape[1]
        return torch.addcmul(_pull(cotangent, normalised, r), normalised, along, value=-1), None


class _NormaliseBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, normalised: Tensor, r: Tensor) -> Tensor:
        ctx.save_for_backward(h, normalised, r)
        return _pull(h, normalised, r)

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, normalised, r = ctx.saved_tensors
        if h.dim() == 2:
            return _differentiate(b, h, normalised, r)
        parts = [_differentiate(*pair, normalised, r) for pair in zip(b, h, strict=True)]
        for_h, for_normalised, for_r = zip(*parts, strict=True)
        return torch.stack(for_h), sum(for_normalised), sum(for_r)


class _PullProbes(torch.autograd.Function):
    """Hands all probes of a vmap to the kernels; a Function with this rule is slow to call."""

    @staticmethod
    def forward(h: Tensor, normalised: Tensor, r: Tensor) -> Tensor:
        return _pull(h, normalised, r)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], h: Tensor, normalised: Tensor, r: Tensor
    ) -> tuple[Tensor, int]:
        if in_dims[0] is None or in_dims[1:] != (None, None):
            raise RuntimeError("Only the cotangent of a normalisation can be batched.")
        return _pull(h.movedim(in_dims[0], 0), normalised, r), 0


def _differentiate(
    b: Tensor, h: Tensor, normalised: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of the pairing of b with r P h, by h, the normalised rows and r."""
    projected = _project(b, normalised)
    scale = -r / h.shape[-1]
    along_b, along_h = _dot(b, normalised), _dot(h, normalised)
    for_normalised = torch.addcmul(h * (along_b * scale), b, along_h * scale)
    return projected * r, for_normalised, _dot(projected, h)


def _project(h: Tensor, normalised: Tensor) -> Tensor:
    """The product P h for rows (R, M)."""
    if torch.is_grad_enabled():
        along = _dot(h, normalised) / h.shape[-1]
        return torch.addcmul(h - h.mean(-1, keepdim=True), normalised, along, value=-1)
    # torch's kernel for rows that have mean 0 and standard deviation 1 already.
    mean, r = normalised.new_zeros(len(h), 1), normalised.new_ones(len(h), 1)
    pulled: Tensor = torch.ops.aten.native_layer_norm_backward(
        h, normalised, [h.shape[1]], mean, r, None, None, [True, False, False]
    )[0]
    return pulled


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows (R, M), shape (R, 1)."""
    return (a * b).sum(-1, keepdim=True)

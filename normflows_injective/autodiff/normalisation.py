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
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .transforms import is_batching

# Takes rows (R, M) and the number that is added to their variances.
Normalise = Callable[[Tensor, float], Tensor]


def _normalise(rows: Tensor, eps: float) -> Tensor:
    normalised: Tensor
    normalised, _ = _Normalise.apply(rows, eps)  # type: ignore[no-untyped-call]
    return normalised


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    normalise: Normalise = _normalise,
) -> Tensor:
    """Group normalisation that is cheap to differentiate twice; arguments as in torch."""
    # Let torch refuse wrong arguments in its own words.
    wrong = x.numel() <= num_groups or x.dim() < 2 or x.shape[1] % num_groups != 0
    if wrong or not (_fits(weight, x.shape[1:2]) and _fits(bias, x.shape[1:2])):
        return F.group_norm(x, num_groups, weight, bias, eps)
    rows = x.reshape(-1, x.shape[1:].numel() // num_groups)
    normalised = normalise(rows, eps).view_as(x)
    return scaled_and_shifted(normalised, per_channel(weight, x), per_channel(bias, x))


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
    normalise: Normalise = _normalise,
) -> Tensor:
    """Layer normalisation that is cheap to differentiate twice; arguments as in torch."""
    shape = tuple(normalized_shape)
    wrong = x.numel() == 0 or tuple(x.shape[-len(shape) :]) != shape
    if wrong or not (_fits(weight, shape) and _fits(bias, shape)):
        return F.layer_norm(x, list(shape), weight, bias, eps)
    normalised = normalise(x.reshape(-1, math.prod(shape)), eps).view_as(x)
    return scaled_and_shifted(normalised, weight, bias)


def jvp_group_norm(
    tangent: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Product of the Jacobian of :func:`group_norm` at x with a tangent of its shape."""
    return group_norm(x, num_groups, weight, None, eps, partial(_jvp_of_rows, tangent))


def jvp_layer_norm(
    tangent: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Product of the Jacobian of :func:`layer_norm` at x with a tangent of its shape."""
    product = partial(_jvp_of_rows, tangent)
    return layer_norm(x, normalized_shape, weight, None, eps, normalise=product)


def _jvp_of_rows(tangent: Tensor, rows: Tensor, eps: float) -> Tensor:
    normalised, r = _normalised_rows(rows, eps)
    return _times_jacobian(tangent.reshape(rows.shape), normalised, r)


def _fits(parameter: Tensor | None, shape: Sequence[int]) -> bool:
    return parameter is None or tuple(parameter.shape) == tuple(shape)


def per_channel(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """A parameter (C,) in a shape that broadcasts over x of shape (B, C, *)."""
    return None if parameter is None else parameter.view(-1, *(1 for _ in x.shape[2:]))


def scaled_and_shifted(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The product with a weight plus a bias, where there are any."""
    if weight is not None and bias is not None:
        return torch.addcmul(bias, x, weight)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _normalised_rows(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normalised, _, r = torch.ops.aten.native_layer_norm(rows, [rows.shape[1]], None, None, eps)
    return normalised, r


def _times_jacobian(h: Tensor, normalised: Tensor, r: Tensor) -> Tensor:
    """The product r P h; h has shape (R, M), or (K, R, M) with K probes."""
    product: Tensor
    if is_batching():
        product = _OverProbes.apply(h, normalised, r)  # type: ignore[no-untyped-call]
    elif torch.is_grad_enabled() and any(part.requires_grad for part in (h, normalised, r)):
        product = _NormaliseBackward.apply(h, normalised, r)  # type: ignore[no-untyped-call]
    elif h.dim() == 2:
        product = _project(h, normalised).mul_(r)
    else:
        # One kernel for each probe: fetching memory for intermediate results would cost more.
        product = torch.stack([_project(probe, normalised).mul_(r) for probe in h])
    return product


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
        product = _times_jacobian(cotangent, normalised, r)
        return torch.addcmul(product, normalised, along, value=-1), None


class _NormaliseBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, normalised: Tensor, r: Tensor) -> Tensor:
        ctx.save_for_backward(h, normalised, r)
        return _times_jacobian(h, normalised, r)

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, normalised, r = ctx.saved_tensors
        if h.dim() == 2:
            return _differentiate(b, h, normalised, r)
        parts = [_differentiate(*pair, normalised, r) for pair in zip(b, h, strict=True)]
        for_h, for_normalised, for_r = zip(*parts, strict=True)
        return torch.stack(for_h), sum(for_normalised), sum(for_r)


class _OverProbes(torch.autograd.Function):
    """Hands all probes of a vmap to the kernels; a Function with this rule is slow to call."""

    @staticmethod
    def forward(h: Tensor, normalised: Tensor, r: Tensor) -> Tensor:
        return _times_jacobian(h, normalised, r)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], h: Tensor, normalised: Tensor, r: Tensor
    ) -> tuple[Tensor, int]:
        if in_dims[0] is None or in_dims[1:] != (None, None):
            raise RuntimeError("Only the cotangent of a normalisation can be batched.")
        return _times_jacobian(h.movedim(in_dims[0], 0), normalised, r), 0


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
    product: Tensor = torch.ops.aten.native_layer_norm_backward(
        h, normalised, [h.shape[1]], mean, r, None, None, [True, False, False]
    )[0]
    return product


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows (R, M), shape (R, 1)."""
    return (a * b).sum(-1, keepdim=True)

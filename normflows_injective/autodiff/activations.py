r"""SiLU with a second derivative in few kernels.

Where a reverse pass is to be differentiated again, torch writes out the derivative of SiLU in
elementary functions, some fifteen kernels and as many tensors for backward. With
:math:`s = \sigma(x)`, :math:`y = x s` the derivatives are

.. math:: y' = s + y (1 - s), \qquad y'' = s + y' - 2 s y',

the second because :math:`x s (1 - s) = y' - s` and so
:math:`y'' = 2 s (1 - s) + (1 - 2 s)(y' - s)`. Here :math:`y` and :math:`y'` are two outputs of one
function: a reverse pass is then a multiplication by :math:`y'`, which torch differentiates and
batches over probes by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .transforms import is_batching


def silu(x: Tensor) -> Tensor:
    r"""SiLU, :math:`x \sigma(x)`, of any shape, cheap to differentiate twice."""
    y: Tensor
    y, _ = _SiLU.apply(x)  # type: ignore[no-untyped-call]
    return y


def jvp_silu(tangent: Tensor, x: Tensor) -> Tensor:
    """Product of the Jacobian of SiLU at x, which is diagonal, with a tangent of its shape."""
    if is_batching():  # over tangents: the exponential of x is taken once for all
        return tangent * _value_and_derivative(x)[1]
    product: Tensor = torch.ops.aten.silu_backward(tangent, x)
    return product


class _SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y, dy = _value_and_derivative(x)
        ctx.save_for_backward(x, dy)
        ctx.set_materialize_grads(False)
        return y, dy

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None, cotangent_dy: Tensor | None) -> Tensor | None:
        x, dy = ctx.saved_tensors
        if cotangent_dy is None:
            return None if cotangent is None else cotangent * dy
        s = torch.sigmoid(x)
        if torch.is_grad_enabled():
            product = (s + dy - 2 * s * dy) * cotangent_dy
            return product if cotangent is None else product + cotangent * dy
        # In place: fetching fresh memory costs several times the arithmetic.
        product = s.addcmul_(s, dy, value=-2).add_(dy).mul_(cotangent_dy)
        return product if cotangent is None else product.addcmul_(cotangent, dy)


def _value_and_derivative(x: Tensor) -> tuple[Tensor, Tensor]:
    """SiLU and its derivative at a tensor without a graph."""
    s = torch.sigmoid(x)
    y = x * s
    return y, s.addcmul_(s, y, value=-1).add_(y)

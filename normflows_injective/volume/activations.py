r"""SiLU with a second derivative in few kernels.

Where a reverse pass is to be differentiated again, torch writes out the derivative of SiLU in
elementary functions, some fifteen kernels and as many tensors for backward. With
:math:`s = \sigma(x)`, :math:`y = x s` the derivatives are

.. math:: y' = s + y (1 - s), \qquad y'' = s + y' - 2 s y',

the second because :math:`x s (1 - s) = y' - s` and so
:math:`y'' = 2 s (1 - s) + (1 - 2 s)(y' - s)`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .transforms import is_batching

__all__ = ["push_silu", "silu"]


def silu(x: Tensor) -> Tensor:
    r"""SiLU, :math:`x \sigma(x)`, of any shape, cheap to differentiate twice.

    Args:
        x: Tensor of any shape.

    Returns:
        Tensor of the same shape.

    Examples:
        >>> silu(torch.zeros(2))
        tensor([0., 0.])
    """
    out: Tensor = _SiLU.apply(x)  # type: ignore[no-untyped-call]
    return out


def push_silu(tangent: Tensor, x: Tensor) -> Tensor:
    """Product of the Jacobian of SiLU at x, which is diagonal, with a tangent of its shape.

    Examples:
        >>> push_silu(torch.ones(2), torch.zeros(2))
        tensor([0.5000, 0.5000])
    """
    return _pull(tangent, x)


def _pull(cotangent: Tensor, x: Tensor) -> Tensor:
    """The product y'(x) c of a cotangent c, which may have a leading axis of probes."""
    pulled: Tensor
    if is_batching():
        pulled = _PullProbes.apply(cotangent, x)  # type: ignore[no-untyped-call]
    elif torch.is_grad_enabled() and (cotangent.requires_grad or x.requires_grad):
        pulled = _SiLUBackward.apply(cotangent, x)  # type: ignore[no-untyped-call]
    else:
        pulled = torch.ops.aten.silu_backward(cotangent, x.expand_as(cotangent))
    return pulled


class _SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _pull(cotangent, x)


class _SiLUBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cotangent: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(cotangent, x)
        return _pull(cotangent, x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor | None]:
        first, x = ctx.saved_tensors
        dy, ddy = _derivatives(x)
        if not ctx.needs_input_grad[1]:
            return cotangent * dy, None
        if torch.is_grad_enabled() or first.shape != x.shape:
            return cotangent * dy, ddy * (cotangent * first).sum_to_size(x.shape)
        return dy.mul_(cotangent), ddy.mul_(cotangent).mul_(first)


class _PullProbes(torch.autograd.Function):
    """Hands all probes of a vmap to the kernel at once.

    The other two have no rule for vmap, because a Function that has one is slower to call than
    the kernels of a small network.
    """

    @staticmethod
    def forward(cotangent: Tensor, x: Tensor) -> Tensor:
        return _pull(cotangent, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None], cotangent: Tensor, x: Tensor
    ) -> tuple[Tensor, int]:
        if in_dims[0] is None:
            cotangent = cotangent.expand(info.batch_size, *cotangent.shape)
        else:
            cotangent = cotangent.movedim(in_dims[0], 0)
        return _pull(cotangent, x if in_dims[1] is None else x.movedim(in_dims[1], 0)), 0


def _derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative at x."""
    s = torch.sigmoid(x)
    y = x * s
    if torch.is_grad_enabled():
        dy = y - y * s + s
        return dy, s + dy - 2 * s * dy
    # In place: fetching fresh memory costs several times the arithmetic.
    dy = y.addcmul_(y, s, value=-1).add_(s)
    return dy, s.addcmul_(s, dy, value=-2).add_(dy)

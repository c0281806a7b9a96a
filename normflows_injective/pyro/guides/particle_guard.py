"""A guard against single draws of a guide that fall where the model's density is extreme."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

__all__ = ["ParticleGuard"]

# Norms above this multiple of the usual largest one are cut down to it.
_FACTOR = 10.0
# The reference forgets within about this many steps.
_MEMORY = 50
# So many draws in a row may be without a finite gradient before that is passed on.
_PATIENCE = 20


@final
class ParticleGuard:
    r"""Scales down the gradients of single draws that are far larger than usual.

    A draw in the far tail of a guide may meet a gradient of the model that is :math:`10^{10}`
    times the usual one. One such step fills the running averages of Adam, which then stands still
    for thousands of steps, or moves the guide to where nothing is finite. So every gradient
    :math:`g_i` of a draw, over draws i of one step, becomes

    .. math:: g_i \min(1, c\, r / \lVert g_i \rVert_\infty), \qquad
              \log r = \text{running mean of} \log \max_i \lVert g_i \rVert_\infty,

    with the guarded gradients in the mean, so that :math:`r` follows a true change of scale
    within some steps, and is not moved by a single excess. The largest norm and not
    a typical one is the reference, because bounds with importance weights leave almost all of the
    gradient to a single draw. The first step is never scaled.

    A gradient that is not finite counts as zero. After twenty steps in a row without a
    single finite one it is passed on, for the fault is not one of single draws then.

    Nothing is read back from the device. Traced functions have no hooks, so that ``torch.jit``
    leaves the guard out.

    Examples:
        >>> guard = ParticleGuard()
        >>> for scale in (1.0, 1e6):
        ...     draws = torch.ones(4, 1, requires_grad=True)
        ...     weights = torch.tensor([1.0, 1.0, 1.0, scale])
        ...     (guard(draws.clone())[:, 0] * weights).sum().backward()
        >>> draws.grad[:, 0]
        tensor([ 1.,  1.,  1., 10.])
    """

    def __init__(self) -> None:
        # Sum of weights, weighted sum of logarithms, and steps without a finite gradient.
        self._state: Tensor | None = None

    def __call__(self, draws: Tensor) -> Tensor:
        """Guard the gradients of draws (*, D), and give the very draws back."""
        if draws.requires_grad and torch._C._get_tracing_state() is None:
            draws.register_hook(self._guarded)
        return draws

    def _guarded(self, gradient: Tensor) -> Tensor:
        with torch.no_grad():
            sizes = gradient.abs().amax(dim=-1, keepdim=True)
            sizes = sizes.to(torch.promote_types(sizes.dtype, torch.float32))
            finite = sizes.isfinite()
            if self._state is None or self._state.device != sizes.device:
                self._state = sizes.new_zeros(3)
            weight, total, lost = self._state.unbind()
            usual = (total / weight.clamp(min=1e-6)).exp()
            limit = torch.where(weight > 0, _FACTOR * usual, torch.inf)
            largest = torch.where(finite, sizes, 0).amax().clamp(max=limit)
            counts = largest > 0
            keep = torch.where(counts, 1 - 1 / _MEMORY, 1.0)
            added = torch.where(counts, largest, 1.0).log()
            lost = torch.where(finite.any(), 0.0, lost + 1)
            self._state = torch.stack([weight * keep + counts, total * keep + added, lost])
            factor = (limit / sizes).clamp(max=1.0).to(gradient.dtype)
            kept = finite | (lost > _PATIENCE)
        return torch.where(kept, gradient * factor, 0)

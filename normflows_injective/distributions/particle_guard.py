"""A guard against single draws of a guide that fall where the model's density is extreme."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

# Norms above this multiple of the usual largest one are scaled down to it.
_FACTOR = 10.0
# The reference forgets within about this many steps.
_MEMORY = 50
# Steps in a row without a finite gradient before one is passed on.
_PATIENCE = 20


@final
class ParticleGuard:
    r"""A guard that scales gradients of single draws down to :math:`c\, r` where they exceed it.

    .. math:: g_i \min(1, c\, r / \lVert g_i \rVert_\infty), \qquad
              \log r = \text{running mean of} \log \max_i \lVert g_i \rVert_\infty
    """

    # A draw in the far tail of a guide may have a gradient that is 1e10 times the usual one. One
    # such step fills the running averages of Adam, which then stops for thousands of steps, or
    # sends the guide to where nothing is finite.
    #
    # The mean takes guarded gradients, so that r follows a true change of scale within some steps,
    # and a single excess does not change it. The reference is the largest norm of a step, because
    # bounds with importance weights leave almost all of the gradient to a single draw. The first
    # step is never scaled.
    #
    # A gradient that is not finite counts as zero. After twenty steps in a row without a single
    # finite one it is passed on: the fault is then not one of single draws.
    #
    # Nothing is read back from the device. Traced functions have no hooks, so that torch.jit
    # leaves the guard out.

    def __init__(self) -> None:
        # Sum of weights, weighted sum of logarithms, and steps without a finite gradient.
        self._state: Tensor | None = None

    def __call__(self, draws: Tensor) -> Tensor:
        """Guard the gradients of draws (*, D), and return these same draws."""
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
            passes = finite | (lost > _PATIENCE)
        return torch.where(passes, gradient * factor, 0)

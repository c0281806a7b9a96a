"""A guard against single draws of a guide that fall where the model's density is extreme."""

from __future__ import annotations

from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

# The reference forgets within about this many steps.
_MEMORY = 50
# Part of the largest size below which a draw does not count.
_SMALL = 1e-3
# Steps in a row without a finite gradient before one is passed on.
_PATIENCE = 20


@final
class ParticleGuard(nn.Module):
    r"""A guard that scales gradients of single draws down to :math:`c\, r` where they exceed it.

    .. math:: g_i \min(1, c\, r / m_i), \qquad m_i = \max_j \lvert g_{ij} \rvert
              (1 + \lvert x_{ij} \rvert), \qquad
              \log r = \text{running mean of} \log \operatorname{median}_i m_i

    Args:
        factor: :math:`c`, more than one.
    """

    # A draw in the far tail of a guide may have a gradient that is 1e10 times the usual one. One
    # such step fills the running averages of Adam, which then stops for thousands of steps, or
    # sends the guide to where nothing is finite. Parameters of a scale see the product of gradient
    # and draw x: a draw that a flow has blown up by 1e10 fills the averages with a usual gradient.
    #
    # The mean takes guarded gradients, so that r follows a true change of scale within some steps,
    # and a single excess does not change it. Bounds with importance weights leave almost all of
    # the gradient to a few draws: the median is that of draws with more than a thousandth of the
    # largest m. The first step is never scaled.
    #
    # A gradient that is not finite counts as zero. After twenty steps in a row without a single
    # finite one it is passed on: the fault is then not one of single draws.
    #
    # Nothing is read back from the device. Traced functions have no hooks, so that torch.jit
    # leaves the guard out.

    may_differ = frozenset({"factor"})
    # Files of guides that were saved without it are read.
    is_optional_in_files = True

    def __init__(self, factor: float = 50.0) -> None:
        super().__init__()
        self.factor = factor
        # Sum of weights, weighted sum of logarithms, and steps without a finite gradient.
        self.state: Tensor = nn.Buffer(torch.zeros(3))

    def forward(self, draws: Tensor) -> Tensor:
        """Guard the gradients of draws (*, D), and return these same draws."""
        if draws.requires_grad and torch._C._get_tracing_state() is None:
            draws.register_hook(partial(self._guarded, draws.detach()))
        return draws

    def _guarded(self, draws: Tensor, gradient: Tensor) -> Tensor:
        factor, passes = self._factors(gradient.detach().abs() * (1 + draws.abs()))
        return torch.where(passes, gradient * factor, 0)

    @torch.no_grad()
    def _factors(self, parts: Tensor) -> tuple[Tensor, Tensor]:
        """Factors (*, 1) of the gradients of draws by their sizes, and whether they pass."""
        dtype, sizes = parts.dtype, parts.amax(dim=-1, keepdim=True)
        sizes = sizes.to(torch.promote_types(sizes.dtype, torch.float32))
        finite = sizes.isfinite()
        if self.state.device != sizes.device:
            self.state = self.state.to(sizes.device)
        weight, total, lost = self.state.to(sizes.dtype).unbind()
        usual = (total / weight.clamp(min=1e-6)).exp()
        limit = torch.where(weight > 0, self.factor * usual, torch.inf)
        middle = _median(torch.where(finite, sizes, 0.0).clamp(max=limit))
        counts = middle > 0
        keep = torch.where(counts, 1 - 1 / _MEMORY, 1.0)
        added = torch.where(counts, middle, 1.0).log()
        lost = torch.where(finite.any(), 0.0, lost + 1)
        self.state = torch.stack([weight * keep + counts, total * keep + added, lost])
        factor = (limit / sizes).clamp(max=1.0).to(dtype)
        return factor, finite | (lost > _PATIENCE)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *options: Any, **more: Any
    ) -> None:
        # Guides were once saved without it.
        state_dict = {f"{prefix}state": self.state, **state_dict}
        super()._load_from_state_dict(state_dict, prefix, *options, **more)


def _median(sizes: Tensor) -> Tensor:
    """The median, 0-dimensional, of sizes (*) that matter beside the largest; zero for none."""
    matters = (sizes > _SMALL * sizes.amax()) & (sizes > 0)
    return torch.where(matters, sizes, torch.nan).nanmedian().nan_to_num(0.0)

"""A linear map for guides that stays in place at large learning rates."""

from __future__ import annotations

import math
from typing import Any, final

import normflows as nf
import torch
from normflows.flows.mixing import _LULinear
from torch import Tensor
from torch.nn.functional import softplus

from ...checks import check_count, check_positive


@final
class SteadyLinear(nf.flows.LULinearPermute):
    r"""The LU linear map of normflows, with parameters that move less in every step.

    .. math:: p = p_0 + g \, (a - p_0)

    The optimiser sees a, and p are the parameters of normflows, which start at :math:`p_0`. The
    inverse of a triangular matrix grows exponentially with its entries, and Adam moves all of them
    by the learning rate in every step, so that at 0.03 a few such maps in a row double the width
    of a guide within ten steps. The state that is saved and loaded is p, so files are those of
    ``nf.flows.LULinearPermute``.
    """

    def __init__(self, num_channels: int, gain: float = 0.125) -> None:
        super().__init__(check_count(num_channels, "num_channels"))
        self.linear = _SteadyLU(num_channels, float(check_positive(gain, "gain")))


class _SteadyLU(_LULinear):
    """The triangular factors of :class:`SteadyLinear`, without the permutation."""

    def __init__(self, features: int, gain: float) -> None:
        super().__init__(features)
        self.gain = gain
        diagonal = math.log(math.expm1(1 - self.eps))
        self._start = {
            "lower_entries": 0.0,
            "upper_entries": 0.0,
            "unconstrained_upper_diag": diagonal,
        }

    @property
    def upper_diag(self) -> Tensor:
        """The diagonal (D,) of U."""
        return softplus(self._effective("unconstrained_upper_diag")) + self.eps

    def _create_lower_upper(self) -> tuple[Tensor, Tensor]:
        empty = self.bias.new_zeros(self.features, self.features)
        below = torch.tril_indices(self.features, self.features, -1, device=empty.device)
        above = torch.triu_indices(self.features, self.features, 1, device=empty.device)
        lower = empty.index_put(tuple(below), self._effective("lower_entries"))
        upper = empty.index_put(tuple(above), self._effective("upper_entries"))
        return lower + torch.ones_like(self.bias).diag(), upper + self.upper_diag.diag()

    def _effective(self, name: str) -> Tensor:
        start = self._start[name]
        return start + self.gain * (getattr(self, name) - start)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._start:
            value = self._effective(name)
            destination[prefix + name] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *options: Any, **more: Any
    ) -> None:
        state = dict(state_dict)
        for name, start in self._start.items():
            if prefix + name in state:
                state[prefix + name] = start + (state[prefix + name] - start) / self.gain
        super()._load_from_state_dict(state, prefix, *options, **more)

r"""Random directions of star-like surfaces, by importance and by rejection.

A direction is proposed uniformly, or by the cone measure :math:`r^D d\omega` where the gauge can
draw from that. The density of the area against the proposal's measure is

.. math:: w(u) = r^{D-1} \sec\psi \;\; (\text{uniform}), \qquad
          w(u) = \sec\psi / r \;\; (\text{cone}).

For a homogeneous gauge at level 1 the latter is :math:`\lVert\nabla F(x)\rVert`, which is bounded
for every norm. The mean of :math:`w` gives the total mass, and acceptance with probability
:math:`w / \max w` gives samples.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import NumericalWarning, OptionError
from ..flows.gauges.gauge import Gauge, HomogeneousGauge
from ..flows.surfaces.radial import RadialSurface
from ..modules.random_numbers import OwnRandomNumbers
from .spherical import log_sphere_area

SEED = 20240618
ROUNDS = 1000
# Numbers in memory at once, and the least effective number of directions of a credible mean.
CHUNK, FEWEST = 2**22, 1000.0


class _Proposal(NamedTuple):
    u: Tensor
    log_mass: float
    by_cone: bool


class SurfaceSampler:
    """A sampler of directions of one surface, in float64 on the CPU, that knows its total mass."""

    def __init__(
        self, gauge: Gauge, level: float, measure: str, dim: int, num_directions: int
    ) -> None:
        # Sampling needs the digits; the caller's gauge keeps its dtype and device.
        self._gauge = copy.deepcopy(gauge).cpu().double()
        self._pooled: tuple[Tensor, float] | None = None
        self._level = torch.tensor(level, dtype=torch.float64)
        self._surface = RadialSurface(self._gauge, level, measure)
        self._dim, self._num_directions = dim, num_directions

    def log_mass(self) -> tuple[float, float]:
        """Log of the total mass, by a closed form or an average, with its standard error."""
        gauge = self._gauge
        closed = gauge.log_cone_mass if self._surface.measure == "cone" else gauge.log_area
        known = closed(self._dim, self._level)
        if known is not None:
            return float(known), 0.0
        log_ratios, log_total = self._pool()
        log_mean = float(log_ratios.logsumexp(0)) - math.log(len(log_ratios))
        relative = float((log_ratios - log_mean).exp().std()) / math.sqrt(len(log_ratios))
        effective = float((2 * log_ratios.logsumexp(0) - (2 * log_ratios).logsumexp(0)).exp())
        if effective < min(FEWEST, 0.05 * len(log_ratios)):
            warnings.warn(
                f"The mass of this surface is an average in which {effective:.0f} of "
                f"{len(log_ratios)} directions count, so it and its standard error "
                f"{relative:.2g} may both be far too small. Raise num_directions, or use a gauge "
                "or measure with a closed form.",
                NumericalWarning,
                stacklevel=4,
            )
        return log_total + log_mean, relative

    def log_bound(self) -> float:
        """The greatest log-ratio, by a closed form or over the pool of directions."""
        with OwnRandomNumbers():
            proposal = self._propose(1)
        if proposal.by_cone and self._surface.measure == "cone":
            return 0.0
        gauge = self._gauge
        bounds = gauge.log_slope_bounds(self._dim) if isinstance(gauge, HomogeneousGauge) else None
        if proposal.by_cone and bounds is not None:
            return bounds[1] - float(self._level.log())
        return float(self._pool()[0].max())

    def directions(self, num_samples: int, log_bound: float) -> Tensor:
        """Directions (n, D) of points of the law, by rejection."""
        accepted: list[Tensor] = []
        missing, exceeded = num_samples, 0
        for _ in range(ROUNDS):
            proposal = self._propose(max(2 * missing, 1024))
            log_share = self._log_ratio(proposal) - log_bound
            exceeded += int((log_share > 1e-9).sum())
            accepted.append(proposal.u[torch.rand_like(log_share).log() < log_share])
            missing -= len(accepted[-1])
            if missing <= 0:
                break
        else:
            raise OptionError(
                f"{ROUNDS} rounds of proposals gave fewer than {num_samples} samples: the surface "
                "is too far from a sphere for sampling by rejection. Use measure='cone' with a "
                "gauge that draws from it."
            )
        if exceeded:
            warnings.warn(
                f"{exceeded} proposals were likelier than any of the directions that the bound "
                "was found from, so the law drawn from differs a little from the uniform one. "
                "Raise num_directions; LpGauge with p < 1 has no bound, use measure='cone' there.",
                NumericalWarning,
                stacklevel=4,
            )
        return torch.cat(accepted)[:num_samples]

    def _pool(self) -> tuple[Tensor, float]:
        """Log-ratios (n,) of always the same directions, and the proposal's log-mass."""
        if self._pooled is None:
            ratios, missing, log_mass = [], self._num_directions, 0.0
            with OwnRandomNumbers(SEED):
                while missing > 0:
                    proposal = self._propose(min(missing, max(1, CHUNK // self._dim)))
                    ratios.append(self._log_ratio(proposal))
                    missing, log_mass = missing - len(proposal.u), proposal.log_mass
            self._pooled = torch.cat(ratios), log_mass
        return self._pooled

    @torch.no_grad()
    def _propose(self, num_samples: int) -> _Proposal:
        drawn = self._gauge.sample_cone(num_samples, self._dim, self._level)
        mass = self._gauge.log_cone_mass(self._dim, self._level)
        if drawn is not None and mass is not None:
            return _Proposal(drawn, float(mass), by_cone=True)
        drawn = torch.randn(num_samples, self._dim, dtype=torch.float64)
        log_area = log_sphere_area(self._dim)
        if self._gauge.domain == "orthant":
            drawn, log_area = drawn.abs(), log_area - self._dim * math.log(2)
        return _Proposal(torch.nn.functional.normalize(drawn), log_area, by_cone=False)

    @torch.no_grad()
    def _log_ratio(self, proposal: _Proposal) -> Tensor:
        try:
            log_stretch = self._surface.log_stretch(proposal.u)
        except RuntimeError as error:
            raise OptionError(
                f"{type(self._gauge).__name__} could not be evaluated in float64 on the CPU, as "
                "it must be to find its mass. Tensors that it needs belong into buffers of a "
                f"module, not into a closure. torch says: {error}"
            ) from error
        if not proposal.by_cone:
            return log_stretch
        return log_stretch - self._dim * self._gauge.log_radius(proposal.u, self._level)

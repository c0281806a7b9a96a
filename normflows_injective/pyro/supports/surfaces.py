"""Surfaces as constraints, with charts by which guides and samplers of Pyro reach them."""

from __future__ import annotations

import math
from typing import final

import normflows as nf
import torch
from torch import Tensor
from torch.distributions import constraints

from ...checks import check_positive, describe
from ...distributions.uniform_on_surface import known_dimension
from ...errors import InjectiveFlowError, OptionError
from ...flows.gauges.gauge import Gauge
from ...flows.gauges.hyperplane import HyperplaneGauge
from ...flows.gauges.lp import LpGauge
from ...flows.layer_stack import LayerStack
from ...flows.surfaces.radial import RadialSurface
from ...flows.surfaces.sphere import SphereChart
from ...host.context import context_rows


@final
class StarLikeConstraint(constraints.Constraint):
    r"""Points of a star-like surface, :math:`\{r_t(u)\, u\}`.

    It is registered with torch's ``biject_to`` and ``transform_to``: from :math:`\mathbb R^{D-1}`
    by stereographic coordinates of the direction, which miss one direction only, or by logarithmic
    angles of the positive orthant. So autoguides, NUTS, NeuTra and ``pyro.param`` take a site with
    this support as it is.

    Args:
        gauge: The surface, from ``nfi.flows.gauges``.
        level: :math:`t > 0`.
        dim: :math:`D`, where the gauge does not fix it.
        measure: Measure of densities: ``"hausdorff"`` or ``"cone"``, see ``RadialSurface``.
        tol: How far the ratio of a point's distance from the centre to the surface's may be from
            one.

    Raises:
        OptionError: If the dimension is not known, or an option is out of range.

    References:
        The registry of constraints: torch.distributions. Charts and volumes: arXiv 2406.09116.

    Examples:
        >>> from torch.distributions import biject_to
        >>> octahedron = StarLikeConstraint(LpGauge(1.0), dim=3)
        >>> octahedron.check(torch.tensor([[0.5, -0.5, 0.0], [1.0, 1.0, 1.0]]))
        tensor([ True, False])
        >>> biject_to(octahedron)(torch.zeros(2)).abs().sum()
        tensor(1.)
    """

    is_discrete = False
    event_dim = 1

    def __init__(
        self,
        gauge: Gauge,
        level: float = 1.0,
        *,
        dim: int | None = None,
        measure: str = "hausdorff",
        tol: float = 1e-4,
    ) -> None:
        if not isinstance(gauge, Gauge):
            raise OptionError(
                f"gauge must be one of nfi.flows.gauges, got {describe(gauge)}. Write e.g. "
                "LpGauge(1.0)."
            )
        self.surface = RadialSurface(gauge, level, measure)
        self.dim = known_dimension(gauge, dim, least=1)
        if gauge.needs_context:
            raise OptionError(
                "The surface depends on a context, so it is a different one for every sample. Fix "
                "the context, or use FlowDistribution with context=."
            )
        self.tol = float(check_positive(tol, "tol"))
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether points (*, D) lie on the surface, of shape (*)."""
        return self.deviation(value) <= self.tol

    def deviation(self, value: Tensor) -> Tensor:
        """Share by which points (*, D) are farther or nearer than the surface, of shape (*)."""
        if value.shape[-1:] != (self.dim,):
            return torch.full(value.shape[:-1], math.inf, device=value.device)
        rows = value.detach().reshape(-1, value.shape[-1])
        scale = rows.abs().amax(1, keepdim=True)
        usable = (scale[:, 0] > 0) & rows.isfinite().all(1)
        if self.surface.domain == "orthant":
            usable = usable & (rows > 0).all(1)
        # Rows that have no direction get one here, and an infinite deviation below.
        scaled = torch.where(usable.unsqueeze(1), rows / scale, torch.ones_like(rows))
        norms = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
        with torch.no_grad():
            level = self.surface.level(rows, None)
            log_radius = self.surface.gauge.log_radius(scaled / norms, level)
        log_distance = norms[:, 0].log() + scale[:, 0].log()
        share = ((log_distance - log_radius).exp() - 1).abs()
        return torch.where(usable, share, math.inf).view(value.shape[:-1])

    def chart(self) -> list[nf.flows.Flow]:
        """Layers from all of R^(D - 1) to the surface."""
        kind = "orthant" if self.surface.domain == "orthant" else "stereographic"
        return [SphereChart(self.dim, kind), self.surface]

    def __repr__(self) -> str:
        # Without the name of the round surface: Pyro's messages take it for its own constraint.
        level = self.surface.level.level
        return f"StarLikeConstraint({type(self.surface.gauge).__name__}, level={level:g})"


@final
class ImageConstraint(constraints.Constraint):
    r"""Points that layers lead to, :math:`|x - G(F(x))| \le \tau (1 + |x|)`."""

    is_discrete = False

    def __init__(
        self,
        stack: LayerStack,
        tol: float = 1e-3,
        context: Tensor | None = None,
        event_dim: int = 1,
    ) -> None:
        self.stack, self.tol, self.context = stack, tol, context
        self.event_dim = event_dim
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether points (*, *event) lie on the image, of shape (*)."""
        return self.deviation(value) <= self.tol

    @torch.no_grad()
    def deviation(self, value: Tensor) -> Tensor:
        """Distance of points (*, *event) from their reconstruction, over 1 + |x|, shape (*)."""
        batch_shape = value.shape[: value.dim() - self.event_dim]
        rows = value.reshape(-1, *value.shape[len(batch_shape) :])
        context = context_rows(self.context, batch_shape)
        return self._distance(rows, context).view(batch_shape)

    def _distance(self, rows: Tensor, context: Tensor | None) -> Tensor:
        try:
            gap = rows - self.stack.project(rows, context)
        except InjectiveFlowError:
            if len(rows) == 1:
                return rows.new_full((1,), math.inf)
            single = [None] * len(rows) if context is None else context.unsqueeze(1)
            pairs = zip(rows.unsqueeze(1), single, strict=True)
            return torch.cat([self._distance(*pair) for pair in pairs])
        norms = [torch.linalg.vector_norm(t.flatten(1), dim=1) for t in (gap, rows)]
        return torch.nan_to_num(norms[0] / (1 + norms[1]), nan=math.inf)

    def __repr__(self) -> str:
        return f"ImageConstraint(tol={self.tol:g})"


def unit_length(dim: int) -> StarLikeConstraint:
    """Vectors (D,) of length one, like Pyro's constraint, but known to the registries."""
    return StarLikeConstraint(LpGauge(2.0), dim=dim)


def is_standard_simplex(gauge: Gauge, level: float) -> bool:
    """Whether a level set is the simplex of sum one, which Pyro measures by Lebesgue's measure."""
    if not isinstance(gauge, HyperplaneGauge):
        return False
    return bool((gauge.weights / level - 1).abs().max() < 1e-6)

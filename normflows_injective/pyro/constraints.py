"""Surfaces as constraints, with the charts that lead Pyro's guides and samplers to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

import normflows as nf
import torch
from torch import Tensor, nn
from torch.distributions import Transform, biject_to, constraints, transform_to

from ..errors import InjectiveFlowError, OffManifoldError, OptionError, UnsupportedModelError
from ..flows.gauges.gauge import Gauge
from ..flows.gauges.hyperplane import HyperplaneGauge
from ..flows.gauges.lp import LpGauge
from ..flows.graph_surface import GraphSurface
from ..flows.radial import RadialSurface
from ..flows.simplex import SimplexFromOrthant, SimplexStickBreaking
from ..flows.sphere import SphereChart
from ..volume.replicas import in_evaluation
from .layers import LayerStack, context_rows

if TYPE_CHECKING:
    from .flow_transform import FlowTransform

__all__ = ["ImageConstraint", "StarLikeConstraint", "support_of", "unit_length"]


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
        measure: What densities are against: ``"hausdorff"`` or ``"cone"``, see ``RadialSurface``.
        tol: How far from one a point's distance from the centre may be, over the surface's.

    Raises:
        OptionError: If the dimension is not known, or an option is out of range.

    References:
        The registry of constraints: torch.distributions. Charts and volumes: arXiv 2406.09116.

    Examples:
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
        self.surface = RadialSurface(gauge, level, measure)
        known = gauge.dim if dim is None else dim
        if known is None or (gauge.dim is not None and gauge.dim != known):
            raise OptionError(
                f"dim must be given, and be that of the gauge where it has one: got dim={dim!r}, "
                f"and {type(gauge).__name__} has {gauge.dim!r}."
            )
        self.dim = known
        if gauge.needs_context:
            raise OptionError(
                "The surface depends on a context, so it is a different one for every sample. Fix "
                "the context, or use FlowDistribution with context=."
            )
        if not 0 < tol < math.inf:
            raise OptionError(f"tol must be a positive number, got {tol!r}.")
        self.tol = tol
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether points (*, D) lie on the surface, of shape (*)."""
        return self.deviation(value) <= self.tol

    def deviation(self, value: Tensor) -> Tensor:
        """By which share points (*, D) are farther or nearer than the surface, of shape (*)."""
        if value.shape[-1:] != (self.dim,):
            return torch.full(value.shape[:-1], math.inf, device=value.device)
        rows = value.detach().reshape(-1, value.shape[-1])
        scale = rows.abs().amax(1, keepdim=True)
        usable = (scale[:, 0] > 0) & rows.isfinite().all(1)
        if self.surface.domain == "orthant":
            usable = usable & (rows > 0).all(1)
        # What is no direction is replaced by one, and reported below.
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
    r"""Points that layers lead to.

    .. math:: \lVert x - G(F(x)) \rVert \le \tau\, (1 + \lVert x \rVert)

    Args:
        stack: Layers with an injection among them.
        tol: :math:`\tau`.
        context: Context of shape (*batch, C), or None.
        event_dim: Number of dimensions of a point.

    Examples:
        >>> from normflows_injective.flows import Pad
        >>> plane = ImageConstraint(LayerStack([Pad(2, 3)]))
        >>> plane.check(torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 1.0]]))
        tensor([ True, False])
    """

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
            parts = zip(rows.unsqueeze(1), single, strict=True)
            return torch.cat([self._distance(row, one) for row, one in parts])
        norms = [torch.linalg.vector_norm(t.flatten(1), dim=1) for t in (gap, rows)]
        return torch.nan_to_num(norms[0] / (1 + norms[1]), nan=math.inf)

    def __repr__(self) -> str:
        return f"ImageConstraint(tol={self.tol:g})"


def unit_length(dim: int) -> StarLikeConstraint:
    """Vectors of length one, as Pyro's own constraint of them, but known to the registries.

    Args:
        dim: Their dimension D.

    Returns:
        The constraint.

    Examples:
        >>> unit_length(2).check(torch.tensor([0.6, 0.8]))
        tensor(True)
    """
    return StarLikeConstraint(LpGauge(2.0), dim=dim)


def support_of(
    stack: LayerStack, event_dim: int, context: Tensor | None = None
) -> constraints.Constraint:
    """Where the values of layers lie.

    Args:
        stack: Layers from latent to data.
        event_dim: Number of dimensions of an event.
        context: Context of shape (*batch, C), or None.

    Returns:
        All of space, or the surface that the last layer leads to.

    Examples:
        >>> support_of(LayerStack([SphereChart(3), RadialSurface(LpGauge(1.0))]), 1)
        StarLikeConstraint(LpGauge, level=1)
    """
    last: Any = stack.flows[-1]
    while isinstance(getattr(last, "flows", None), nn.ModuleList):
        last = last.flows[-1]
    if not stack.raises_dimension:
        if isinstance(last, nf.transforms.Logit):
            inner = 1 - 2 * last.alpha
            interval = constraints.interval(-last.alpha / inner, (1 - last.alpha) / inner)
            return constraints.independent(interval, event_dim)
        return constraints.independent(constraints.real, event_dim)
    if stack.is_closed_form:
        if isinstance(last, SimplexStickBreaking | SimplexFromOrthant) and last.total == 1:
            # Pyro's simplex stands for Lebesgue measure.
            area = StarLikeConstraint(HyperplaneGauge(torch.ones(last.dim)))
            return area if last.measure == "hausdorff" else constraints.simplex
        if isinstance(last, RadialSurface) and not last.needs_context:
            dim = _dimension(stack)
            level = last.level.level
            return StarLikeConstraint(last.gauge, level, dim=dim, measure=last.measure)
        if getattr(last, "codomain", None) == "sphere":
            return unit_length(_dimension(stack))
    return ImageConstraint(stack, context=context, event_dim=event_dim)


def refuse_off_support(law: Any, value: Tensor) -> None:
    """Raise if values lie off the manifold of a distribution, saying by how much.

    Args:
        law: A distribution.
        value: Values (*, *event).

    Raises:
        OffManifoldError: If its support is one of ours, and does not hold all values.
    """
    support = law.support
    if not isinstance(support, StarLikeConstraint | ImageConstraint):
        return
    deviation = support.deviation(value)
    far = deviation > support.tol
    if bool(far.any()):
        raise OffManifoldError(
            f"{int(far.sum())} of {far.numel()} values lie off the manifold of {law}, the worst "
            f"by {float(deviation.max()):.3g} of its size, where {support.tol:g} is allowed. "
            "Project them, or check where they come from."
        )


def score_where(
    near: Tensor,
    score: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor,
    context: Tensor | None = None,
) -> Tensor:
    """Score the values of a batch that lie on a manifold; the others have no density.

    Args:
        near: Which values do, of shape (B,).
        score: Log-density (b,) of values (b, *) with their context.
        x: Values (B, *).
        context: One row per value, or None.

    Returns:
        Log-density (B,), minus infinity off the manifold.

    Examples:
        >>> near = torch.tensor([True, False])
        >>> score_where(near, lambda rows, context: rows.sum(1), torch.ones(2, 3))
        tensor([3., -inf])
    """
    if bool(near.all()):
        return score(x, context)
    scores = x.new_full((len(x),), -math.inf)
    if bool(near.any()):
        found = score(x[near], None if context is None else context[near])
        scores = scores.index_put((near,), found)
    return scores


def is_standard_simplex(gauge: Gauge, level: float) -> bool:
    """Whether a level set is the simplex of sum one, whose measure in Pyro is Lebesgue's.

    Args:
        gauge: A gauge.
        level: Its level.

    Examples:
        >>> is_standard_simplex(HyperplaneGauge(torch.ones(3)), 1.0)
        True
    """
    if not isinstance(gauge, HyperplaneGauge):
        return False
    return bool((gauge.weights / level - 1).abs().max() < 1e-6)


def _dimension(stack: LayerStack) -> int:
    first: Any = stack.composite[0]
    while isinstance(getattr(first, "flows", None), nn.ModuleList):
        first = first.flows[0]
    return int(first.data_shape[0])


def _to_surface(constraint: StarLikeConstraint) -> Transform:
    from .flow_transform import FlowTransform

    transform: FlowTransform = FlowTransform(constraint.chart(), cache_size=0)
    return in_evaluation(transform)


def _to_image(constraint: ImageConstraint) -> Transform:
    from .flow_transform import FlowTransform

    stack = constraint.stack
    if not (len(stack.flows) == 1 and isinstance(stack.flows[0], GraphSurface)):
        raise UnsupportedModelError(
            "No chart of this image from all of R^d is known, so guides and samplers cannot reach "
            "it by themselves. Sample the latents instead: z ~ Normal, x = decoder(z), which "
            "needs no density of x."
        )
    transform: FlowTransform = FlowTransform(list(stack.flows), cache_size=0)
    return transform


for _registry in (biject_to, transform_to):
    _registry.register(StarLikeConstraint, _to_surface)
    _registry.register(ImageConstraint, _to_image)

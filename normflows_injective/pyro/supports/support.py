"""The support of a distribution: where values lie, and what becomes of those that do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ...checks import describe
from ...errors import OffManifoldError, OptionError
from ...flows.gauges.hyperplane import HyperplaneGauge
from ...flows.stack import LayerStack
from ...flows.surfaces.radial import RadialSurface
from ...flows.surfaces.simplex import SimplexFromOrthant, SimplexStickBreaking
from .constraints import ImageConstraint, StarLikeConstraint, unit_length
from .ranges import bounded_support

__all__ = ["given_support", "refuse_off_support", "score_where", "support_of"]


def support_of(
    stack: LayerStack, event_dim: int, context: Tensor | None = None, base: Any = None
) -> constraints.Constraint:
    """Where the values of layers lie.

    Args:
        stack: Layers from latent to data.
        event_dim: Number of dimensions of an event.
        context: Context of shape (*batch, C), or None.
        base: The law of the latents, or None for one that reaches all of space.

    Returns:
        All of space, a box or its image, or the surface that the last layer leads to.

    Examples:
        >>> from normflows_injective.flows import SphereChart
        >>> from normflows_injective.flows.gauges import LpGauge
        >>> support_of(LayerStack([SphereChart(3), RadialSurface(LpGauge(1.0))]), 1)
        StarLikeConstraint(LpGauge, level=1)
    """
    last: Any = stack.flows[-1]
    while isinstance(getattr(last, "flows", None), nn.ModuleList):
        last = last.flows[-1]
    if not stack.raises_dimension:
        bounded = bounded_support(stack, event_dim, base, context)
        return bounded or constraints.independent(constraints.real, event_dim)
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


def given_support(given: Any, event_dim: int, name: str) -> constraints.Constraint:
    """A support that a caller says, as one of whole events.

    Args:
        given: What the caller gave.
        event_dim: Number of dimensions of an event.
        name: How the message calls it.

    Raises:
        OptionError: If it is no continuous constraint of such events.

    Examples:
        >>> given_support(constraints.unit_interval, 1, "support").event_dim
        1
    """
    if not isinstance(given, constraints.Constraint) or given.is_discrete:
        raise OptionError(
            f"{name} must be a continuous constraint of torch.distributions.constraints, such as "
            f"constraints.unit_interval, got {describe(given)}."
        )
    if given.event_dim > event_dim:
        raise OptionError(
            f"{name} must be a constraint of events of {event_dim} dimensions or of single "
            f"coordinates, got one of {given.event_dim} dimensions. Check event_dim."
        )
    rest = event_dim - given.event_dim
    return constraints.independent(given, rest) if rest else given


def refuse_off_support(law: Any, value: Tensor) -> None:
    """Raise if values lie off the support of a distribution, saying how many or by how much.

    Args:
        law: A distribution.
        value: Values (*, *event).

    Raises:
        OffManifoldError: If its support does not hold all values.
    """
    if value.numel() == 0:
        return
    support = law.support
    if isinstance(support, StarLikeConstraint | ImageConstraint):
        deviation = support.deviation(value)
        far = deviation > support.tol
        if bool(far.any()):
            raise OffManifoldError(
                f"{int(far.sum())} of {far.numel()} values lie off the manifold of {law}, the "
                f"worst by {float(deviation.max()):.3g} of its size, where {support.tol:g} is "
                "allowed. Project them, or check where they come from."
            )
        return
    outside = ~support.check(value)
    if bool(outside.any()):
        first = (
            value.flatten(0, outside.dim() - 1)[outside.flatten()][0] if outside.dim() else value
        )
        raise OffManifoldError(
            f"{int(outside.sum())} of {outside.numel()} values lie outside the support of {law}, "
            f"{support}, the first of them {first.flatten()[:4].tolist()}. Check where they come "
            "from; without validation they have density zero."
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


def _dimension(stack: LayerStack) -> int:
    first: Any = stack.composite[0]
    while isinstance(getattr(first, "flows", None), nn.ModuleList):
        first = first.flows[0]
    return int(first.data_shape[0])

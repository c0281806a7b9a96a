"""The support of a distribution, and the densities of values inside and outside of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributions import constraints

from ...checks import describe
from ...errors import OffManifoldError, OptionError
from ...flows.layer_stack import LayerStack
from ...flows.surfaces.surface import Surface, surface_of
from .boxes import bounded_support
from .surfaces import ImageConstraint, StarLikeConstraint, unit_length


def support_of(
    stack: LayerStack, event_dim: int, context: Tensor | None = None, base: Any = None
) -> constraints.Constraint:
    """Real space, a box or its image, or the surface that the last layer leads to."""
    if not stack.raises_dimension:
        return bounded_support(stack, event_dim, base, context) or whole_space(event_dim)
    return known_surface(stack) or ImageConstraint(stack, context=context, event_dim=event_dim)


def known_surface(stack: LayerStack) -> constraints.Constraint | None:
    """The surface that layers declare as their image, or None for space and for other images."""
    surface = surface_of(stack.composite) if stack.raises_dimension else None
    if surface is None or surface.dim is None or surface.kind not in _CONSTRAINTS:
        return None
    return _CONSTRAINTS[surface.kind](surface)


def _simplex(surface: Surface) -> constraints.Constraint | None:
    if surface.level != 1:
        return None
    # Pyro's simplex stands for Lebesgue measure.
    return constraints.simplex if surface.measure == "lebesgue" else _level_set(surface)


def _level_set(surface: Any) -> constraints.Constraint:
    _, gauge, level, dim, measure = surface
    return StarLikeConstraint(gauge, level, dim=dim, measure=measure)


# By the kind of a surface. All surfaces of other kinds are images.
_CONSTRAINTS: dict[str, Callable[[Any], constraints.Constraint | None]] = {
    "sphere": lambda surface: unit_length(surface.dim),
    "level_set": _level_set,
    "simplex": _simplex,
}


def whole_space(event_dim: int) -> constraints.Constraint:
    """Real space, as a constraint of whole events."""
    return constraints.independent(constraints.real, event_dim)


def given_support(support: Any, event_dim: int, name: str) -> constraints.Constraint:
    """A caller's constraint of events or of their coordinates, as a constraint of events."""
    if not isinstance(support, constraints.Constraint) or support.is_discrete:
        raise OptionError(
            f"{name} must be a continuous constraint of torch.distributions.constraints, such as "
            f"constraints.unit_interval, got {describe(support)}."
        )
    if support.event_dim > event_dim:
        raise OptionError(
            f"{name} must be a constraint of events of {event_dim} dimensions or of single "
            f"coordinates, got one of {support.event_dim} dimensions. Check event_dim."
        )
    rest = event_dim - support.event_dim
    return constraints.independent(support, rest) if rest else support


def refuse_off_support(law: Any, value: Tensor) -> None:
    """Raise if values (*, *event) lie off the support of a distribution, and say how far."""
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
        first = value if outside.dim() == 0 else value[outside][0]
        raise OffManifoldError(
            f"{int(outside.sum())} of {outside.numel()} values lie outside the support of {law}, "
            f"{support}, the first of them {first.flatten()[:4].tolist()}. Check where they come "
            "from; without validation they have density zero."
        )


def score_where(
    inside: Tensor,
    score: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor,
    context: Tensor | None = None,
) -> Tensor:
    """Log-density (B,) of values (B, *) where they lie inside a support, and minus infinity."""
    if bool(inside.all()):
        return score(x, context)
    scores = x.new_full((len(x),), -math.inf)
    if bool(inside.any()):
        some = score(x[inside], None if context is None else context[inside])
        scores = scores.index_put((inside,), some)
    return scores

"""Ranges of layers and laws that do not reach all of space, and the support that follows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import deepcopy
from typing import Any, final

import normflows as nf
import torch
from torch import Tensor, nn
from torch.distributions import (
    constraints,
)

from ...errors import UnsupportedModelError
from ...flows.stack import LayerStack, context_rows
from ...flows.surfaces.angular_spline import AngularSpline
from ...host.calls import summed_inverse
from ...host.first_data import awaits_first_data
from .box import Box, Range

__all__ = ["PushedBox", "bounded_domain", "bounded_support"]

_WRAPS = (nf.flows.PeriodicWrap, nf.flows.PeriodicShift)
_CIRCULAR = (
    nf.flows.CircularCoupledRationalQuadraticSpline,
    nf.flows.CircularAutoregressiveRationalQuadraticSpline,
)


@final
class PushedBox(constraints.Constraint):
    """Where layers lead from a box, with their parameters as they are when asked.

    Args:
        box: Values before the layers.
        layers: The layers behind, at least one.
        context: Context of shape (*batch, C), or None.

    Examples:
        >>> unit = Box([Range(None, 0.0, 1.0)])
        >>> pushed = PushedBox(unit, [nf.transforms.Shift(3.0)])
        >>> pushed.check(torch.tensor([[-2.5, -2.5], [0.5, 0.5]]))
        tensor([ True, False])
    """

    is_discrete = False

    def __init__(self, box: Box, layers: Iterable[nf.flows.Flow], context: Any = None) -> None:
        self.box, self.layers, self.context = box, list(layers), context
        self.event_dim = box.event_dim
        super().__init__()

    @torch.no_grad()
    def check(self, value: Tensor) -> Tensor:
        """Whether values (*, *event) are images of points of the box, of shape (*)."""
        batch = value.shape[: value.dim() - self.event_dim]
        if value.numel() == 0:
            return torch.ones(batch, dtype=torch.bool, device=value.device)
        rows = value.reshape(-1, *value.shape[len(batch) :]).clone()
        context = context_rows(self.context, batch)
        inside = rows.flatten(1).isfinite().all(1)
        for layer in reversed(self.layers):
            own = _range_of(layer)
            inside = inside & rows.flatten(1).isfinite().all(1)
            if own is not None:
                inside = inside & Box([own], rows.dim() - 1).check(rows)
            # What is outside already takes no part any more, and must not disturb the others.
            rows = torch.where(inside.view(-1, *[1] * (rows.dim() - 1)), rows, 0.5)
            rows = _inverted(layer, rows, context)
        return (inside & self.box.check(rows)).view(batch)

    def __repr__(self) -> str:
        behind = ", ".join(type(layer).__name__ for layer in self.layers)
        return f"PushedBox({self.box}, [{behind}])"


def bounded_support(
    stack: LayerStack, event_dim: int, base: Any = None, context: Tensor | None = None
) -> constraints.Constraint | None:
    """The support of what layers that keep the dimension draw, if it is not all of space.

    Args:
        stack: The layers.
        event_dim: Number of dimensions of an event, at least 1.
        base: The law of the latents, or None for one that reaches all of space.
        context: Context of shape (*batch, C), or None.

    Returns:
        The box that a layer leads to, or its image under later layers, or None.

    Examples:
        >>> layers = LayerStack([nf.flows.Permute(2), nf.transforms.Logit(alpha=0.0)])
        >>> bounded_support(layers, 1)
        Box(all coordinates from 0.0 to 1.0)
    """
    behind: list[Any] = list(stack.flows)
    found = _range_of_base(base)
    while found is None and behind:
        found = _range_of(behind.pop(0))
    if found is None:
        return None
    ranges = [found]
    while behind and isinstance(behind[0], nf.flows.PeriodicWrap):
        # It bounds further coordinates, and leaves the others as they are.
        wrap = behind.pop(0)
        ranges.append(Range(_indices(wrap.ind), -1 * wrap.bound, wrap.bound))
    box = Box(ranges, event_dim)
    return PushedBox(box, behind, context) if behind else box


def bounded_domain(stack: LayerStack, event_dim: int) -> constraints.Constraint | None:
    """What the first of some layers takes, if that is known not to be all of space."""
    first: Any = stack.flows[0]
    found = _range_of(first.flow) if isinstance(first, nf.flows.Reverse) else None
    return None if found is None else Box([found], event_dim)


def _range_of(layer: Any) -> Range | None:
    while isinstance(getattr(layer, "flows", None), nn.ModuleList):
        layer = layer.flows[-1]
    if isinstance(layer, nf.transforms.Logit):
        inner = 1 - 2 * layer.alpha
        return Range(None, -layer.alpha / inner, (1 - layer.alpha) / inner)
    if isinstance(layer, _WRAPS):
        return Range(_indices(layer.ind), -1 * layer.bound, layer.bound)
    if isinstance(layer, AngularSpline) and layer.ind_circ:
        return Range(tuple(layer.ind_circ), -math.pi, math.pi)
    if isinstance(layer, _CIRCULAR):
        return _range_of_circular(layer)
    return None


def _range_of_circular(layer: Any) -> Range | None:
    groups: list[tuple[Any, Any]]
    if isinstance(layer, nf.flows.CircularAutoregressiveRationalQuadraticSpline):
        part = layer.mprqat
        groups = [(range(len(part.tails)), part)]
    else:
        part = layer.prqct
        groups = [
            (part.transform_features.tolist(), part),
            (part.identity_features.tolist(), part.unconditional_transform),
        ]
    bounds: dict[int, float] = {}
    for features, inner in groups:
        limits = torch.as_tensor(inner.tail_bound, dtype=torch.float64).expand(len(features))
        for index, tails, limit in zip(features, inner.tails, limits.tolist(), strict=True):
            if tails == "circular":
                bounds[index] = limit
    if not bounds:
        return None
    high = torch.tensor(list(bounds.values()), dtype=torch.float64)
    return Range(tuple(bounds), -high, high)


def _range_of_base(base: Any) -> Range | None:
    if isinstance(base, nf.distributions.base.Uniform):
        return Range(None, base.low, base.high)
    if isinstance(base, nf.distributions.UniformGaussian):
        indices = _indices(base.ind)
        half = 0.5 * base.scale[list(indices)].detach()
        return Range(indices, -half, half)
    return None


def _indices(given: Any) -> tuple[int, ...]:
    return tuple(int(index) for index in torch.as_tensor(given).reshape(-1))


def _inverted(layer: nf.flows.Flow, rows: Tensor, context: Tensor | None) -> Tensor:
    if any(awaits_first_data(module) for module in layer.modules()):
        # A question does not initialise anything.
        layer = deepcopy(layer)
    try:
        return summed_inverse([layer], rows, context)[0]
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"Whether values lie in the support cannot be told: {type(layer).__name__}, which "
            "follows a layer of bounded values, has no inverse. Pass support= to "
            "FlowDistribution, or use an invertible layer."
        ) from error

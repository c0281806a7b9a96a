"""Values with some coordinates between bounds, and the bases and layers that set the bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import deepcopy
from typing import Any, NamedTuple, final

import normflows as nf
import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from torch.nn.functional import softplus

from ...errors import UnsupportedModelError
from ...flows.layer_stack import LayerStack
from ...flows.surfaces.angular_spline import AngularSpline
from ...host.calls import summed_inverse
from ...host.context import context_rows
from ...host.first_data import awaits_first_data

_WRAPS = (nf.flows.PeriodicWrap, nf.flows.PeriodicShift)
_CIRCULAR = (
    nf.flows.CircularCoupledRationalQuadraticSpline,
    nf.flows.CircularAutoregressiveRationalQuadraticSpline,
)


class Range(NamedTuple):
    """Bounds of some coordinates, by their indices in the last dimension; None for all."""

    indices: tuple[int, ...] | None
    low: Any
    high: Any

    def __str__(self) -> str:
        indices = self.indices
        where = "all coordinates" if indices is None else f"coordinates {list(indices)}"
        low, high = ((torch.as_tensor(bound) + 0.0).tolist() for bound in (self.low, self.high))
        return f"{where} from {low} to {high}"


@final
class Box(constraints.Constraint):
    """Values that lie between bounds in some coordinates."""

    is_discrete = False

    def __init__(self, ranges: Iterable[Range], event_dim: int = 1) -> None:
        self.ranges, self.event_dim = tuple(ranges), event_dim
        super().__init__()

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds that broadcast against values, infinite where there are none."""
        low = torch.full_like(like[(0,) * (like.dim() - 1)], -math.inf)
        high = torch.full_like(low, math.inf)
        for indices, least, most in self.ranges:
            chosen: Any = ... if indices is None else list(indices)
            low[chosen] = torch.maximum(low[chosen], torch.as_tensor(least).to(low))
            high[chosen] = torch.minimum(high[chosen], torch.as_tensor(most).to(high))
        return low, high

    def check(self, value: Tensor) -> Tensor:
        """Whether values (*, *event) lie in the box, of shape (*)."""
        if value.numel() == 0:
            return _all_inside(value, self.event_dim)
        low, high = self.bounds(value.detach())
        # Rounding in the layers that lead back to the box may move a face to just outside.
        slack = 8 * torch.finfo(value.dtype).eps
        low = torch.where(low.isfinite(), low - slack * (1 + low.abs()), low)
        high = torch.where(high.isfinite(), high + slack * (1 + high.abs()), high)
        inside = value.isfinite() & (value >= low) & (value <= high)
        return inside.flatten(value.dim() - self.event_dim).all(-1)

    def __repr__(self) -> str:
        return f"Box({', '.join(map(str, self.ranges))})"


@final
class BoxTransform(Transform):
    r"""Real numbers to a box, :math:`y_i = a_i + (b_i - a_i) / (1 + e^{-x_i})` or :math:`x_i`."""

    domain = codomain = constraints.real
    bijective = True
    sign = 1

    def __init__(self, box: Box) -> None:
        super().__init__()
        self.box = box

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BoxTransform) and self.box is other.box

    def __hash__(self) -> int:
        return hash(id(self.box))

    def _call(self, x: Tensor) -> Tensor:
        bounded, low, width = self._parts(x)
        return torch.where(bounded, low + width * _within(x.sigmoid()), x)

    def _inverse(self, y: Tensor) -> Tensor:
        bounded, low, width = self._parts(y)
        share = torch.where(bounded, (y - low) / width, 0.5)
        return torch.where(bounded, _within(share).logit(), y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Logarithm of the slope of every coordinate."""
        bounded, _, width = self._parts(x)
        inner = torch.where(bounded, x, 0)
        slope = width.log() - softplus(inner) - softplus(-inner)
        return torch.where(bounded, slope, 0)

    def _parts(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = self.box.bounds(like.detach())
        bounded = low.isfinite() & high.isfinite()
        return bounded, torch.where(bounded, low, 0), torch.where(bounded, high - low, 1)


@final
class PushedBox(constraints.Constraint):
    """The image of a box under layers, with their parameters at the time of a call."""

    is_discrete = False

    def __init__(self, box: Box, layers: Iterable[nf.flows.Flow], context: Any = None) -> None:
        self.box, self.layers, self.context = box, list(layers), context
        self.event_dim = box.event_dim
        super().__init__()

    @torch.no_grad()
    def check(self, value: Tensor) -> Tensor:
        """Whether values (*, *event) are images of points of the box, of shape (*)."""
        if value.numel() == 0:
            return _all_inside(value, self.event_dim)
        batch = value.shape[: value.dim() - self.event_dim]
        rows = value.reshape(-1, *value.shape[len(batch) :]).clone()
        context = context_rows(self.context, batch)
        inside = rows.flatten(1).isfinite().all(1)
        for layer in reversed(self.layers):
            layer_range = _range_of(layer)
            inside = inside & rows.flatten(1).isfinite().all(1)
            if layer_range is not None:
                inside = inside & Box([layer_range], rows.dim() - 1).check(rows)
            # Rows that are outside already take no part any more, and must not disturb others.
            rows = torch.where(inside.view(-1, *[1] * (rows.dim() - 1)), rows, 0.5)
            rows = _inverted(layer, rows, context)
        return (inside & self.box.check(rows)).view(batch)

    def __repr__(self) -> str:
        names = ", ".join(type(layer).__name__ for layer in self.layers)
        return f"PushedBox({self.box}, [{names}])"


@final
class Scalars(constraints.Constraint):
    """Scalars that satisfy a constraint of vectors, as vectors of one coordinate."""

    is_discrete = False
    event_dim = 0

    def __init__(self, of_vectors: constraints.Constraint) -> None:
        self.of_vectors = of_vectors
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether scalars satisfy the constraint, of their shape."""
        return self.of_vectors.check(value.unsqueeze(-1))

    def __repr__(self) -> str:
        return f"Scalars({self.of_vectors})"


def bounded_support(
    stack: LayerStack, event_dim: int, base: Any = None, context: Tensor | None = None
) -> constraints.Constraint | None:
    """The box that a base or a layer ends in, or its image under later layers; None if none."""
    later: list[Any] = list(stack.flows)
    bounds = _range_of_base(base)
    while bounds is None and later:
        bounds = _range_of(later.pop(0))
    if bounds is None:
        return None
    ranges = [bounds]
    while later and isinstance(later[0], nf.flows.PeriodicWrap):
        # It bounds further coordinates, and leaves the others as they are.
        ranges.append(_range_of_wrap(later.pop(0)))
    box = Box(ranges, event_dim)
    return PushedBox(box, later, context) if later else box


def bounded_domain(stack: LayerStack, event_dim: int) -> constraints.Constraint | None:
    """The box of values that the first layer takes, or None if it takes all of space."""
    first: Any = stack.flows[0]
    bounds = _range_of(first.flow) if isinstance(first, nf.flows.Reverse) else None
    return None if bounds is None else Box([bounds], event_dim)


def _range_of(layer: Any) -> Range | None:
    while isinstance(getattr(layer, "flows", None), nn.ModuleList):
        layer = layer.flows[-1]
    if isinstance(layer, nf.transforms.Logit):
        inner = 1 - 2 * layer.alpha
        return Range(None, -layer.alpha / inner, (1 - layer.alpha) / inner)
    if isinstance(layer, _WRAPS):
        return _range_of_wrap(layer)
    if isinstance(layer, AngularSpline) and layer.ind_circ:
        return Range(tuple(layer.ind_circ), -math.pi, math.pi)
    if isinstance(layer, _CIRCULAR):
        return _range_of_circular(layer)
    return None


def _range_of_wrap(layer: Any) -> Range:
    return Range(_indices(layer.ind), -1 * layer.bound, layer.bound)


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


def _indices(listed: Any) -> tuple[int, ...]:
    return tuple(int(index) for index in torch.as_tensor(listed).reshape(-1))


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


def _all_inside(value: Tensor, event_dim: int) -> Tensor:
    batch = value.shape[: value.dim() - event_dim]
    return torch.ones(batch, dtype=torch.bool, device=value.device)


def _within(share: Tensor) -> Tensor:
    # As torch's own sigmoid: the ends themselves have no coordinates.
    limits = torch.finfo(share.dtype)
    return share.clamp(min=limits.tiny, max=1 - limits.eps)

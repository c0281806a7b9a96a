"""Boxes: values some coordinates of which lie between bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.distributions import (
    ComposeTransform,
    IndependentTransform,
    ReshapeTransform,
    Transform,
    biject_to,
    constraints,
    transform_to,
)
from torch.nn.functional import softplus

__all__ = ["Box", "BoxTransform", "Range", "Scalars"]


class Range(NamedTuple):
    """Bounds of some coordinates, by their indices in the last dimension; None for all."""

    indices: tuple[int, ...] | None
    low: Any
    high: Any


@final
class Box(constraints.Constraint):
    """Values some coordinates of which lie between bounds.

    Args:
        ranges: The bounds, each of some indices of the last dimension.
        event_dim: Number of dimensions of an event.

    Examples:
        >>> box = Box([Range((0,), 0.0, 1.0)])
        >>> box.check(torch.tensor([[0.5, 9.0], [2.0, 9.0], [0.5, math.nan]]))
        tensor([ True, False, False])
        >>> biject_to(box)(torch.tensor([0.0, 9.0]))
        tensor([0.5000, 9.0000])
    """

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
            batch = value.shape[: value.dim() - self.event_dim]
            return torch.ones(batch, dtype=torch.bool, device=value.device)
        low, high = self.bounds(value.detach())
        # Rounding in the layers that lead back to it may bring a face to just outside.
        slack = 8 * torch.finfo(value.dtype).eps
        low = torch.where(low.isfinite(), low - slack * (1 + low.abs()), low)
        high = torch.where(high.isfinite(), high + slack * (1 + high.abs()), high)
        inside = value.isfinite() & (value >= low) & (value <= high)
        return inside.flatten(value.dim() - self.event_dim).all(-1)

    def __repr__(self) -> str:
        return f"Box({', '.join(map(_named, self.ranges))})"


@final
class BoxTransform(Transform):
    r"""All of space to a box, coordinate by coordinate.

    .. math:: y_i = a_i + (b_i - a_i) / (1 + e^{-x_i})

    where the bounds :math:`a_i, b_i` are finite, and :math:`y_i = x_i` elsewhere.

    Args:
        box: The box.

    Examples:
        >>> BoxTransform(Box([Range(None, -1.0, 1.0)]))(torch.zeros(1))
        tensor([0.])
    """

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
class Scalars(constraints.Constraint):
    """Scalars that lie, as vectors of one coordinate, where a constraint of vectors holds."""

    is_discrete = False
    event_dim = 0

    def __init__(self, of_vectors: constraints.Constraint) -> None:
        self.of_vectors = of_vectors
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether scalars do, of their shape."""
        inside: Tensor = self.of_vectors.check(value.unsqueeze(-1))
        return inside

    def __repr__(self) -> str:
        return f"Scalars({self.of_vectors})"


def _named(found: Range) -> str:
    where = "all coordinates" if found.indices is None else f"coordinates {list(found.indices)}"
    low, high = ((torch.as_tensor(bound) + 0.0).tolist() for bound in found[1:])
    return f"{where} from {low} to {high}"


def _within(share: Tensor) -> Tensor:
    # As torch's own sigmoid: the ends themselves have no coordinates.
    limits = torch.finfo(share.dtype)
    return share.clamp(min=limits.tiny, max=1 - limits.eps)


def _to_box(constraint: Box) -> Transform:
    return IndependentTransform(BoxTransform(constraint), constraint.event_dim)


def _to_scalars(constraint: Scalars) -> Transform:
    vectors = biject_to(constraint.of_vectors)
    scalar, vector = torch.Size(()), torch.Size((1,))
    there, back = ReshapeTransform(scalar, vector), ReshapeTransform(vector, scalar)
    return ComposeTransform([there, vectors, back])


for _registry in (biject_to, transform_to):
    _registry.register(Box, _to_box)
    _registry.register(Scalars, _to_scalars)

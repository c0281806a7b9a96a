"""Parts that all our laws for Pyro have in common: refusals of shapes, and expansion."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable
from copy import copy
from typing import Any, TypeVar

from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

from ...checks import check_flag
from ...checks.sizes import as_size, expanded_size
from ...errors import ShapeError

Law = TypeVar("Law", bound="PyroLaw")
Shape = Iterable[int]


class PyroLaw(TorchDistribution, ABC):
    """A distribution that refuses values and options of the wrong kind by name."""

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, batch_shape: Size, event_shape: Size, validate_args: bool | None) -> None:
        super().__init__(batch_shape, event_shape, validate_args=optional_flag(validate_args))

    def expand(self: Law, batch_shape: Shape, _instance: Any = None) -> Law:
        """The same law over a larger batch."""
        expanded = copy(self)
        expanded._batch_shape = expanded_size(self, batch_shape)
        return expanded

    def _drawn_shape(self, sample_shape: Shape) -> Size:
        """Batch shape (*sample_shape, *batch_shape) of draws."""
        return as_size(sample_shape, "sample_shape") + self.batch_shape

    def _batch_of(self, value: Tensor, owner: object) -> Size:
        """Batch shape of values (*batch, *event_shape) of an owner, which a message names."""
        cut = value.dim() - len(self.event_shape)
        if cut < 0 or value.shape[cut:] != self.event_shape:
            raise ShapeError(
                f"Values must end in the event shape {tuple(self.event_shape)} of {owner}, got "
                f"shape {tuple(value.shape)}."
            )
        return value.shape[:cut]


def optional_flag(validate_args: Any) -> bool | None:
    """The option `validate_args`, checked to be None or a flag."""
    return None if validate_args is None else check_flag(validate_args, "validate_args")

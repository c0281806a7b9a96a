"""Shapes that Pyro and its users hand to distributions and transforms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Size, Tensor

from ..errors import OptionError, ShapeError
from . import check_count, describe


def as_size(shape: Any, name: str) -> Size:
    """Return a tuple or list of counts as a ``torch.Size``, or raise OptionError."""
    if isinstance(shape, Size):
        return shape
    if not isinstance(shape, Iterable) or isinstance(shape, str | bytes | dict | Tensor):
        raise OptionError(
            f"{name} must be a tuple of integers, got {describe(shape)}. Write e.g. (3,), or () "
            "for one."
        )
    return Size([check_count(number, f"Every entry of {name}", least=0) for number in shape])


def expanded_size(law: Any, batch_shape: Any) -> Size:
    """Return the batch shape that a law is expanded to, or raise ShapeError if it cannot be."""
    new, old = as_size(batch_shape, "batch_shape"), law.batch_shape
    fits = len(new) >= len(old) and all(
        size in (1, wider) for size, wider in zip(reversed(old), reversed(new), strict=False)
    )
    if not fits:
        raise ShapeError(
            f"A batch of shape {tuple(old)} cannot be expanded to {tuple(new)}: only new "
            "dimensions on the left and those of size 1 stretch. Check the plate, or the batch "
            "shape of the context."
        )
    return new

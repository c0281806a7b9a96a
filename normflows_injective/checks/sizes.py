"""Shapes that Pyro and its users hand to distributions and transforms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Size, Tensor

from ..errors import OptionError, ShapeError
from . import check_count, describe

__all__ = ["as_size", "expanded_size"]


def as_size(shape: Any, name: str) -> Size:
    """A shape as a ``torch.Size``.

    Args:
        shape: A tuple, list or ``torch.Size`` of integers that are not negative.
        name: How the message calls it.

    Raises:
        OptionError: If it is anything else.

    Examples:
        >>> as_size([2, 3], "sample_shape")
        torch.Size([2, 3])
    """
    if isinstance(shape, Size):
        return shape
    if not isinstance(shape, Iterable) or isinstance(shape, str | bytes | dict | Tensor):
        raise OptionError(
            f"{name} must be a tuple of integers, got {describe(shape)}. Write e.g. (3,), or () "
            "for one."
        )
    return Size([check_count(number, f"Every entry of {name}", least=0) for number in shape])


def expanded_size(law: Any, batch_shape: Any) -> Size:
    """The batch shape that a distribution is expanded to.

    Args:
        law: The distribution.
        batch_shape: What it shall be.

    Raises:
        OptionError: If it is no shape.
        ShapeError: If the present batch shape cannot be stretched to it.

    Examples:
        >>> from torch.distributions import Normal
        >>> expanded_size(Normal(0.0, 1.0), (2,))
        torch.Size([2])
    """
    new, old = as_size(batch_shape, "batch_shape"), law.batch_shape
    fits = len(new) >= len(old) and all(
        have in (1, want) for have, want in zip(reversed(old), reversed(new), strict=False)
    )
    if not fits:
        raise ShapeError(
            f"A batch of shape {tuple(old)} cannot be expanded to {tuple(new)}: only new "
            "dimensions on the left and those of size 1 stretch. Check the plate, or the batch "
            "shape of the context."
        )
    return new

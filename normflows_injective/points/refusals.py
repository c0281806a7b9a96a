"""Refusals of arguments that are no points, with the index of the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import is_readable
from ..errors import OffManifoldError, ShapeError

# A tensor, an array, a column of a data frame, a list of numbers, or a number.
Numbers = Any

_TOLERANCE = 1e-4


def tolerance_of(x: Tensor) -> float:
    """The deviation of norms from one that is taken for rounding."""
    return max(_TOLERANCE, 4 * torch.finfo(x.dtype).eps)


def check_axes(x: Tensor, sizes: Sequence[int], name: str) -> None:
    """Raise ShapeError unless the last axes have these sizes."""
    if tuple(x.shape[-len(sizes) :]) != tuple(sizes):
        expected = ", ".join(["*", *map(str, sizes)])
        raise ShapeError(f"{name} must have shape ({expected}), got {tuple(x.shape)}.")


def check_same_shape(shape: Sequence[int], expected: Sequence[int], names: str) -> None:
    """Raise ShapeError unless two columns have one shape: none is broadcast."""
    if tuple(shape) != tuple(expected):
        raise ShapeError(
            f"{names} must have one value for every point, of shape {tuple(expected)}, got shape "
            f"{tuple(shape)}. Repeat a value that all points share."
        )


def check_unit(x: Tensor, name: str) -> None:
    """Raise OffManifoldError unless vectors (*, D) have norm one."""
    if not is_readable(x):
        return
    norms = torch.linalg.vector_norm(x.detach(), dim=-1)
    far = ~((norms - 1).abs() <= tolerance_of(x))
    refuse_where(
        far,
        f"{name} must have norm one",
        norms,
        "Divide each by its norm; zeros have no direction, and are to be dropped.",
    )


def refuse_where(bad: Tensor, expected: str, values: Tensor, advice: str) -> None:
    """Raise OffManifoldError where a mask (*) is true, with the first of the values (*) there."""
    if not is_readable(bad) or not bool(bad.any()):
        return
    places = bad.nonzero()
    index = places[0].tolist()
    where = f" at index {index}" if index else ""
    raise OffManifoldError(
        f"{expected}, got {float(values[tuple(index)]):.6g}{where}, and {len(places)} of "
        f"{bad.numel()} in all are off. {advice}"
    )

"""The columns of a table, or the channels of images, by their names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import check_rows, describe, is_readable
from ...errors import NonFiniteError, OptionError, ShapeError

_SHOWN = 5


def column_names(names: object, count: int) -> list[str]:
    """Given names of columns, or ``column 0``, ``column 1``, ... where there are none."""
    if names is None:
        return [f"column {index}" for index in range(count)]
    # Column labels of tables are sequences of their own.
    if isinstance(names, str | bytes | dict | Tensor) or not hasattr(names, "__iter__"):
        raise OptionError(
            f"names must be a list of strings, one per column, got {describe(names)}. Give e.g. "
            "names=['age', 'height'], or leave it out."
        )
    given = list(names)
    wrong = [name for name in given if not isinstance(name, str)]
    if wrong or len(given) != count or len(set(given)) != count:
        what = f"{describe(wrong[0])} among them" if wrong else f"{len(set(given))} different ones"
        raise OptionError(
            f"names must be {count} different strings, one per column, got {what}. Give one name "
            "for every column, or leave names out."
        )
    return given


def finite_columns(x: Tensor, names: object) -> tuple[list[Tensor], list[str]]:
    """The columns of data (N, C, *), each flat, and their names; NaN and infinity are refused."""
    check_rows(x, "x")
    if x.shape[0] < 2:
        raise ShapeError(
            f"x must have at least two rows, got shape {tuple(x.shape)}. One row has no scale: "
            "give the whole training data, not one sample."
        )
    if not is_readable(x):
        raise OptionError(
            "x must have values that can be read, got a tensor on the meta device or inside a "
            "compiled or vmapped call. Measure the data outside of it."
        )
    named = column_names(names, x.shape[1])
    data = x.detach()
    bad = (~torch.isfinite(data)).transpose(0, 1).flatten(1).sum(1).tolist()
    if any(bad):
        counted = [f"{name} ({count})" for name, count in zip(named, bad, strict=True) if count]
        raise NonFiniteError(
            f"x must be finite, got {sum(bad)} of {data.numel()} values NaN or infinite, in "
            f"{listed(counted)}. Drop these rows, or fill the values in and give a column that "
            "says where."
        )
    return [column.reshape(-1) for column in data.unbind(1)], named


def listed(names: Sequence[str]) -> str:
    """The first names of a list in words, and the number of the others."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def copies_of_rows(x: Tensor) -> Tensor:
    """A number (N,) for every row of data (N, *), the same for equal rows, counted from zero."""
    numbers: dict[bytes, int] = {}
    # Not -0.0, which is another pattern of bits.
    rows = (x.detach().flatten(1).double() + 0.0).cpu().numpy()
    return torch.tensor([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows])

"""Data before a training: the choice of the rows that are held out, and checks of all of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..checks.wording import level_of_caller
from ..errors import NumericalWarning, OptionError
from ..flows.standardise.columns import copies_of_rows
from .rows import Rows, read_rows

_DOUBLE = torch.float64
# Rounding errors of values, in units of their standard deviation, of which fit warns.
_LEAST_DIGITS = 0.01
# The part that is held out by default, and the number of rows that it has where it may.
_PART, _NUM_ROWS, _MOST = 0.1, 50, 0.25


def split(rows: Rows, validation: Any, seed: int) -> tuple[Rows, Rows]:
    """Rows to train on, and rows that are held out."""
    if isinstance(validation, (tuple, list)):
        return rows, read_rows(*validation)
    if validation is not None and not isinstance(validation, (int, float)):
        return rows, read_rows(validation)
    share = max(_PART, min(_MOST, _NUM_ROWS / rows.count)) if validation is None else validation
    if not 0 < share < 1:
        raise OptionError(
            f"validation must be a part of the rows between 0 and 1, or data, got {validation}."
        )
    order = torch.randperm(rows.count, generator=torch.Generator().manual_seed(seed))
    held = min(max(1, round(share * rows.count)), rows.count - 1)
    order, held = _copies_on_one_side(rows.x, order, held)
    return rows.take(order[held:]), _of_mean_one(rows.take(order[:held]))


def warn_of_rounding(x: Tensor, like: Tensor) -> None:
    """Warn of columns whose values differ by less than a hundred roundings of a dtype."""
    if not x.is_floating_point():
        return
    flat = x.flatten(1)
    spread = flat.double().std(0, correction=0)
    lost = torch.finfo(like.dtype).eps * flat.abs().amax(0) > _LEAST_DIGITS * spread
    columns = (lost & (spread > 0)).nonzero()[:, 0].tolist()
    if columns:
        first = columns[0]
        warnings.warn(
            f"{len(columns)} columns of data lie so far from zero that {like.dtype} keeps less "
            f"than two digits of their differences. Column {first} has values up to "
            f"{float(flat[:, first].abs().max()):.3g}, which differ "
            f"by {float(spread[first]):.3g}. Subtract the offset in float64, or train "
            "model.double().",
            NumericalWarning,
            stacklevel=level_of_caller(),
        )


def digest(parts: Sequence[Rows]) -> str:
    """Words that tell data from others: shapes and norms."""
    tensors = [t for rows in parts for t in (rows.x, rows.context, rows.weights) if t is not None]
    shapes = " and ".join(str(tuple(rows.x.shape)) for rows in parts)
    norms = [
        float(torch.linalg.vector_norm(t if t.is_floating_point() else t.double(), dtype=_DOUBLE))
        for t in tensors
    ]
    return f"{shapes}, norm {', '.join(f'{norm:.12g}' for norm in norms)}"


def _of_mean_one(rows: Rows) -> Rows:
    """Rows whose weights have a mean of one, so that scores of some and of all of them compare."""
    if rows.weights is None:
        return rows
    return replace(rows, weights=rows.weights * (rows.count / rows.mass))


def _copies_on_one_side(x: Tensor, order: Tensor, held: int) -> tuple[Tensor, int]:
    """An order of rows in which copies follow each other, and where it is cut near a place.

    A row that is trained on and held out at once makes the held-out score that of rows seen.
    Labels are left alone: equal rows of them are the law, not copies.
    """
    if not x.is_floating_point():
        return order, held
    groups = copies_of_rows(x)
    num_groups = int(groups.max()) + 1
    if num_groups == len(x) or num_groups == 1:
        return order, held
    rank = torch.full((num_groups,), len(x)).scatter_reduce(
        0, groups[order], torch.arange(len(x)), "amin"
    )
    order = order[rank[groups[order]].argsort(stable=True)]
    ends = (groups[order].diff() != 0).nonzero()[:, 0] + 1
    return order, int(ends[(ends - held).abs().argmin()])

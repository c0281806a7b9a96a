"""Rows of data made ready for estimators of their dimension."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ...checks import check_finite
from ...errors import OptionError, ShapeError
from ...modules.precision import as_factored

LEAST_ROWS = 30
# Below so many rows the estimates of neighbours scatter, and there is too little to train on.
FEW_ROWS = 300
# Columns of fewer different values have neighbours at distances that say nothing.
_FEW_VALUES = 20
# Wide rows are limited by their number of values, but to no fewer rows than this.
_MOST_VALUES, _WIDE_ROWS = 20_000_000, 1000


class PreparedRows(NamedTuple):
    """Rows (N, D) for estimators, what was done to them, and how finely they are rounded.

    ``rounding`` bounds the standard deviation that rounding of the dtype gives to a column.
    """

    rows: Tensor
    notes: tuple[str, ...]
    rounding: float


def prepare(x: Tensor, standardise: bool, max_rows: int, generator: Generator) -> PreparedRows:
    """Flatten and centre data (N, *), without constant columns and repeated rows."""
    flat = x.detach().flatten(1)
    total, width = flat.shape
    if total < LEAST_ROWS:
        raise OptionError(
            f"suggest_latent_dim needs at least {LEAST_ROWS} rows, got {total}. Distances and "
            "spectra of so few say nothing about a dimension: collect more."
        )
    notes = []
    most = min(max_rows, max(_WIDE_ROWS, _MOST_VALUES // width))
    if total > most:
        order = torch.randperm(total, generator=generator, device=generator.device)
        flat = flat[order[:most].to(flat.device)]
        limit = "max_rows" if most == max_rows else f"as many as {width} columns allow"
        notes.append(f"{most} of {total} rows, drawn at random, were used ({limit}).")
    # The CPU sorts rows in the same order whatever the device.
    distinct = torch.unique(flat.cpu(), dim=0)
    if len(distinct) < len(flat):
        notes.append(f"{len(flat) - len(distinct)} rows that repeat others were left out.")
    if len(distinct) < LEAST_ROWS:
        raise OptionError(
            f"x has {len(distinct)} different rows among {len(flat)}, and suggest_latent_dim "
            f"needs {LEAST_ROWS}. Give more data, or add the noise that their rounding removed."
        )
    # Sorted rows would make folds and halves of them differ.
    order = torch.randperm(len(distinct), generator=generator, device=generator.device).cpu()
    rows = as_factored(distinct[order].to(flat.device))
    eps = torch.finfo(x.dtype).eps
    size, scale = rows.abs().amax(0), rows.std(0)
    check_finite(scale, "the standard deviations of x", "Divide x by a constant first.")
    varies = scale > 4 * eps * size
    constant = (~varies).nonzero().flatten().tolist()
    if len(constant) == width:
        raise ShapeError("x has no column that varies, so there is no dimension to estimate.")
    if constant:
        notes.append(f"{_columns(constant)} {'is' if len(constant) == 1 else 'are'} constant.")
    rows, scale, size = rows[:, varies], scale[varies], size[varies]
    coarse = _coarse_columns(rows, varies.nonzero().flatten().tolist())
    if coarse:
        notes.append(
            f"{_columns(coarse)} {'has' if len(coarse) == 1 else 'have'} fewer than {_FEW_VALUES} "
            "different values: estimates from neighbours are unreliable."
        )
    rows = rows - rows.mean(0)
    if standardise:
        rows, size = rows / scale, size / scale
        notes.append("Columns were divided by their standard deviations (standardise).")
    if len(rows) <= rows.shape[1]:
        notes.append(f"The rank of {len(rows)} rows is less than {len(rows)}, whatever the data.")
    if len(rows) < FEW_ROWS:
        notes.append(f"{len(rows)} rows are few: the range was widened.")
    return PreparedRows(rows, tuple(notes), float(eps * size.max()))


def _coarse_columns(rows: Tensor, names: list[int]) -> list[int]:
    if rows.shape[1] > 256:
        # Images; their pixels are grey levels anyway.
        return []
    return [
        name
        for name, column in zip(names, rows.unbind(1), strict=True)
        if len(column.unique()) < _FEW_VALUES
    ]


def _columns(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f"{len(indices)} column{'s' if len(indices) > 1 else ''} ({shown})"

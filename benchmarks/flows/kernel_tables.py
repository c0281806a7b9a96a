"""Tables for `kernel_couplings.py`: continuous columns, no two of them collinear."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["TABLES", "Split", "read_split"]

Array = NDArray[np.float64]

TABLES = ("miniboone_prefix", "uci:protein", "uci:parkinsons", "higgs_small")
# The b-tags of HIGGS take three values. In parkinsons 0 is the person, 1 the age and 2 the sex,
# of 42 people; 8 and 14 are three times 6 and 11.
DROPPED = {"higgs_small": (8, 12, 16, 20), "uci:parkinsons": (0, 1, 2, 8, 14)}
# Recorded values repeat, and the density of an atom has no bound.
NOISE = 0.01
FEW = 500
MOST_TEST_ROWS = 4000


class Split(NamedTuple):
    """Float32 rows in the standard deviations of the table, and the moments of the train rows.

    A model sees rows minus ``mean`` over ``deviation``; its log-likelihood in the units of the
    table is less by the sum of ``log(deviation)``.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    mean: Tensor
    deviation: Tensor


def read_split(table: str, few: bool, seed: int, folder: Path) -> Split:
    """A split: the same test rows always; training rows by seed if there are to be few.

    Args:
        table: One of :data:`TABLES`.
        few: 400 training and 100 validation rows instead of 70 and 10 per cent.
        seed: What picks the few.
        folder: Folder of the .npz files.
    """
    rows = _rows(table, folder)
    test = len(rows) // 5
    pool = rows[test:]
    if few:
        pool = pool[np.random.default_rng(seed).permutation(len(pool))[:FEW]]
    held = len(pool) // 5 if few else len(pool) // 8
    train = torch.from_numpy(pool[held:]).float()
    return Split(
        train,
        torch.from_numpy(pool[:held]).float(),
        torch.from_numpy(rows[: min(test, MOST_TEST_ROWS)]).float(),
        train.mean(0),
        train.std(0),
    )


@cache
def _rows(table: str, folder: Path) -> Array:
    return _clean(_read(table, folder), DROPPED.get(table, ()))


def _read(table: str, folder: Path) -> Array:
    file = "uci_regression" if table.startswith("uci:") else table
    with np.load(folder / f"{file}.npz", allow_pickle=False) as arrays:
        if table == "higgs_small":
            rows = arrays["x"][arrays["y"] == 1]
        else:
            rows = arrays["x" if file == table else table.removeprefix("uci:")]
    return rows.astype(np.float64)


def _clean(rows: Array, dropped: tuple[int, ...]) -> Array:
    """Each row once, in an order and with a noise that no seed of a run changes."""
    generator = np.random.default_rng(0)
    rows = np.unique(np.delete(rows, dropped, axis=1), axis=0)
    rows = (rows - rows.mean(0)) / rows.std(0)
    rows = rows + NOISE * generator.uniform(-1.0, 1.0, rows.shape)
    return rows[generator.permutation(len(rows))]

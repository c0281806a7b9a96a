"""Read tables from .npz files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["TableError", "Tables", "read_background", "read_tables"]

Array = NDArray[np.float64]
Split = tuple[Array, Array, Array]

# Columns of HIGGS that take three values only (the b-tags of the four jets).
HIGGS_DISCRETE = (8, 12, 16, 20)
HOLDOUT = 0.1
# Rows of power_26days in an hour.
HOUR = 60


class TableError(Exception):
    """A data file, or a table in it, is not there."""


class Tables(NamedTuple):
    """Standardised float32 splits of a table, each of shape (N, D)."""

    train: Tensor
    validation: Tensor
    test: Tensor


def read_tables(name: str, folder: Path) -> Tables:
    """Read a table and standardise it by the moments of its training and validation rows.

    ``higgs_small`` holds signal events in 24 continuous columns, ``miniboone_prefix`` events in
    43, ``power_26days`` minutes of a household in 6, ``uci:NAME`` a table of the UCI regression
    collection with its target as the last column.
    """
    if name.startswith("uci:"):
        return _standardise(_read_uci(name.removeprefix("uci:"), folder))
    readers: dict[str, Callable[[Path], Split]] = {
        "higgs_small": _read_higgs,
        "miniboone_prefix": _read_miniboone,
        "power_26days": _read_power,
    }
    if name not in readers:
        raise TableError(f"Unknown table {name!r}: expected {', '.join(readers)} or uci:NAME.")
    return _standardise(readers[name](folder))


def read_background(folder: Path) -> Tensor:
    """Read the background events of ``higgs_small``, in the units of its signal events."""
    signal, background = _read_higgs_events(folder)
    rest, _ = _hold_out(signal)
    rows = (background - rest.mean(0)) / rest.std(0)
    return torch.from_numpy(rows).to(torch.float32)


def _read_higgs(folder: Path) -> Split:
    signal, _ = _read_higgs_events(folder)
    rest, test = _hold_out(signal)
    return *_hold_out(rest), test


def _read_higgs_events(folder: Path) -> tuple[Array, Array]:
    """Signal and background in their continuous columns, the signal in a fixed random order."""
    with _open(folder, "higgs_small.npz") as arrays:
        rows, labels = arrays["x"], arrays["y"]
    rows = np.delete(rows.astype(np.float64), HIGGS_DISCRETE, axis=1)
    signal = rows[labels == 1]
    order = np.random.RandomState(0).permutation(len(signal))
    return signal[order], rows[labels == 0]


def _read_miniboone(folder: Path) -> Split:
    with _open(folder, "miniboone_prefix.npz") as arrays:
        rest, test = _hold_out(arrays["x"])
    return *_hold_out(rest), test


def _read_power(folder: Path) -> Split:
    """Without reactive power and intensity, and with the usual noise below the last digit.

    Minutes beside each other are nearly equal, so whole hours are held out.
    """
    with _open(folder, "power_26days.npz") as arrays:
        rows = np.delete(arrays["x"].astype(np.float64), (1, 3), axis=1)
    random = np.random.RandomState(0)
    last_digits = np.array([0.001, 0.01, 1.0, 1.0, 1.0, 0.0])
    rows = rows + last_digits * random.uniform(size=rows.shape)
    hours = [rows[start : start + HOUR] for start in range(0, len(rows), HOUR)]
    order = random.permutation(len(hours))
    held = int(HOLDOUT * len(hours))
    parts = order[2 * held :], order[held : 2 * held], order[:held]
    train, validation, test = (np.concatenate([hours[hour] for hour in part]) for part in parts)
    return train, validation, test


def _read_uci(table: str, folder: Path) -> Split:
    with _open(folder, "uci_regression.npz") as arrays:
        names = [name for name in arrays.files if not name.endswith("_fold0")]
        if table not in names:
            raise TableError(f"No table {table!r} in uci_regression.npz: it has {names}.")
        rows, in_test = arrays[table].astype(np.float64), arrays[f"{table}_fold0"]
    rest = rows[~in_test]
    # Some tables are in the order of their subjects, so rows at the end are unlike the others.
    train, validation = _hold_out(rest[np.random.RandomState(0).permutation(len(rest))])
    varying = rest.std(0) > 0
    return train[:, varying], validation[:, varying], rows[in_test][:, varying]


def _open(folder: Path, file: str) -> np.lib.npyio.NpzFile:
    path = folder / file
    if not path.is_file():
        raise TableError(
            f"There is no file {path}. Give the folder that has {file} by --data path/to/data, or "
            "by the environment variable NFI_DATA."
        )
    arrays: np.lib.npyio.NpzFile = np.load(path, allow_pickle=False)
    return arrays


def _hold_out(rows: Array) -> tuple[Array, Array]:
    held = int(HOLDOUT * len(rows))
    return rows[:-held], rows[-held:]


def _standardise(split: Split) -> Tables:
    seen = np.concatenate(split[:2])
    mean, deviation = seen.mean(0), seen.std(0)
    return Tables(
        *(torch.from_numpy((rows - mean) / deviation).to(torch.float32) for rows in split)
    )

"""Tables and images of the comparison, standardised and split."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.shared.data import read_arrays

from .files import TableError, read_background, read_tables

__all__ = [
    "IMAGES",
    "TABLES",
    "Split",
    "few_rows",
    "read_images",
    "read_table",
    "synthetic",
]

TABLES = (
    "higgs_small",
    "uci:protein",
    "uci:parkinsons",
    "miniboone_prefix",
    "power_26days",
    "uci:pol",
)
IMAGES = {"mnist": "fashion_mnist", "fashion_mnist": "mnist"}
HELD_IMAGES = 5000


class Split(NamedTuple):
    """Rows (N, D) of one set in float32.

    Attributes:
        train: Rows of the gradients.
        validation: Rows of every choice that a training makes.
        test: Rows of the scores alone.
        others: Rows of another class in the same units, as anomalies, or None.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    others: Tensor | None = None

    @property
    def dim(self) -> int:
        """Number of columns."""
        return self.train.shape[1]


def read_table(name: str, folder: str | None) -> Split:
    """A table in the units of its training and validation rows; SystemExit if it is missing."""
    if name == "synthetic":
        return synthetic()
    if folder is None:
        raise SystemExit("Where are the data? Give --data DIR, or set NFI_DATA.")
    try:
        tables = read_tables(name, Path(folder))
        others = read_background(Path(folder)) if name == "higgs_small" else None
    except TableError as error:
        raise SystemExit(str(error)) from error
    return Split(*tables, others)


def read_images(name: str, folder: str | None) -> Split:
    """Images as rows of 784 numbers in [0, 1]; the other set of images has the anomalies."""
    train, test = (_rows(array) for array in read_arrays(folder, f"{name}.npz", *_PARTS))
    (others,) = read_arrays(folder, f"{IMAGES[name]}.npz", _PARTS[1])
    return Split(train[:-HELD_IMAGES], train[-HELD_IMAGES:], test, _rows(others))


def few_rows(split: Split, rows: int, seed: int) -> Split:
    """Random training rows by the seed, a fifth of them for choices, and all test rows.

    The units stay those of the whole table.
    """
    if rows > len(split.train):
        raise SystemExit(f"Asked for {rows} rows of the {len(split.train)} training rows.")
    generator = torch.Generator().manual_seed(seed)
    chosen = split.train[torch.randperm(len(split.train), generator=generator)[:rows]]
    held = rows // 5
    return split._replace(train=chosen[held:], validation=chosen[:held])


def synthetic(rows: int = 600) -> Split:
    """A noisy surface in R^5, to try the benchmark without a file."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2 * rows, 2, generator=generator)
    x = torch.stack([z[:, 0], z[:, 1], z[:, 0].sin(), z.prod(1) / 2, z[:, 1].cos()], dim=1)
    x = x + 0.05 * torch.randn(x.shape, generator=generator)
    seen = x[: 3 * rows // 2]
    x = (x - seen.mean(0)) / seen.std(0)
    return Split(*x.split([rows, rows // 2, rows // 2]), x[:rows].flip(1))


_PARTS = ("x_train", "x_test")


def _rows(images: object) -> Tensor:
    return torch.as_tensor(images).flatten(1).float() / 255

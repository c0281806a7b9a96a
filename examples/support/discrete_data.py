"""Discrete data for the example of assignment flows: binary images and tables of classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

__all__ = ["TABLES", "Images", "Table", "read_digits", "read_mnist", "read_table"]

TEST_SHARE = 0.2
# Columns of the bike table that count something, and the quantiles that the others are cut into.
# Hours are taken two by two; heavy rain (3 hours in two years) is counted as light rain.
BIKE_CLASSES = {
    "year": 4,
    "season": 3,
    "month": 5,
    "hour": 6,
    "holiday": 7,
    "weekday": 8,
    "working day": 9,
    "weather": 10,
}
BIKE_QUANTILES = {
    "temperature": (11, 6),
    "felt temperature": (12, 6),
    "humidity": (13, 5),
    "wind": (14, 4),
    "rentals": (17, 8),
}
# Torsion angles in the order of the file, and the quantiles that they are cut into.
RNA_QUANTILES = {
    "alpha": 6,
    "beta": 6,
    "gamma": 6,
    "delta": 4,
    "epsilon": 5,
    "zeta": 8,
    "chi": 8,
}
TABLES = ("bike", "rna")


class Images(NamedTuple):
    """Binary images as rows of labels, with the classes of what they show.

    Attributes:
        train: Labels (N, size * size) of zero and one.
        train_classes: Digits (N,).
        test: Labels of other images.
        test_classes: Their digits.
        size: Height and width.
    """

    train: Tensor
    train_classes: Tensor
    test: Tensor
    test_classes: Tensor
    size: int


class Table(NamedTuple):
    """Rows of classes that count from zero.

    Attributes:
        train: Classes (N, n).
        test: Classes of other rows.
        names: Names of the n columns.
        num_classes: Number of classes of each column.
    """

    train: Tensor
    test: Tensor
    names: list[str]
    num_classes: list[int]


def read_digits(seed: int) -> Images:
    """scikit-learn's 1797 digits of 8x8 pixels, inked from half of the range, 80 : 20 by class."""
    digits = load_digits()
    labels = (digits.data >= 8).astype(np.int64)
    train, test, train_classes, test_classes = train_test_split(
        labels, digits.target, test_size=TEST_SHARE, random_state=seed, stratify=digits.target
    )
    parts = [torch.from_numpy(x) for x in (train, train_classes, test, test_classes)]
    return Images(parts[0], parts[1], parts[2], parts[3], 8)


def read_mnist(folder: Path | None, size: int) -> Images:
    """MNIST with a threshold at 127, of size 28, or 14 by averages over squares of 2x2 pixels."""
    with _open(folder, "mnist.npz") as arrays:
        parts = [_binary(arrays[f"x_{part}"], size) for part in ("train", "test")]
        classes = [torch.from_numpy(arrays[f"y_{p}"]).long() for p in ("train", "test")]
    return Images(parts[0], classes[0], parts[1], classes[1], size)


def read_table(name: str, folder: Path | None, seed: int) -> Table:
    """A real table as classes, split at random 80 : 20, by quantiles of the training rows.

    ``bike`` holds the hours of two years of a bicycle hire with the date, the weather and the
    rentals, ``rna`` torsion angles of RNA with the residue.
    """
    readers = {"bike": _read_bike, "rna": _read_rna}
    classes, values, bins = readers[name](folder)
    names = [*classes, *values]
    order = np.random.default_rng(seed).permutation(len(next(iter(values.values()))))
    test, train = np.split(order, [int(TEST_SHARE * len(order))])
    columns = list(classes.values())
    for column in values:
        shares = np.arange(1, bins[column]) / bins[column]
        edges = np.unique(np.quantile(values[column][train], shares))
        columns.append(np.searchsorted(edges, values[column], side="right"))
    labels = torch.from_numpy(np.stack(columns, 1).astype(np.int64))
    counts = (labels.amax(0) + 1).tolist()
    return Table(labels[train], labels[test], names, counts)


Columns = dict[str, NDArray[Any]]


def _read_bike(folder: Path | None) -> tuple[Columns, Columns, dict[str, int]]:
    with _open(folder, "uci_regression.npz") as arrays:
        rows = arrays["bike"]
    classes: Columns = {
        name: np.unique(rows[:, place], return_inverse=True)[1]
        for name, place in BIKE_CLASSES.items()
    }
    classes["hour"] = classes["hour"] // 2
    classes["weather"] = np.minimum(classes["weather"], 2)
    values: Columns = {name: rows[:, place] for name, (place, _) in BIKE_QUANTILES.items()}
    return classes, values, {name: num for name, (_, num) in BIKE_QUANTILES.items()}


def _read_rna(folder: Path | None) -> tuple[Columns, Columns, dict[str, int]]:
    with _open(folder, "rna_torus.npz") as arrays:
        residues, angles = arrays["res"], arrays["angles_deg"] % 360
    classes: Columns = {"residue": np.unique(residues, return_inverse=True)[1]}
    values: Columns = {name: angles[:, place] for place, name in enumerate(RNA_QUANTILES)}
    return classes, values, RNA_QUANTILES


def _binary(images: NDArray[np.uint8], size: int) -> Tensor:
    pixels = torch.from_numpy(images).float()
    if size != images.shape[1]:
        pixels = torch.nn.functional.avg_pool2d(pixels.unsqueeze(1), images.shape[1] // size)
    return (pixels > 127).long().flatten(1)


def _open(folder: Path | None, file: str) -> np.lib.npyio.NpzFile:
    """Open a file of arrays, read without unpickling."""
    path = Path(folder or "") / file
    if folder is None or not path.is_file():
        raise SystemExit(
            f"{path} was not found. Give the folder that holds {file} by --data or the "
            "environment variable NFI_DATA."
        )
    arrays: np.lib.npyio.NpzFile = np.load(path, allow_pickle=False)
    return arrays

"""Read events on the earth as points of the sphere, and split them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .files import find

__all__ = ["SETS", "Splits", "on_sphere", "read_events", "split"]

SETS = ("volcano", "quakes", "flood", "fire")


class Splits(NamedTuple):
    """Unit vectors (N, 3) in double precision."""

    train: Tensor
    validation: Tensor
    test: Tensor

    def num_repeated(self) -> int:
        """How many test points also occur in the training points."""
        seen = {tuple(point) for point in self.train.tolist()}
        return sum(tuple(point) in seen for point in self.test.tolist())


def read_events(name: str, folder: Path | None, distinct: bool) -> Tensor:
    """Events on the earth as unit vectors (N, 3); with ``distinct`` each place once."""
    path = find(folder, "earth.npz")
    with np.load(path, allow_pickle=False) as arrays:
        angles = arrays[name].astype(np.float64)
    if distinct:
        angles = np.unique(angles, axis=0)
    return on_sphere(np.deg2rad(angles))


def split(points: Tensor, seed: int) -> Splits:
    """Random split 80 : 10 : 10."""
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))
    held = len(points) // 10
    return Splits(points[order[2 * held :]], points[order[held : 2 * held]], points[order[:held]])


def on_sphere(angles: NDArray[np.float64]) -> Tensor:
    """Unit vectors (N, 3), north along the last axis, of latitudes and longitudes in radians."""
    latitude, longitude = angles.T
    return torch.from_numpy(
        np.stack(
            [
                np.cos(latitude) * np.cos(longitude),
                np.cos(latitude) * np.sin(longitude),
                np.sin(latitude),
            ],
            axis=1,
        )
    )

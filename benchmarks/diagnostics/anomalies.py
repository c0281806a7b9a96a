"""Rows of known manifolds and of real tables, and rows among them that do not belong there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.shared.data import read_arrays

__all__ = ["KINDS", "MANIFOLDS", "TABLES", "Rows", "manifold_rows", "table_rows"]

KINDS = {
    "permuted": "columns permuted",
    "cell": "one cell shifted",
    "off": "off the manifold",
    "gap": "in a gap of the density",
    "far": "far out on the manifold",
    "other": "another class",
}
# Latent and data dimension, and the deviation of the noise in every column.
MANIFOLDS = {"surface in R^5": (2, 5, 0.1), "manifold in R^16": (4, 16, 0.2)}
TABLES = {"higgs_small": 12, "protein": 5}
# The b-tags of HIGGS take three values.
_B_TAGS = (8, 12, 16, 20)
# Shifts of a cell in deviations of its column: every one would be seen on a known manifold.
_SHIFT_ON_MANIFOLDS, _SHIFT_IN_TABLES = 0.3, 2.0


class Rows(NamedTuple):
    """Training, reference and test rows, anomalies by their kind, and a latent dimension."""

    train: Tensor
    reference: Tensor
    test: Tensor
    anomalies: Mapping[str, Tensor]
    latent_dim: int


class Manifold:
    """The image of two normal clusters under a smooth map, with noise around it."""

    def __init__(self, latent_dim: int, data_dim: int, noise: float, seed: int) -> None:
        self.latent_dim, self.data_dim, self.noise = latent_dim, data_dim, noise
        self.generator = torch.Generator().manual_seed(seed)
        # The map belongs to the set, not to the seed.
        fixed = torch.Generator().manual_seed(data_dim)
        shape = (latent_dim, data_dim)
        self.maps = [
            [torch.randn(shape, generator=fixed) / latent_dim**0.5 for _ in range(3)]
            for _ in range(2)
        ]

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers of the seed."""
        return torch.randn(shape, generator=self.generator)

    def latents(self, count: int) -> Tensor:
        """Clusters at -2 and 2 on the first axis, of deviation 1/2 there and 1 elsewhere."""
        z = self.normal(count, self.latent_dim)
        z[:, 0] = 0.5 * z[:, 0] + 2 * self.normal(count).sign()
        return z

    def points(self, z: Tensor, other: bool = False) -> Tensor:
        """Rows at latents (N, d): x = z A + sin(z B) + cos(z C) + noise, of one of two maps."""
        linear, sines, cosines = self.maps[int(other)]
        x = z @ linear + (z @ sines).sin() + (z @ cosines).cos()
        return x + self.noise * self.normal(*x.shape)


def manifold_rows(name: str, count: int, seed: int) -> Rows:
    """Four times as many training rows as there are of every other kind."""
    latent_dim, data_dim, noise = MANIFOLDS[name]
    manifold = Manifold(latent_dim, data_dim, noise, 1000 + seed)
    train, reference, test, fresh = (
        manifold.points(manifold.latents(n)) for n in (4 * count, count, count, count)
    )
    anomalies = _of_cells(fresh, train, _SHIFT_ON_MANIFOLDS, manifold.generator)
    anomalies["off"] = fresh + 2 * noise * manifold.normal(*fresh.shape)
    gap = manifold.latents(count)
    gap[:, 0] = torch.rand(count, generator=manifold.generator) - 0.5
    anomalies["gap"] = manifold.points(gap)
    far = manifold.latents(count)
    far[:, 0] = far[:, 0].sign() * (4.5 + torch.rand(count, generator=manifold.generator))
    anomalies["far"] = manifold.points(far)
    anomalies["other"] = manifold.points(manifold.latents(count), other=True)
    return Rows(train, reference, test, anomalies, latent_dim)


def table_rows(name: str, count: int, seed: int, folder: str) -> Rows:
    """The rows of a table, signal alone in HIGGS, where background is the other class."""
    if name == "higgs_small":
        table, labels = read_arrays(folder, "higgs_small.npz", "x", "y")
        table = np.delete(table, _B_TAGS, 1)
        table, others = table[labels == 1], table[labels == 0]
    else:
        (table,) = read_arrays(folder, "uci_regression.npz", name)
        # Equal rows on both sides of a split would be easy for whoever has seen them.
        table, others = np.unique(table, axis=0), None
    generator = torch.Generator().manual_seed(1000 + seed)
    rows = torch.from_numpy(table).float()
    rows = rows[torch.randperm(len(rows), generator=generator)]
    reference, test, fresh, train = rows[: 13 * count].split(
        [count, count, count, min(len(rows), 13 * count) - 3 * count]
    )
    anomalies = _of_cells(fresh, train, _SHIFT_IN_TABLES, generator)
    if others is not None:
        chosen = torch.randperm(len(others), generator=generator)[:count]
        anomalies["other"] = torch.from_numpy(others).float()[chosen]
    return Rows(train, reference, test, anomalies, TABLES[name])


def _of_cells(
    fresh: Tensor, train: Tensor, shift: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Every column permuted by itself, and one cell of each row shifted by some deviations."""
    count, dim = fresh.shape
    orders = torch.rand(count, dim, generator=generator).argsort(0)
    columns = torch.randint(dim, (count, 1), generator=generator)
    signs = 2.0 * torch.randint(2, (count, 1), generator=generator) - 1
    shifts = shift * signs * train.std(0)[columns]
    return {"permuted": fresh.gather(0, orders), "cell": fresh.scatter_add(1, columns, shifts)}

"""Data on manifolds of known dimension, for estimators of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from support.seeds import seeded_generator


class Known(NamedTuple):
    """Data, their intrinsic dimension, and a number of coordinates that one chart needs."""

    draw: Callable[[int, torch.Generator], Tensor]
    intrinsic: int
    chart: int


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _angles(count: int, width: int, generator: torch.Generator) -> Tensor:
    angles = torch.rand(count, width, generator=generator, dtype=torch.float64)
    return 2 * math.pi * angles


def _turned(x: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """The rows in more dimensions, turned at random."""
    basis = torch.linalg.qr(_normal(width, width, generator=generator)).Q
    return x @ basis[: x.shape[1]]


def _flat(dim: int, width: int) -> Callable[[int, torch.Generator], Tensor]:
    def draw(count: int, generator: torch.Generator) -> Tensor:
        z = _normal(count, dim, generator=generator)
        # Singular values within a factor two, so that no direction is thin.
        left = torch.linalg.qr(_normal(dim, dim, generator=generator)).Q
        return _turned(z @ left * torch.linspace(1, 2, dim, dtype=z.dtype), width, generator)

    return draw


def _torus(dim: int, width: int) -> Callable[[int, torch.Generator], Tensor]:
    def draw(count: int, generator: torch.Generator) -> Tensor:
        angles = _angles(count, dim, generator)
        return _turned(torch.cat([angles.cos(), angles.sin()], dim=1), width, generator)

    return draw


def _sphere(dim: int, width: int) -> Callable[[int, torch.Generator], Tensor]:
    def draw(count: int, generator: torch.Generator) -> Tensor:
        z = _normal(count, dim + 1, generator=generator)
        return _turned(z / z.norm(dim=1, keepdim=True), width, generator)

    return draw


def _graph(count: int, generator: torch.Generator) -> Tensor:
    z = _normal(count, 4, generator=generator)
    bends = _normal(4, 4, generator=generator) / 2
    products = torch.stack([z[:, 0] * z[:, 1], z[:, 2].square() / 2], dim=1)
    return _turned(torch.cat([z, torch.sin(1.5 * z @ bends), products], dim=1), 12, generator)


def _swiss_roll(count: int, generator: torch.Generator) -> Tensor:
    angle = 0.75 * (math.pi + 1.0 * _angles(count, 1, generator)) * 2
    height = 21 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    return torch.cat([angle * angle.cos(), height, angle * angle.sin()], dim=1)


def _clusters(count: int, generator: torch.Generator) -> Tensor:
    """Five pieces of planes, each in a direction of its own."""
    chosen = torch.randint(5, (count,), generator=generator)
    centres = 3 * _normal(5, 10, generator=generator)[chosen]
    frames = torch.linalg.qr(_normal(5, 10, 2, generator=generator)).Q[chosen]
    z = _normal(count, 2, generator=generator)
    return centres + torch.einsum("bij,bj->bi", frames, z)


DATA_MANIFOLDS = {
    "flat 5 in 20": Known(_flat(5, 20), 5, 5),
    "rank 18 of 20": Known(_flat(18, 20), 18, 18),
    "normal in 20": Known(_flat(20, 20), 20, 20),
    "curved graph over 4": Known(_graph, 4, 4),
    "circle": Known(_torus(1, 2), 1, 2),
    "circle in 10": Known(_torus(1, 10), 1, 2),
    "torus in 20": Known(_torus(2, 20), 2, 4),
    "Swiss roll": Known(_swiss_roll, 2, 2),
    "sphere of 5": Known(_sphere(5, 6), 5, 6),
    "clusters": Known(_clusters, 2, 2),
}


def data_on(name: str, count: int, noise: float, seed: int = 0) -> Tensor:
    """Rows of a manifold, with noise in units of the standard deviations of the columns."""
    generator = seeded_generator(seed)
    x = DATA_MANIFOLDS[name].draw(count, generator)
    return x + noise * x.std(0) * _normal(*x.shape, generator=generator)

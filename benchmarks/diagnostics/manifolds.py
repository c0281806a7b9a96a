"""Noisy manifolds of known dimension, standardised by column."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

__all__ = ["FITTED", "HELD_OUT", "draw", "standardised"]

Draw = Callable[[int, int, Generator], Tensor]


def _normal(rows: int, columns: int, generator: Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def _flat(z: Tensor, data_dim: int, generator: Generator) -> Tensor:
    """A linear image of a normal."""
    return z @ _normal(z.shape[1], data_dim, generator) / z.shape[1] ** 0.5


def _graph(z: Tensor, data_dim: int, generator: Generator) -> Tensor:
    """A curved graph over all of its coordinates, turned at random."""
    bends = _normal(z.shape[1], data_dim - z.shape[1], generator) / z.shape[1] ** 0.5
    phases = 2 * math.pi * torch.rand(bends.shape[1], generator=generator, dtype=torch.float64)
    graph = torch.cat([z, torch.sin(1.5 * z @ bends + phases)], dim=1)
    return graph @ torch.linalg.qr(_normal(data_dim, data_dim, generator)).Q


def _network(z: Tensor, data_dim: int, generator: Generator) -> Tensor:
    """The image under a wide random network of one hidden layer."""
    hidden = 64
    inner = _normal(z.shape[1], hidden, generator) / z.shape[1] ** 0.5
    outer = _normal(hidden, data_dim, generator) / hidden**0.5
    return torch.tanh(1.2 * z @ inner + 0.5 * _normal(1, hidden, generator)) @ outer


def _clusters(z: Tensor, data_dim: int, generator: Generator) -> Tensor:
    """A curved graph over a mixture of four normals."""
    centres = 2.0 * _normal(4, z.shape[1], generator)
    chosen = torch.randint(4, (len(z),), generator=generator)
    return _graph(centres[chosen] + 0.6 * z, data_dim, generator)


FITTED = {"flat": _flat, "graph": _graph}
HELD_OUT = {"network": _network, "clusters": _clusters}


def standardised(x: Tensor) -> Tensor:
    """Columns of mean zero and standard deviation one."""
    return (x - x.mean(0)) / x.std(0)


def draw(
    kind: str, rows: int, data_dim: int, latent_dim: int, noise: float, generator: Generator
) -> Tensor:
    """Standardised rows (N, D) of a manifold, with noise in units of the columns."""
    z = _normal(rows, latent_dim, generator)
    x = standardised((FITTED | HELD_OUT)[kind](z, data_dim, generator))
    return standardised(x + noise * _normal(rows, data_dim, generator)).float()

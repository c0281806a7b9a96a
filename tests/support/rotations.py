"""Haar quadrature over SO(3), and rotations that are special."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normflows_injective.flows import HopfChart
from normflows_injective.flows.surfaces.quaternions import multiply
from support.points import legendre


def haar_quadrature(heights: int = 20, angles: int = 32) -> tuple[Tensor, Tensor]:
    """Quaternions (n, 4) and weights (n,) of total one: Gauss-Legendre by two trapezoid rules.

    Haar measure is uniform in cos(2 eta) and the two angles of Hopf coordinates.
    """
    nodes, shares = legendre(heights)
    turns = -math.pi + (torch.arange(angles).double() + 0.5) * 2 * math.pi / angles
    zeta = math.sqrt(2) * nodes / (1 - nodes.square()).sqrt()
    grid = torch.cartesian_prod(zeta, turns, turns)
    weights = shares[:, None].expand(-1, angles**2).flatten() / (2 * angles**2)
    return HopfChart().decode(grid), weights


def about(axis: list[float], angle: Tensor | float) -> Tensor:
    """Quaternions (*, 4) of turns about an axis by angles (*)."""
    half = torch.as_tensor(angle, dtype=torch.float64) / 2
    direction = torch.nn.functional.normalize(torch.tensor(axis, dtype=torch.float64), dim=0)
    return torch.cat([half.cos()[..., None], half.sin()[..., None] * direction], dim=-1)


def special_rotations() -> Tensor:
    """The identity, turns by right angles about axes and others, circles of the chart."""
    axes = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, -1, 1], [0, 1, -1]]
    turns = [about(axis, angle) for axis in axes for angle in (0.0, math.pi / 2, math.pi)]
    circle = about([1, 0, 0], torch.linspace(0, 2 * math.pi, 9, dtype=torch.float64))
    other = multiply(circle, torch.tensor([0, 0, 1, 0]).double())
    near = torch.nn.functional.normalize(circle + 1e-9, dim=1)
    return torch.cat([torch.stack(turns), circle, other, near])


def haar(count: int) -> Tensor:
    """Quaternions (count, 4) of the uniform law."""
    return torch.nn.functional.normalize(torch.randn(count, 4, dtype=torch.float64))

"""Points of spheres and orthants in float64, and nodes of quadrature."""

from __future__ import annotations

import math

import numpy as np
import torch


def double(values):
    return torch.as_tensor(values, dtype=torch.float64)


def on_sphere(count, dim):
    """Uniform directions."""
    return torch.nn.functional.normalize(torch.randn(count, dim, dtype=torch.float64))


def on_orthant(count, dim, dtype=torch.float64):
    """Uniform directions without negative coordinates."""
    u = torch.randn(count, dim, dtype=dtype).abs()
    return u / u.norm(dim=1, keepdim=True)


def log_sphere_area(dim):
    return math.log(2) + 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim)


def legendre(nodes, lower=-1.0, upper=1.0):
    """Nodes and weights of Gauss and Legendre on an interval."""
    points, weights = (double(part) for part in np.polynomial.legendre.leggauss(nodes))
    half = (upper - lower) / 2
    return lower + half * (points + 1), half * weights

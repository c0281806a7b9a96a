"""Manifolds and laws with known entropies, for tests of training."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from support.seeds import seeded_generator


class CurvedSurface:
    r"""A curved 2-manifold in R^5, the image of a standard normal under an explicit embedding.

    .. math:: g(z) = (z_1,\ z_2,\ \tfrac12 \sin 2 z_1,\ \tfrac12 \cos z_2,\
              \tfrac14 (z_1^2 - z_2^2)/(1 + \tfrac18 |z|^2))

    Its entropy against the surface measure is that of the normal plus the mean log-volume,

    .. math:: H = 1 + \log 2\pi + \mathbb E[\tfrac12 \log\det g'(z)^\top g'(z)],

    the expectation by Gauss-Hermite quadrature of a closed-form Jacobian.
    """

    def decode(self, z: Tensor) -> Tensor:
        a, b = z[:, 0], z[:, 1]
        bump = (a**2 - b**2) / (1 + (a**2 + b**2) / 8)
        return torch.stack([a, b, (2 * a).sin() / 2, b.cos() / 2, bump / 4], dim=1)

    def sample(self, num_samples: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = seeded_generator(seed)
        z = torch.randn(num_samples, 2, generator=generator, dtype=torch.float64)
        return self.decode(z).to(dtype)

    def jacobian(self, z: Tensor) -> Tensor:
        a, b = z[:, 0], z[:, 1]
        one, zero = torch.ones_like(a), torch.zeros_like(a)
        n, m = a**2 - b**2, 1 + (a**2 + b**2) / 8
        along_a = (2 * a * m - n * a / 4) / m**2 / 4
        along_b = (-2 * b * m - n * b / 4) / m**2 / 4
        columns = [
            torch.stack([one, zero, (2 * a).cos(), zero, along_a], dim=1),
            torch.stack([zero, one, zero, -b.sin() / 2, along_b], dim=1),
        ]
        return torch.stack(columns, dim=2)

    def log_volume(self, z: Tensor) -> Tensor:
        jacobian = self.jacobian(z)
        return 0.5 * torch.logdet(jacobian.mT @ jacobian)

    def entropy(self, nodes: int = 120) -> float:
        points, weights = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
        weights = weights / weights.sum()
        grid = torch.cartesian_prod(points, points)
        mean = (torch.outer(weights, weights).flatten() * self.log_volume(grid)).sum()
        return 1 + math.log(2 * math.pi) + float(mean)

    def exact_nll(self, z: Tensor) -> Tensor:
        return 0.5 * z.square().sum(1) + math.log(2 * math.pi) + self.log_volume(z)

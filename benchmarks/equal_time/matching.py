"""Flow matching of latents, sampled by Heun's method, with densities by the exact trace."""

from __future__ import annotations

import math
from collections.abc import Sequence

import normflows as nf
import torch
from torch import Tensor

import normflows_injective as nfi

__all__ = ["MatchingLaw"]

CHUNK = 1024


class MatchingLaw(nf.distributions.BaseDistribution):
    r"""The law at time one of the flow of a learned velocity from standard normal noise.

    .. math:: \dot z = v(z, t), \qquad z_t = (1 - t)\, \epsilon + t z, \qquad
              \text{loss} = \lVert v(z_t, t) - (z - \epsilon) \rVert^2

    Args:
        dim: Number of latent dimensions d.
        hidden: Widths of the velocity network.
        sample_steps: Steps of Heun's method.
        density_steps: Steps of the classical Runge-Kutta method for densities.
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (256, 256, 256),
        sample_steps: int = 8,
        density_steps: int = 8,
    ) -> None:
        super().__init__()
        self.dim, self.shape = dim, (dim,)
        self.sample_steps, self.density_steps = sample_steps, density_steps
        self.network = nfi.nets.SmoothMLP(dim + 1, dim, hidden).layers

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """Velocities (B, d) at points (B, d) and times (B, 1)."""
        out: Tensor = self.network(torch.cat([z, t], dim=1))
        return out

    def loss(self, z: Tensor) -> Tensor:
        """Matching loss of latents (B, d), with noise and times drawn now; 0-dimensional."""
        return self.loss_at(z, torch.randn_like(z), torch.rand(len(z), 1))

    def loss_at(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Matching loss of latents (B, d) by given noise (B, d) and times (B, 1)."""
        error = self.velocity((1 - t) * noise + t * z, t) - (z - noise)
        return error.square().sum(1).mean()

    def forward(self, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        """Samples (n, d) with their log-densities (n,)."""
        z = self.draw(num_samples)
        return z, self.log_prob(z)

    def draw(self, num_samples: int, steps: int | None = None) -> Tensor:
        """Samples (n, d) alone."""
        return self.push(torch.randn(num_samples, self.dim), steps)

    def push(self, z: Tensor, steps: int | None = None) -> Tensor:
        """Noise (B, d) to samples (B, d), by Heun's method."""
        steps = steps or self.sample_steps
        h = 1 / steps
        for index in range(steps):
            first = self.velocity(z, _times(z, index * h))
            second = self.velocity(z + h * first, _times(z, (index + 1) * h))
            z = z + h / 2 * (first + second)
        return z

    def log_prob(self, z: Tensor) -> Tensor:
        r"""Log-densities (B,) of latents (B, d), in nats.

        .. math:: \log p(z_1) = \log \mathcal N(z_0) - \int_0^1 \operatorname{tr} v'(z_t, t)\, dt
        """
        return torch.cat([self._log_prob(rows) for rows in z.split(CHUNK)])

    def _log_prob(self, z: Tensor) -> Tensor:
        h = -1 / self.density_steps
        log_det = z.new_zeros(len(z))
        for index in range(self.density_steps):
            t = 1 + index * h
            v1, trace1 = self.velocity_and_trace(z, _times(z, t))
            v2, trace2 = self.velocity_and_trace(z + h / 2 * v1, _times(z, t + h / 2))
            v3, trace3 = self.velocity_and_trace(z + h / 2 * v2, _times(z, t + h / 2))
            v4, trace4 = self.velocity_and_trace(z + h * v3, _times(z, t + h))
            z = z + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
            log_det = log_det + h / 6 * (trace1 + 2 * trace2 + 2 * trace3 + trace4)
        normal = -0.5 * z.square().sum(1) - 0.5 * self.dim * math.log(2 * math.pi)
        return normal + log_det

    def velocity_and_trace(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Velocities (B, d) with the traces (B,) of their Jacobians."""

        def along(direction: Tensor) -> tuple[Tensor, Tensor]:
            tangent = direction.expand_as(z)
            return torch.func.jvp(lambda point: self.velocity(point, t), (z,), (tangent,))

        velocities, columns = torch.func.vmap(along)(torch.eye(self.dim, dtype=z.dtype))
        return velocities[0], columns.diagonal(dim1=0, dim2=2).sum(-1)


def _times(z: Tensor, t: float) -> Tensor:
    return z.new_full((len(z), 1), t)

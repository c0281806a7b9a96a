"""The uniform law of the torus."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

from ..checks import check_count
from .law import Law


@final
class UniformTorus(Law):
    r"""Uniform law of :math:`d` angles in radians, :math:`\log p = -d \log 2\pi`.

    Args:
        dim: :math:`d \ge 1`, the number of circles.

    Raises:
        OptionError: If the dimension is below 1.

    References:
        Mardia and Jupp, *Directional Statistics*, Wiley 2000, chapter 3.

    Examples:
        >>> UniformTorus(2).log_prob(torch.zeros(1, 2))
        tensor([-3.6758])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = check_count(dim, "dim")
        self.shape = (dim,)
        self._like = nn.Buffer(torch.empty(0), persistent=False)

    def forward(self, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        """Draw angles (n, d) with their log-density (n,) in nats."""
        like = self._like
        uniform = torch.rand(num_samples, self.dim, dtype=like.dtype, device=like.device)
        angles = (2 * uniform - 1) * math.pi
        return angles, self.log_prob(angles)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density (B,) in nats of angles (B, d), which may lie beyond a turn."""
        return x.new_full((len(x),), -self.dim * math.log(2 * math.pi))

r"""Affine maps that put latents in their place: a location, scales, and a shape between them.

.. math:: x = \mathrm{loc} + \operatorname{diag}(s)\, A z, \qquad
          \log\det = \sum_i \log s_i + \log\det A
"""

from __future__ import annotations

from abc import abstractmethod
from typing import final

import torch
from torch import Tensor, nn

from ..layer import Layer


class Place(Layer):
    r"""Location and scales, with a matrix A that subclasses give; a base class.

    Args:
        loc: Location (D,) at the start.
        scales: Scales (D,) at the start.
    """

    takes_context = False

    def __init__(self, loc: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.dim = len(loc)
        self.shape = (self.dim,)
        self.loc = nn.Parameter(loc.detach().clone())
        self.log_scale = nn.Parameter(scales.detach().log())

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents (B, D) to their places, with the log-det (B,) in nats."""
        x = self.loc + self.log_scale.exp() * self.mix(z)
        return x, self._log_det(z)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Places (B, D) to latents, with the log-det (B,) in nats."""
        z = self.unmix((x - self.loc) * (-self.log_scale).exp())
        return z, -self._log_det(x)

    def move_to(self, loc: Tensor, root: Tensor) -> None:
        """Take a location (D,) and deviations (D,), or a Cholesky factor (D, D) of a covariance.

        A place without room for correlations takes the deviations.
        """
        deviations = root if root.dim() == 1 else root.norm(dim=1)
        self.loc.copy_(loc)
        self.log_scale.copy_(deviations.log())

    @abstractmethod
    def mix(self, z: Tensor) -> Tensor:
        """The products (B, D) of A with rows (B, D)."""

    @abstractmethod
    def unmix(self, y: Tensor) -> Tensor:
        """The products (B, D) of the inverse of A with rows (B, D)."""

    def log_det_of_mixing(self) -> Tensor:
        """The logarithm of the determinant of A, 0-dimensional; zero by default."""
        return self.loc.new_zeros(())

    def _log_det(self, like: Tensor) -> Tensor:
        return (self.log_scale.sum() + self.log_det_of_mixing()).expand(len(like))


@final
class DiagonalPlace(Place):
    """Location and scales alone, for any number of coordinates."""

    def mix(self, z: Tensor) -> Tensor:
        """The rows themselves."""
        return z

    def unmix(self, y: Tensor) -> Tensor:
        """The rows themselves."""
        return y


@final
class TriangularPlace(Place):
    """A lower triangular matrix with ones on its diagonal: normal laws of every covariance."""

    def __init__(self, loc: Tensor, scales: Tensor) -> None:
        super().__init__(loc, scales)
        self.below = nn.Parameter(loc.new_zeros(self.dim, self.dim))

    def move_to(self, loc: Tensor, root: Tensor) -> None:
        """Take a location (D,) and deviations (D,), or a Cholesky factor (D, D)."""
        factor = root.diag() if root.dim() == 1 else root
        super().move_to(loc, factor.diagonal())
        self.below.copy_(factor / factor.diagonal().unsqueeze(1))

    def mix(self, z: Tensor) -> Tensor:
        """The products of the matrix with rows (B, D)."""
        return z + z @ self.below.tril(-1).mT

    def unmix(self, y: Tensor) -> Tensor:
        """The rows (B, D) that the matrix sends to given ones."""
        # torch does not read the diagonal of a unit triangular matrix.
        solved = torch.linalg.solve_triangular(
            self.below.tril(-1), y.mT, upper=False, unitriangular=True
        )
        return solved.mT


@final
class LowRankPlace(Place):
    r"""The matrix :math:`A = I + V V^\top`, whose cost is linear in the number of coordinates.

    .. math:: A^{-1} = I - V C^{-1} V^\top, \qquad \log\det A = \log\det C, \qquad
              C = I + V^\top V

    Args:
        loc: Location (D,) at the start.
        scales: Scales (D,) at the start.
        rank: Number of columns of V, which start at random, with norms of a tenth.
    """

    def __init__(self, loc: Tensor, scales: Tensor, rank: int) -> None:
        super().__init__(loc, scales)
        self.rank = rank
        # At V = 0 its gradient would vanish.
        factor = 0.1 * torch.randn(self.dim, rank, dtype=loc.dtype, device=loc.device)
        self.factor = nn.Parameter(factor / self.dim**0.5)

    def mix(self, z: Tensor) -> Tensor:
        """The products of the matrix with rows (B, D)."""
        return z + (z @ self.factor) @ self.factor.mT

    def unmix(self, y: Tensor) -> Tensor:
        """The rows (B, D) that the matrix sends to given ones."""
        solved = torch.cholesky_solve((y @ self.factor).mT, self._root())
        return y - solved.mT @ self.factor.mT

    def log_det_of_mixing(self) -> Tensor:
        """The logarithm of the determinant of A."""
        return 2 * self._root().diagonal().log().sum()

    def _root(self) -> Tensor:
        unit = torch.ones_like(self.factor[0]).diag()
        return torch.linalg.cholesky(unit + self.factor.mT @ self.factor)

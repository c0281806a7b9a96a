r"""Shapes of the Gaussian noise that thickens a low-dimensional guide."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor, nn


class Noise(nn.Module, ABC):
    r"""Gaussian noise :math:`N(0, \Psi)` in D dimensions, of variance about one at the start."""

    def __init__(self, log_scale: Tensor) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(log_scale)

    @abstractmethod
    def rsample(self, shape: torch.Size) -> Tensor:
        """Draw noise (*shape, D) that carries gradients."""

    def log_volume(self) -> Tensor:
        r"""The number :math:`\tfrac12 \log\det \Psi`, by default the sum of the log-scales."""
        return self.log_scale.sum()

    @abstractmethod
    def take(self, covariance: Tensor) -> None:
        r"""Take a covariance :math:`\Psi` (D, D), or its diagonal, as far as the shape allows."""

    @abstractmethod
    def gram(self, rows: Tensor) -> Tensor:
        r"""Products :math:`X \Psi^{-1} X^\top` (*, m, m) of the rows of matrices X (*, m, D)."""

    @abstractmethod
    def times_precision(self, rows: Tensor) -> Tensor:
        r"""Products :math:`X \Psi^{-1}` (m, D) of the rows of a matrix (m, D)."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (*) of values (*, D), in nats."""
        square = self.gram(value.unsqueeze(-2))[..., 0, 0]
        return -0.5 * (square + value.shape[-1] * math.log(2 * math.pi)) - self.log_volume()


@final
class DiagonalNoise(Noise):
    r"""Noise that is independent in every coordinate, :math:`\Psi = \operatorname{diag}(s^2)`."""

    def __init__(self, like: Tensor) -> None:
        super().__init__(torch.zeros_like(like))

    def rsample(self, shape: torch.Size) -> Tensor:
        """Draw noise (*shape, D) that carries gradients."""
        return self.log_scale.exp() * _normal(shape, self.log_scale)

    def take(self, covariance: Tensor) -> None:
        """Take the diagonal of a covariance (D, D), or variances (D,)."""
        self.log_scale.copy_(0.5 * _diagonal(covariance).log())

    def gram(self, rows: Tensor) -> Tensor:
        """Products (*, m, m) of the rows of matrices (*, m, D)."""
        whitened = rows * (-self.log_scale).exp()
        return whitened @ whitened.mT

    def times_precision(self, rows: Tensor) -> Tensor:
        """Products (m, D) of the rows of a matrix (m, D) with the precision."""
        return rows * (-2 * self.log_scale).exp()


@final
class TriangularNoise(Noise):
    r"""Noise of any covariance :math:`\Psi = L L^\top`, :math:`L = \operatorname{diag}(s) U`."""

    def __init__(self, like: Tensor) -> None:
        super().__init__(torch.zeros_like(like))
        self.below = nn.Parameter(like.new_zeros(len(like), len(like)))

    def rsample(self, shape: torch.Size) -> Tensor:
        """Draw noise (*shape, D) that carries gradients."""
        return _normal(shape, self.log_scale) @ self._factor().mT

    def take(self, covariance: Tensor) -> None:
        """Take a covariance (D, D), or variances (D,)."""
        matrix = covariance.diag() if covariance.dim() == 1 else covariance
        factor = torch.linalg.cholesky(matrix)
        self.log_scale.copy_(factor.diagonal().log())
        self.below.copy_(factor / factor.diagonal().unsqueeze(1))

    def gram(self, rows: Tensor) -> Tensor:
        """Products (*, m, m) of the rows of matrices (*, m, D)."""
        columns = rows.reshape(-1, rows.shape[-1]).mT
        solved = torch.linalg.solve_triangular(self._factor(), columns, upper=False)
        whitened = solved.mT.reshape(rows.shape)
        return whitened @ whitened.mT

    def times_precision(self, rows: Tensor) -> Tensor:
        """Products (m, D) of the rows of a matrix (m, D) with the precision."""
        return torch.cholesky_solve(rows.mT, self._factor()).mT

    def _factor(self) -> Tensor:
        # U is lower triangular with a unit diagonal.
        unit = torch.ones_like(self.log_scale).diag()
        return self.log_scale.exp().unsqueeze(-1) * (self.below.tril(-1) + unit)


@final
class LowRankNoise(Noise):
    r"""Noise of a diagonal plus a low-rank covariance.

    .. math:: \Psi = S\,(I + W W^\top) S, \qquad S = \operatorname{diag}(s)

    By Woodbury's identity, with :math:`C = I + W^\top W = R R^\top` and whitened rows
    :math:`Y = X S^{-1}`,

    .. math::

        X \Psi^{-1} X^\top = Y Y^\top - (Y W R^{-\top})(Y W R^{-\top})^\top, \qquad
        \tfrac12 \log\det\Psi = \sum \log s + \log\det R,

    so that all costs are linear in D.
    """

    def __init__(self, like: Tensor, rank: int) -> None:
        # Half of the variance is from either part. At W = 0 the gradient of W would vanish.
        super().__init__(torch.full_like(like, -0.5 * math.log(2.0)))
        # The parameter store trains a copy of a tensor that is not contiguous.
        self.factor = nn.Parameter(like.new_empty(len(like), rank).normal_(0, rank**-0.5))

    def rsample(self, shape: torch.Size) -> Tensor:
        """Draw noise (*shape, D) that carries gradients."""
        common = _normal(shape, self.factor[0]) @ self.factor.mT
        return self.log_scale.exp() * (_normal(shape, self.log_scale) + common)

    def take(self, covariance: Tensor) -> None:
        """Take the diagonal of a covariance (D, D), or variances (D,)."""
        own = 1 + self.factor.square().sum(1)
        self.log_scale.copy_(0.5 * (_diagonal(covariance) / own).log())

    def log_volume(self) -> Tensor:
        """Half of the log-determinant of the covariance."""
        return super().log_volume() + self._root().diagonal().log().sum()

    def gram(self, rows: Tensor) -> Tensor:
        """Products (*, m, m) of the rows of matrices (*, m, D)."""
        whitened = rows * (-self.log_scale).exp()
        projected = (whitened @ self.factor).reshape(-1, self.factor.shape[1])
        solved = torch.linalg.solve_triangular(self._root(), projected.mT, upper=False).mT
        common = solved.reshape(*rows.shape[:-1], -1)
        return whitened @ whitened.mT - common @ common.mT

    def times_precision(self, rows: Tensor) -> Tensor:
        """Products (m, D) of the rows of a matrix (m, D) with the precision."""
        scale = (-self.log_scale).exp()
        whitened = rows * scale
        common = torch.cholesky_solve((whitened @ self.factor).mT, self._root()).mT
        return (whitened - common @ self.factor.mT) * scale

    def _root(self) -> Tensor:
        unit = torch.ones_like(self.factor[0]).diag()
        return torch.linalg.cholesky(self.factor.mT @ self.factor + unit)


def make_noise(kind: str, like: Tensor, rank: int | None = None) -> Noise:
    r"""Noise ``low_rank``, of rank :math:`\sqrt D` by default, ``mvn``, or else ``diagonal``."""
    if kind == "low_rank":
        return LowRankNoise(like, max(1, round(len(like) ** 0.5)) if rank is None else rank)
    if kind == "mvn":
        return TriangularNoise(like)
    return DiagonalNoise(like)


def _diagonal(covariance: Tensor) -> Tensor:
    return covariance if covariance.dim() == 1 else covariance.diagonal()


def _normal(shape: torch.Size, like: Tensor) -> Tensor:
    return torch.randn(*shape, *like.shape, dtype=like.dtype, device=like.device)

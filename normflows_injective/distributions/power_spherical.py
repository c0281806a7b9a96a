"""The power spherical distribution on the unit sphere, in any dimension."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from .axial import AxialLaw
from .tilted_angle import Tilt


@final
class PowerSpherical(AxialLaw):
    r"""The power spherical distribution, a bump whose draws need no rejection.

    .. math:: p(x) = \frac{(1 + \mu^\top x)^\kappa}{N}, \quad
        N = 2^{\alpha + \beta} \pi^\beta \frac{\Gamma(\alpha)}{\Gamma(\alpha + \beta)}, \quad
        \alpha = \beta + \kappa,\ \beta = \frac{D - 1}{2}

    The tails are heavier than those of :class:`VonMisesFisher`: at the antipode the density is
    zero, but only as a power. A law with :math:`\kappa_{PS} = 2 \kappa` is as narrow as a von
    Mises-Fisher law with a large :math:`\kappa`. Samples of ``forward`` and ``rsample`` move with
    the parameters. Densities are computed in float64, exact to :math:`10^{-14} \kappa` nats, and
    rounded to the dtype of ``loc``.

    A trainable concentration is the parameter itself. If a step takes it below zero, the law has
    direction :math:`-\mu` and concentration :math:`|\kappa|`.

    Args:
        loc: Mean direction :math:`\mu` of shape (D,), :math:`D \ge 2`, of any positive length.
        concentration: :math:`\kappa \ge 0`; 0 is the uniform distribution.
        trainable: Whether both are parameters.
        off_manifold: Treatment by ``log_prob`` of points off the sphere: ``"reject"`` raises where
            a norm is more than 1e-4 from one, ``"project"`` takes their directions.

    Raises:
        ShapeError: If the mean direction is no vector or the concentration no number.
        OptionError: If the mean direction is zero or of one dimension, the concentration negative,
            or the policy unknown.
        NonFiniteError: If one of them holds NaN or infinity.

    References:
        De Cao and Aziz, *The power spherical distribution*, arXiv 2006.04437.

    Examples:
        >>> law = PowerSpherical([0.0, 0.0, 1.0], concentration=1.0)
        >>> law.log_prob(torch.eye(3)).exp()  # 1 / 4 pi across, twice that at the mean
        tensor([0.0796, 0.0796, 0.1592])
        >>> law.kl_uniform()  # log 2 - 1 / 2
        tensor(0.1931)
    """

    def forward(self, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        """Draw samples (num_samples, D) that move with the parameters, with log-densities.

        Args:
            num_samples: Number of samples.

        Returns:
            Samples (num_samples, D), and their log-densities (num_samples,) in nats.

        Raises:
            NonFiniteError: If a parameter has become NaN or infinite.
        """
        return self.rsample(num_samples)

    def _log_density(self, u: Tensor) -> Tensor:
        direction, kappa = self._folded()
        # 1 + t without its cancellation, and never below zero.
        height = (u + direction).square().sum(1) / 2
        log_p = torch.special.xlogy(kappa, height / 2) - self._log_normaliser(kappa)
        return log_p.to(self.loc.dtype)

    def _log_density_at(self, angle: Tensor, kappa: Tensor) -> Tensor:
        return kappa * _log_height(angle) - self._log_normaliser(kappa)

    def _log_normaliser(self, kappa: Tensor) -> Tensor:
        """Log of N / 2^kappa, the integral of ((1 + t) / 2)^kappa."""
        # With z = (1 + t) / 2 it is the area of the sphere of tangent directions, of dimension
        # n = 2 beta, times 2^(n - 1) times the beta function of alpha and beta.
        beta = self._beta
        log_gammas = torch.lgamma(kappa + beta) - torch.lgamma(kappa + 2 * beta)
        return 2 * beta * math.log(2.0) + beta * math.log(math.pi) + log_gammas

    def _entropy(self) -> Tensor:
        _, kappa = self._folded()
        return self._log_normaliser(kappa) - kappa * self._mean_log(kappa)

    def _mean_log(self, kappa: Tensor) -> Tensor:
        """The mean of log((1 + t) / 2), whose law is that of the logarithm of a beta variate."""
        return torch.digamma(kappa + self._beta) - torch.digamma(kappa + 2 * self._beta)

    def _sample_drop(self, kappa: Tensor) -> Tensor:
        """Draw 1 - t = 2 (1 - z), with z a beta variate, as a ratio of gammas with its digits."""
        one, beta = torch.ones_like(kappa), torch.full_like(kappa, self._beta)
        above = torch.distributions.Gamma(kappa + beta, one).sample()
        below = torch.distributions.Gamma(beta, one).sample()
        return 2 * below / (above + below)

    def _tilt(self) -> Tilt:
        # log(1 + t) falls by at least half a rise of 1 - t.
        return Tilt(_log_height, self._mean_log, rate=0.5, n=self.shape[0] - 1)

    @property
    def _beta(self) -> float:
        return (self.shape[0] - 1) / 2


def _log_height(angle: Tensor) -> Tensor:
    """log((1 + cos) / 2), which keeps its digits at both ends."""
    sine, cosine = (angle / 2).sin(), (angle / 2).cos()
    near = torch.log1p(-sine.square().clamp(max=0.75))
    return torch.where(cosine > 0.5, near, cosine.abs().clamp(max=0.75).log() * 2)

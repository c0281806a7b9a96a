"""Likelihoods, ranges of levels and weighted samples of flows on level sets.

Shared by ``lasso_path.py`` and ``objective_bayes.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import normflows_injective as nfi

__all__ = [
    "Array",
    "GaussianLikelihood",
    "LevelRange",
    "WeightedSamples",
    "weighted_quantiles",
    "weighted_samples",
]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class GaussianLikelihood:
    """Log-likelihood peak - (beta - centre)^T precision (beta - centre) / 2."""

    centre: Array
    precision: Array
    peak: float

    @classmethod
    def of_regression(cls, x: Array, y: Array, sigma: float) -> GaussianLikelihood:
        """Likelihood of y = x beta + noise of deviation sigma, for x (n, D) of full rank."""
        centre = np.linalg.solve(x.T @ x, x.T @ y)
        residual = float(np.square(y - x @ centre).sum())
        peak = -0.5 * len(y) * math.log(2 * math.pi * sigma**2) - residual / (2 * sigma**2)
        return cls(centre, x.T @ x / sigma**2, peak)

    @property
    def dim(self) -> int:
        """Number D of coefficients."""
        return len(self.centre)

    def __call__(self, beta: Array) -> Array:
        """Log-likelihood (N,) of coefficients (N, D)."""
        offset = beta - self.centre
        return self.peak - 0.5 * np.einsum("ni,ij,nj->n", offset, self.precision, offset)

    def of_tensor(self, beta: Tensor) -> Tensor:
        """Log-likelihood (N,) of coefficients (N, D) as tensors, differentiable."""
        offset = beta - torch.as_tensor(self.centre).to(beta)
        quadratic = (offset @ torch.as_tensor(self.precision).to(beta) * offset).sum(1)
        return self.peak - 0.5 * quadratic


class LevelRange(NamedTuple):
    """Levels t between two bounds, and the context that networks see: log t in [-1, 1]."""

    low: float
    high: float

    def context(self, levels: Tensor) -> Tensor:
        """Contexts (N, 1) of levels (N,)."""
        middle, half = self._scale()
        return ((levels.log() - middle) / half).unsqueeze(1)

    def level(self, context: Tensor) -> Tensor:
        """Levels (N,) of contexts (N, 1)."""
        middle, half = self._scale()
        return (middle + half * context[:, 0]).exp()

    def draw(self, num_levels: int, linear_share: float) -> Tensor:
        """Random levels (N,): a share of them uniform in t, the others uniform in log t."""
        share = torch.rand(num_levels)
        logarithmic = self.low * (self.high / self.low) ** share
        linear = self.low + (self.high - self.low) * share
        return torch.where(torch.rand(num_levels) < linear_share, linear, logarithmic)

    def _scale(self) -> tuple[float, float]:
        middle = 0.5 * (math.log(self.high) + math.log(self.low))
        return middle, math.log(self.high) - middle


class WeightedSamples(NamedTuple):
    """Samples of the flow with the log-ratio of the unnormalised posterior to its density."""

    points: Array
    log_weights: Array

    @property
    def weights(self) -> Array:
        """Importance weights (N,) that sum to one."""
        weights = np.exp(self.log_weights - self.log_weights.max())
        return weights / weights.sum()

    @property
    def effective_share(self) -> float:
        """Effective sample size over the number of samples."""
        return float(1 / (np.square(self.weights).sum() * len(self.weights)))

    @property
    def log_evidence(self) -> float:
        """Log Z(t), the logarithm of the mean weight."""
        highest = self.log_weights.max()
        return float(highest + np.log(np.exp(self.log_weights - highest).mean()))

    @property
    def standard_error(self) -> float:
        """Standard error of the log-evidence, which is the relative one of Z(t)."""
        return math.sqrt((1 / self.effective_share - 1) / len(self.log_weights))

    @property
    def divergence(self) -> float:
        """Estimate of KL(flow | posterior) = log Z(t) - ELBO, in nats."""
        return self.log_evidence - float(self.log_weights.mean())

    def truncated(self) -> WeightedSamples:
        """Samples with weights of at most sqrt(N) times their mean, against a few that dominate.

        Ionides, Truncated importance sampling, 2008.
        """
        highest = self.log_evidence + 0.5 * math.log(len(self.log_weights))
        return WeightedSamples(self.points, self.log_weights.clip(max=highest))

    def mean(self) -> tuple[Array, Array]:
        """Posterior means (D,) with their standard errors (D,)."""
        mean = self.weights @ self.points
        variance = np.square(self.weights) @ np.square(self.points - mean)
        return mean, np.sqrt(variance)


def weighted_samples(
    model: nfi.InjectiveNormalizingFlow, levels: LevelRange, drawn: Tensor
) -> WeightedSamples:
    """Draw from the flow, one sample at each of the levels (N,)."""
    context = levels.context(drawn)
    with torch.no_grad():
        points, log_q = model.sample(len(drawn), context=context)
        log_weights = model.p.log_prob(points, context) - log_q
    return WeightedSamples(points.double().numpy(), log_weights.double().numpy())


def weighted_quantiles(points: Array, weights: Array, shares: tuple[float, ...]) -> Array:
    """Quantiles (len(shares), D) of weighted points (N, D)."""
    order = points.argsort(axis=0)
    cumulative = weights[order].cumsum(axis=0) / weights.sum()
    columns = [
        np.interp(shares, cumulative[:, k], points[order[:, k], k]) for k in range(points.shape[1])
    ]
    return np.stack(columns, axis=1)

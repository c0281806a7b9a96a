"""Posteriors of regression coefficients on level sets, by one flow for all levels.

Shared by ``lasso_path.py`` and ``objective_bayes.py``. On the level set ||beta||_1 = t the prior
is the uniform law by area, which for this norm is also what every prior that depends on beta only
through its norm leaves when it is conditioned on the norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import trange

import normflows_injective as nfi
from normflows_injective.flows.gauges import LpGauge

__all__ = [
    "GaussianLikelihood",
    "LevelRange",
    "LevelSetPosterior",
    "WeightedSamples",
    "level_set_flow",
    "train",
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
        """That of y = x beta + noise of standard deviation sigma, for x (n, D) of full rank."""
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
        """The same for tensors, differentiable."""
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


class LevelSetPosterior:
    """Likelihood times the uniform law of ||beta||_1 = t, not normalised: its mass is Z(t)."""

    on_manifold = True

    def __init__(self, likelihood: GaussianLikelihood, levels: LevelRange) -> None:
        self.likelihood = likelihood
        self.prior = nfi.distributions.UniformOnSurface(
            LpGauge(1.0), dim=likelihood.dim, level_from_context=levels.level
        )

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density (N,) of coefficients (N, D) against the area of their level set."""
        return self.likelihood.of_tensor(x) + self.prior.log_prob(x, context)


def level_set_flow(
    likelihood: GaussianLikelihood, levels: LevelRange, num_layers: int
) -> nfi.InjectiveNormalizingFlow:
    """A conditional flow on the level sets, with the posterior as its target."""
    return nfi.flows.star_like_flow(
        likelihood.dim,
        LpGauge(1.0),
        level_from_context=levels.level,
        context_dim=1,
        num_layers=num_layers,
        p=LevelSetPosterior(likelihood, levels),
    )


def train(
    model: nfi.InjectiveNormalizingFlow,
    levels: LevelRange,
    steps: int,
    batch: int = 512,
    hottest: float = 10.0,
    linear_share: float = 0.5,
) -> None:
    """Train by the reverse divergence, a level drawn for every sample.

    The temperature of the target falls from ``hottest`` to one over three fifths of the steps:
    cold at once, the flow would settle on a part of the posterior and never see the rest.
    """
    peak_rate = 5e-3
    optimizer = torch.optim.Adam(model.parameters(), peak_rate)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak_rate, total_steps=steps, pct_start=0.1
    )
    progress = trange(steps, desc="training", leave=False, mininterval=2.0)
    for step in progress:
        temperature = hottest ** max(0.0, 1 - step / (0.6 * steps))
        context = levels.context(levels.draw(batch, linear_share))
        loss = model.reverse_kld(batch, beta=1 / temperature, context=context)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 30.0)
        optimizer.step()
        scheduler.step()
        if step % 50 == 0:
            progress.set_postfix(temperature=f"{temperature:.2f}", loss=f"{loss.item():.2f}")
    model.eval()


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
        """That of the log-evidence, and also the relative one of Z(t)."""
        return math.sqrt((1 / self.effective_share - 1) / len(self.log_weights))

    @property
    def divergence(self) -> float:
        """Estimate of KL(flow | posterior) = log Z(t) - ELBO, in nats."""
        return self.log_evidence - float(self.log_weights.mean())

    def truncated(self) -> WeightedSamples:
        """The same with weights of at most sqrt(N) times their mean, against a few that dominate.

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

"""Mixtures of von Mises-Fisher densities on the sphere S^2: by EM, or a kernel on every point.

The likelihood of such a mixture is unbounded: a component on a single point, or on one that the
data repeat, gains without limit as its concentration grows. A bound on the concentrations makes
it finite. It is chosen on validation data together with the number of components and with the
weight of a uniform component, without which single points far from the others decide the score.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Mixture", "MixtureFit", "fit_kernels", "fit_mixture"]

ITERATIONS, TOLERANCE = 100, 1e-4
# A component of this concentration is uniform to three digits.
LEAST_CONCENTRATION = 1e-3
UNIFORM_WEIGHTS = (1e-4, 1e-3, 0.01, 0.03, 0.1, 0.2)


class Mixture(NamedTuple):
    r"""Density :math:`\sum_k w_k \exp(\kappa_k \mu_k \cdot x) \kappa_k / (4\pi \sinh\kappa_k)`.

    Attributes:
        log_weights: Logarithms of the weights, (K,).
        means: Directions of the components, (K, 3).
        concentrations: Concentrations of the components, (K,).
    """

    log_weights: Tensor
    means: Tensor
    concentrations: Tensor

    def joint(self, x: Tensor) -> Tensor:
        """Log-densities (N, K) of points (N, 3) together with the component they come from."""
        kappas = self.concentrations
        log_normaliser = kappas.log() - math.log(2 * math.pi) - (-torch.expm1(-2 * kappas)).log()
        return self.log_weights + log_normaliser + kappas * (x @ self.means.T - 1)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density (N,) of points (N, 3) against the area of the sphere, in nats."""
        return self.joint(x.double()).logsumexp(1)

    def with_uniform(self, weight: float) -> Mixture:
        """This mixture with a uniform component of some weight."""
        return Mixture(
            torch.cat([self.log_weights + math.log1p(-weight), _constant(math.log(weight))]),
            torch.cat([self.means, self.means[:1]]),
            torch.cat([self.concentrations, _constant(LEAST_CONCENTRATION)]),
        )


class MixtureFit(NamedTuple):
    """A fitted mixture with its options, and its mean validation NLL in nats."""

    mixture: Mixture
    size: int
    bound: float
    uniform: float
    validation_nll: float


def fit_mixture(
    train: Tensor,
    validation: Tensor,
    sizes: Sequence[int],
    bounds: Sequence[float],
    restarts: int,
) -> MixtureFit:
    """The best mixture by validation points, of several sizes under several bounds.

    Bounds of the concentration ascend, and each fit starts from the one before.
    """
    candidates = (
        (mixture, size, bound)
        for size in sizes
        if size <= len(train)
        for _ in range(restarts)
        for mixture, bound in _path(train.double(), size, bounds)
    )
    return _best(candidates, validation)


def fit_kernels(train: Tensor, validation: Tensor, bounds: Sequence[float]) -> MixtureFit:
    """The best mixture by validation points, with a component on every training point."""
    ones = torch.ones(len(train), dtype=torch.float64)
    candidates = (
        (Mixture(-ones * math.log(len(train)), train.double(), kappa * ones), len(train), kappa)
        for kappa in bounds
    )
    return _best(candidates, validation)


def _best(candidates: Iterable[tuple[Mixture, int, float]], validation: Tensor) -> MixtureFit:
    best: MixtureFit | None = None
    uniform_log_prob = torch.tensor(-math.log(4 * math.pi), dtype=torch.float64)
    for mixture, size, bound in candidates:
        log_prob = mixture.log_prob(validation)
        for weight in UNIFORM_WEIGHTS:
            mixed = torch.logaddexp(
                log_prob + math.log1p(-weight), uniform_log_prob + math.log(weight)
            )
            nll = -float(mixed.mean())
            if best is None or nll < best.validation_nll:
                best = MixtureFit(mixture.with_uniform(weight), size, bound, weight, nll)
    assert best is not None, "there must be a candidate with no more components than points"
    return best


def _path(train: Tensor, size: int, bounds: Sequence[float]) -> Iterator[tuple[Mixture, float]]:
    mixture = _start(train, size)
    for bound in bounds:
        mixture = _maximise(mixture, train, bound)
        yield mixture, bound


def _start(train: Tensor, size: int) -> Mixture:
    """Means on training points that are far apart (k-means++), all of the same width."""
    chosen = [int(torch.randint(len(train), ()))]
    nearest = torch.full((len(train),), math.inf, dtype=train.dtype)
    for _ in range(size - 1):
        nearest = torch.minimum(nearest, (train - train[chosen[-1]]).square().sum(1))
        # Where points repeat there may be fewer distinct ones than components.
        chosen.append(int(torch.multinomial(nearest + 1e-12, 1)))
    log_weights = torch.full((size,), -math.log(size), dtype=train.dtype)
    return Mixture(log_weights, train[chosen], torch.full_like(log_weights, 2.0 + 4.0 * size))


def _maximise(mixture: Mixture, train: Tensor, bound: float) -> Mixture:
    previous = -math.inf
    for _ in range(ITERATIONS):
        # Single precision halves the time of the one costly line, and suffices for shares.
        joint = mixture.joint(train).float()
        peaks = joint.amax(1, keepdim=True)
        shares = (joint - peaks).exp_()
        sums = shares.sum(1, keepdim=True)
        mean = float((peaks + sums.log()).double().mean())
        if mean - previous < TOLERANCE:
            break
        previous = mean
        mixture = _update(shares.div_(sums).double(), train, bound)
    return mixture


def _update(shares: Tensor, train: Tensor, bound: float) -> Mixture:
    # A component that has lost all points keeps a share too small to matter.
    totals = shares.sum(0).clamp_min(1e-9)
    sums = shares.T @ train
    lengths = torch.linalg.vector_norm(sums, dim=1).clamp_min(1e-12)
    kappas = concentrations(lengths / totals).clamp(LEAST_CONCENTRATION, bound)
    return Mixture((totals / totals.sum()).log(), sums / lengths[:, None], kappas)


def concentrations(lengths: Tensor) -> Tensor:
    r"""Solve :math:`\coth\kappa - 1/\kappa = \bar R` for mean resultant lengths (K,), by Newton.

    The start is the approximation of Banerjee et al., Clustering on the unit hypersphere using
    von Mises-Fisher distributions, 2005. The likelihood is concave in :math:`\kappa`, so cutting
    the root at a bound gives the maximum under that bound.
    """
    # A concentration of 1e8 is a width of 600 metres on the globe.
    lengths = lengths.clamp(1e-6, 1 - 1e-8)
    kappas = lengths * (3 - lengths.square()) / (1 - lengths.square())
    for _ in range(8):
        # For small kappa coth and its inverse cancel.
        small = kappas < 1e-2
        safe = kappas.clamp_min(1e-2)
        coth = 1 / safe.tanh()
        value = torch.where(small, kappas / 3, coth - 1 / safe)
        slope = torch.where(small, torch.full_like(safe, 1 / 3), 1 - coth.square() + safe**-2)
        kappas = (kappas - (value - lengths) / slope).clamp_min(1e-6)
    return kappas


def _constant(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)

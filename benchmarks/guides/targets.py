"""Posteriors with closed-form evidences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import normflows_injective as nfi
import normflows_injective.pyro as nfp

__all__ = ["ALPHA", "KAPPA", "MODE", "TARGETS", "Model", "Target"]

DIM, NARROW = 20, 0.05
ALPHA, KAPPA = 0.8, 10.0
MODE = torch.tensor([1.0, 2.0, 2.0]) / 3
COUNTS = {
    10: (0, 0, 0, 2, 14, 10, 1, 4, 2, 7),
    # One draw of the model itself.
    30: (0, 0, 0, 8, 1, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0)
    + (3, 4, 1, 0, 0, 2, 1, 0, 0, 2, 6, 4, 0, 0, 5),
}

Model = Callable[[], None]


class Target(NamedTuple):
    """A model without arguments, whose data are inside, and its log-evidence."""

    title: str
    model: Model
    log_evidence: float
    steps: int


def _normal(value: Tensor, loc: Tensor | float, scale: float) -> Tensor:
    return dist.Normal(loc, scale).log_prob(value)


def banana() -> Target:
    r"""A parabola in twenty dimensions, thickened by noise: nineteen coordinates follow the first.

    .. math:: x_1 \sim N(0, 1), \quad x_j \sim N(a_j x_1 + b_j x_1^2, 0.05^2), \quad
              |a| = 2.86, \quad |b| = 7.6, \quad a \cdot b = 0
    """
    generator = torch.Generator().manual_seed(3)
    slope = torch.randn(DIM - 1, generator=generator)
    slope = 2.86 * slope / slope.norm()
    bend = torch.randn(DIM - 1, generator=generator)
    bend = bend - (bend @ slope) / (slope @ slope) * slope
    bend = 7.6 * bend / bend.norm()

    def log_density(x: Tensor) -> Tensor:
        first = x[..., :1]
        ridge = first * slope + first.square() * bend
        return _normal(first, 0.0, 1.0).sum(-1) + _normal(x[..., 1:], ridge, NARROW).sum(-1)

    def model() -> None:
        flat = dist.Normal(torch.zeros(DIM), 1.0).to_event(1).mask(False)
        pyro.factor("density", log_density(pyro.sample("x", flat)))

    return Target("banana, D = 20", model, 0.0, 2000)


def regression() -> Target:
    """Linear regression on 20 predictors of correlation 0.8, standard normal coefficients."""
    generator = torch.Generator().manual_seed(2)
    count, shared, scale = 40, 0.8, 0.6
    common = torch.randn(count, 1, generator=generator)
    own = torch.randn(count, DIM, generator=generator)
    design = shared**0.5 * common + (1 - shared) ** 0.5 * own
    truth = torch.randn(DIM, generator=generator)
    outcome = design @ truth + scale * torch.randn(count, generator=generator)

    def model() -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(beta @ design.T, scale).to_event(1), obs=outcome)

    wide = design.double()
    covariance = wide @ wide.T + scale**2 * torch.eye(count, dtype=torch.float64)
    law = dist.MultivariateNormal(torch.zeros(count, dtype=torch.float64), covariance)
    return Target("regression, D = 20", model, float(law.log_prob(outcome.double())), 1200)


def dirichlet_evidence(counts: tuple[int, ...], alpha: float) -> float:
    """Log-evidence of multinomial counts under a symmetric Dirichlet prior."""
    number, total = sum(counts), alpha * len(counts)
    coefficient = math.lgamma(number + 1) - sum(math.lgamma(n + 1) for n in counts)
    parts = sum(math.lgamma(alpha + n) - math.lgamma(alpha) for n in counts)
    return coefficient + math.lgamma(total) - math.lgamma(total + number) + parts


def dirichlet(parts: int) -> Target:
    """Multinomial counts of 40 draws under a Dirichlet prior of 0.8."""
    counts = torch.tensor(COUNTS[parts], dtype=torch.float32)

    def model() -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.full((parts,), ALPHA)))
        pyro.sample("counts", dist.Multinomial(int(counts.sum()), p), obs=counts)

    evidence = dirichlet_evidence(COUNTS[parts], ALPHA)
    return Target(f"Dirichlet-multinomial, K = {parts}", model, evidence, 500)


def sphere(modes: int) -> Target:
    """A direction of uniform prior on the sphere, pulled to one mode or to it and its antipode."""
    prior = nfp.SurfaceDistribution(nfi.distributions.UniformSphere(3))

    def model() -> None:
        u = pyro.sample("u", prior)
        pull = KAPPA * (u @ MODE)
        pyro.factor("pull", pull if modes == 1 else torch.logaddexp(pull, -pull))

    title = "one mode on the sphere" if modes == 1 else "two modes on the sphere"
    # Two modes take longer to be shared out.
    return Target(title, model, math.log(modes * math.sinh(KAPPA) / KAPPA), 400 * modes)


TARGETS: dict[str, Callable[[], Target]] = {
    "banana": banana,
    "regression": regression,
    "dirichlet10": lambda: dirichlet(10),
    "dirichlet30": lambda: dirichlet(30),
    "vmf": lambda: sphere(1),
    "bimodal": lambda: sphere(2),
}

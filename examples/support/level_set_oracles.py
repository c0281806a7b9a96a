"""Evidence on level sets of the l_1 norm by other ways than a flow, to check one."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .level_sets import Array, GaussianLikelihood

__all__ = ["Reference", "anneal", "gaussian_reference", "uniform_evidence"]

# The next temperature is where this share of the particles would still count.
KEPT_SHARE = 0.6


def uniform_on_level(level: float, num: int, dim: int, rng: np.random.Generator) -> Array:
    """Uniform points (num, dim) of ||beta||_1 = level: exponential sizes, random signs."""
    sizes = rng.exponential(size=(num, dim))
    signs = rng.choice([-1.0, 1.0], size=(num, dim))
    return level * signs * sizes / sizes.sum(1, keepdims=True)


class Reference(NamedTuple):
    """Log Z(t) and posterior means (D,) of the coefficients, with standard errors."""

    log_evidence: float
    standard_error: float
    mean: Array
    mean_error: Array


def gaussian_reference(
    likelihood: GaussianLikelihood, level: float, draws: int, rng: np.random.Generator
) -> Reference:
    r"""Z(t) and means from the law of the norm of a Gaussian vector.

    A Gaussian likelihood is, up to its mass C, a Gaussian law of beta, under which the norm has
    the density f(t) = sqrt(D)^-1 \int_{||beta||_1 = t} p dH. Hence Z(t) = C f(t) sqrt(D) / A(t),
    A(t) the area. Given all coordinates but one, the other can have two values on the level set;
    f(t) is the average, over draws of the others, of the sum of its density at the two. No use far
    out in the tail of the norm.
    """
    dim, precision = likelihood.dim, likelihood.precision
    beta = rng.multivariate_normal(likelihood.centre, np.linalg.inv(precision), draws)
    # The coordinate that the others leave most freedom gives the smoothest average.
    free = int(np.diag(precision).argmin())
    others = np.arange(dim) != free
    spread = precision[free, free] ** -0.5
    shift = (beta - likelihood.centre)[:, others] @ precision[others, free]
    mean = likelihood.centre[free] - shift * spread**2
    size = level - np.abs(beta[:, others]).sum(1)
    up, down = (
        np.where(size > 0, np.exp(-0.5 * np.square((place - mean) / spread)), 0.0)
        / (spread * math.sqrt(2 * math.pi))
        for place in (size, -size)
    )
    density = up + down
    log_mass = likelihood.peak + 0.5 * dim * math.log(2 * math.pi)
    log_mass -= 0.5 * float(np.linalg.slogdet(precision)[1])
    # The area over sqrt(D).
    log_area = dim * math.log(2) - math.lgamma(dim) + (dim - 1) * math.log(level)
    average = density.mean()
    moments = beta * density[:, None]
    moments[:, free] = (up - down) * size
    means = moments.mean(0) / average
    errors = (moments - means * density[:, None]).std(0) / (math.sqrt(draws) * average)
    return Reference(
        log_mass - log_area + math.log(average),
        float(density.std() / (math.sqrt(draws) * average)),
        means,
        errors,
    )


def uniform_evidence(
    likelihood: GaussianLikelihood, level: float, draws: int, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Log Z(t) from draws of the uniform law: estimate, standard error, effective draws."""
    log_weights = likelihood(uniform_on_level(level, draws, likelihood.dim, rng))
    weights = np.exp(log_weights - log_weights.max())
    effective = float(weights.sum() ** 2 / np.square(weights).sum())
    estimate = float(log_weights.max() + np.log(weights.mean()))
    return estimate, math.sqrt(1 / effective - 1 / draws), effective


def anneal(
    likelihood: GaussianLikelihood,
    level: float,
    rng: np.random.Generator,
    particles: int = 1000,
    sweeps: int = 5,
    runs: int = 10,
) -> Reference:
    """Annealed importance sampling with resampling, from the uniform law of a level set.

    Between temperatures, chosen as the run goes, pairs of coordinates take Metropolis steps along
    the diamond on which the sum of their sizes stays what it is; the uniform law of the level set
    is uniform there. The errors are those between runs, and know nothing of what all runs miss.
    """
    results = [_anneal_once(likelihood, level, rng, particles, sweeps) for _ in range(runs)]
    logs = np.array([log_evidence for log_evidence, _ in results])
    means = np.stack([points.mean(0) for _, points in results])
    ratios = np.exp(logs - logs.max())
    return Reference(
        float(logs.max() + np.log(ratios.mean())),
        float(ratios.std(ddof=1) / math.sqrt(runs) / ratios.mean()),
        means.mean(0),
        means.std(0, ddof=1) / math.sqrt(runs),
    )


def _anneal_once(
    likelihood: GaussianLikelihood,
    level: float,
    rng: np.random.Generator,
    particles: int,
    sweeps: int,
) -> tuple[float, Array]:
    beta = uniform_on_level(level, particles, likelihood.dim, rng)
    widths = np.ones((likelihood.dim, likelihood.dim))
    inverse_temperature, log_evidence = 0.0, 0.0
    while inverse_temperature < 1:
        values = likelihood(beta)
        step = _next_step(values, 1 - inverse_temperature)
        weights = np.exp(step * (values - values.max()))
        log_evidence += step * values.max() + math.log(weights.mean())
        inverse_temperature += step
        # Systematic resampling.
        places = (rng.random() + np.arange(particles)) / particles
        chosen = np.searchsorted(weights.cumsum() / weights.sum(), places)
        beta = beta[chosen.clip(max=particles - 1)]
        for _ in range(sweeps):
            _sweep(likelihood, beta, inverse_temperature, widths, rng)
    return log_evidence, beta


def _next_step(values: Array, longest: float) -> float:
    def share(step: float) -> float:
        weights = np.exp(step * (values - values.max()))
        return float(weights.sum() ** 2 / np.square(weights).sum() / len(weights))

    if share(longest) >= KEPT_SHARE:
        return longest
    low, high = 0.0, longest
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if share(middle) >= KEPT_SHARE else (low, middle)
    return low


def _sweep(
    likelihood: GaussianLikelihood,
    beta: Array,
    inverse_temperature: float,
    widths: Array,
    rng: np.random.Generator,
) -> None:
    """One Metropolis step for each pair of coordinates, in place."""
    precision, num = likelihood.precision, len(beta)
    gradient = (beta - likelihood.centre) @ precision
    pairs = [(i, j) for i in range(likelihood.dim) for j in range(i)]
    for i, j in rng.permutation(pairs):
        total = np.abs(beta[:, i]) + np.abs(beta[:, j])
        # Places on the diamond: [0, 2) from i = 1 to -1 above, [2, 4) back below.
        side = beta[:, i] / total
        place = np.where(beta[:, j] >= 0, 1 - side, 3 + side)
        scale = widths[i, j] * rng.choice([0.3, 1.0, 3.0], num)
        place = (place + scale * rng.standard_normal(num)) % 4
        new_i = np.where(place < 2, 1 - place, place - 3) * total
        new_j = np.where(place < 2, 1.0, -1.0) * (total - np.abs(new_i))
        move_i, move_j = new_i - beta[:, i], new_j - beta[:, j]
        change = gradient[:, i] * move_i + gradient[:, j] * move_j
        change += 0.5 * (precision[i, i] * move_i**2 + precision[j, j] * move_j**2)
        change += precision[i, j] * move_i * move_j
        taken = np.log(rng.random(num)) < -inverse_temperature * change
        # Coordinates are set, not added to: rounding would leave the level set.
        beta[:, i] = np.where(taken, new_i, beta[:, i])
        beta[:, j] = np.where(taken, new_j, beta[:, j])
        moves = np.stack([move_i, move_j], axis=1) * taken[:, None]
        gradient += moves @ precision[[i, j]]
        widths[i, j] = np.clip(widths[i, j] * math.exp(0.3 * (taken.mean() - 0.3)), 1e-3, 2.0)

r"""The posterior on a level set does not depend on how the penalty was transformed.

    python examples/objective_bayes.py [--steps 1000] [--quick] [--out out]

Priors exp(-h(lambda ||beta||_1)) with different increasing h have the same set of penalised
maximum-likelihood estimates, the lasso path, and different posteriors at every lambda. Conditioned
on ||beta||_1 = t the posteriors are one and the same, because h is constant there:

    p_h(beta | lambda) = int p_h(t | lambda) p(beta | t) dt,
    p_h(t | lambda) proportional to exp(-h(lambda t)) t^(D-1) Z(t),

Z(t) the evidence against the uniform law of the level set. So one conditional flow on the level
sets, trained once and told neither h nor lambda, gives all ambient posteriors by new weights of
the levels. The script compares that with random-walk Metropolis chains in R^5, one run for each
prior and lambda, and those chains near one norm with the flow on the level set, and draws both
sides. Synthetic data, 7 observations of 5 correlated variables; a point of arXiv 2406.09116. With
--quick everything is too short to be good.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from lasso_path import level_set_flow, train
from sklearn.linear_model import lars_path
from support.ambient_chains import Chains, metropolis
from support.level_sets import (
    Array,
    GaussianLikelihood,
    LevelRange,
    WeightedSamples,
    weighted_quantiles,
    weighted_samples,
)
from support.objective_bayes_figure import PENALTIES, Band, Conditioned, draw

import normflows_injective as nfi

LEVELS, SIGMA, DATA_SEED = LevelRange(0.01, 45.0), 4.0, 4
# Where the ambient posteriors are compared with chains, and conditioned chains with the flow.
CHECKED_LAMBDAS, CHECKED_LEVELS, TOLERANCE = (0.1, 0.4, 1.6), (3.0, 8.0, 16.0), 0.02
SHARES = (0.05, 0.95)
LAMBDAS = np.geomspace(0.02, 10.0, 80)


def make_data() -> tuple[Array, Array]:
    """Variables (7, 5) with the correlations of a Wishart matrix, and the target (7,)."""
    rng = np.random.default_rng(DATA_SEED)
    factor = rng.standard_normal((5, 10))
    factor /= np.linalg.norm(factor, axis=1, keepdims=True)
    x = rng.standard_normal((7, 10)) @ factor.T
    beta = rng.standard_normal(5)
    beta *= 5 / np.linalg.norm(beta)
    # The likelihood has the standard deviation that the noise is drawn with.
    return x, x @ beta + SIGMA * rng.standard_normal(7)


def reweighted(drawn: WeightedSamples, name: str, scale: float) -> WeightedSamples:
    """Samples of the flow at levels uniform in log t, as samples of an ambient posterior."""
    levels = np.abs(drawn.points).sum(1)
    # t^(D-1) is the area of the level set, and another t comes from levels uniform in log t.
    dim = drawn.points.shape[1]
    log_prior = -PENALTIES[name](scale * levels) + dim * np.log(levels)
    return WeightedSamples(drawn.points, drawn.log_weights + log_prior)


def run_chains(
    likelihood: GaussianLikelihood, name: str, scale: float, start: Array, steps: int, seed: int
) -> Chains:
    """Metropolis in the space of coefficients, on likelihood times exp(-h(lambda norm))."""
    penalty = PENALTIES[name]

    def log_density(beta: Array) -> Array:
        return likelihood(beta) - penalty(scale * np.abs(beta).sum(1))

    return metropolis(log_density, start, np.random.default_rng(seed), steps, steps)


def compare_ambient(
    likelihood: GaussianLikelihood, drawn: WeightedSamples, chains: int, steps: int
) -> None:
    """Print posterior means of all priors by the flow and by chains, at several lambdas."""
    print(
        "| h(s) | lambda | ESS | beta_3, flow | beta_3, chains | norm, flow | norm, chains | z |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for number, name in enumerate(PENALTIES):
        for scale in CHECKED_LAMBDAS:
            samples = reweighted(drawn, name, scale)
            start = samples.points[_draw(samples.weights, chains, number)]
            run = run_chains(likelihood, name, scale, start * 0.5, steps, number)
            flow, flow_error = _with_norm(samples).mean()
            points = np.concatenate([run.points, np.abs(run.points).sum(2, keepdims=True)], 2)
            other, other_error = Chains(points).mean()
            scores = (flow - other) / np.hypot(flow_error, other_error)
            print(
                f"| {name} | {scale:g} | {samples.effective_share:.2f} | "
                f"{_pm(flow[2], flow_error[2])} | {_pm(other[2], other_error[2])} | "
                f"{_pm(flow[-1], flow_error[-1])} | {_pm(other[-1], other_error[-1])} | "
                f"{np.abs(scores).max():.1f} |"
            )


def compare_conditioned(
    model: nfi.InjectiveNormalizingFlow,
    likelihood: GaussianLikelihood,
    drawn: WeightedSamples,
    chains: int,
    steps: int,
) -> list[Conditioned]:
    """Print moments of the chains near a norm beside those of the flow on the level set."""
    conditioned = []
    print("\n| t | h(s) | lambda | points | beta_3, chains | beta_3, flow | in band | z |")
    print("|---|---|---|---|---|---|---|---|")
    for level in CHECKED_LEVELS:
        on_level = weighted_samples(model, LEVELS, torch.full((50_000,), level))
        flow, flow_error = on_level.mean()
        low, high = weighted_quantiles(on_level.points, on_level.weights, SHARES)
        for number, name in enumerate(PENALTIES):
            scale = _likely_scale(drawn, name, level)
            start = on_level.points[_draw(on_level.weights, chains, number)]
            run = run_chains(likelihood, name, scale, start, steps, 10 + number)
            mean, error, points = run.mean_near(level, TOLERANCE, lambda beta: beta)
            inside = lambda beta: ((beta > low) & (beta < high)).astype(float)  # noqa: E731, B023
            share, share_error, _ = run.mean_near(level, TOLERANCE, inside)
            scores = (mean - flow) / np.hypot(error, flow_error)
            print(
                f"| {level:g} | {name} | {scale:.2g} | {points} | {_pm(mean[2], error[2])} | "
                f"{_pm(flow[2], flow_error[2])} | {_pm(share[2], share_error[2])} | "
                f"{np.abs(scores).max():.1f} |"
            )
            conditioned.append(Conditioned(name, level, mean, error))
    return conditioned


def _likely_scale(drawn: WeightedSamples, name: str, level: float) -> float:
    """The lambda at which a prior's posterior has most mass near a level."""
    near = np.abs(np.abs(drawn.points).sum(1) / level - 1) < TOLERANCE
    masses = [reweighted(drawn, name, scale).weights[near].sum() for scale in LAMBDAS]
    return float(LAMBDAS[int(np.argmax(masses))])


def _draw(weights: Array, num: int, seed: int) -> Array:
    return np.random.default_rng(seed).choice(len(weights), num, p=weights)


def _with_norm(samples: WeightedSamples) -> WeightedSamples:
    norms = np.abs(samples.points).sum(1, keepdims=True)
    return WeightedSamples(np.concatenate([samples.points, norms], 1), samples.log_weights)


def _pm(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}"


def ambient_bands(drawn: WeightedSamples) -> dict[str, Band]:
    """Means and quantiles of the three ambient posteriors against lambda."""
    bands = {}
    for name in PENALTIES:
        samples = [reweighted(drawn, name, scale) for scale in LAMBDAS]
        bands[name] = _band(LAMBDAS, samples)
    return bands


def _band(places: Array, samples: list[WeightedSamples]) -> Band:
    limits = [weighted_quantiles(drawn.points, drawn.weights, SHARES) for drawn in samples]
    low, high = np.stack(limits, axis=1)
    return Band(places, np.stack([drawn.mean()[0] for drawn in samples]), low, high)


def penalised_estimates(likelihood: GaussianLikelihood, path: Array) -> dict[str, Array]:
    """Penalised maximum-likelihood estimates (L, D) of all priors: points of the lasso path."""
    norms, values = np.abs(path).sum(1), likelihood(path)
    return {
        name: np.stack([path[np.argmax(values - h(scale * norms))] for scale in LAMBDAS])
        for name, h in PENALTIES.items()
    }


def lasso_points(x: Array, y: Array) -> Array:
    """Points (N, D) of the lasso path, which is linear between the knots of the algorithm."""
    knots = lars_path(x, y, method="lasso")[2].T
    norms = np.abs(knots).sum(1)
    fine = np.linspace(0, norms[-1], 4001)
    return np.stack([np.interp(fine, norms, knots[:, k]) for k in range(knots.shape[1])], axis=1)


def main() -> None:
    """Train, print the comparisons and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the figure")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    # So small a network gains nothing from more threads, and on a busy machine they slow it down.
    torch.set_num_threads(1)

    x, y = make_data()
    likelihood = GaussianLikelihood.of_regression(x, y, SIGMA)
    model = level_set_flow(likelihood, LEVELS, num_layers=2 if options.quick else 4)
    start = time.process_time()
    steps = 80 if options.quick else options.steps
    train(model, LEVELS, steps, linear_share=0.3)
    print(f"trained in {time.process_time() - start:.0f} s of processor time\n")

    chains, length = (200, 400) if options.quick else (1000, 6000)
    drawn = weighted_samples(model, LEVELS, LEVELS.draw(8_000 if options.quick else 200_000, 0.0))
    compare_ambient(likelihood, drawn, chains, length)
    conditioned = compare_conditioned(model, likelihood, drawn, chains, length)
    grid = np.linspace(0.1, 24.0, 60)
    on_levels = [weighted_samples(model, LEVELS, torch.full((4000,), t)) for t in grid]
    path = lasso_points(x, y)
    file = options.out / "objective_bayes.png"
    estimates = penalised_estimates(likelihood, path)
    draw(ambient_bands(drawn), _band(grid, on_levels), estimates, path, conditioned, file)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()

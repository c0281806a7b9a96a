r"""The Bayesian lasso path: one flow for the posterior on every level set of the l_1 norm.

    python examples/lasso_path.py [--steps 3000] [--quick] [--out out]

Linear regression on the diabetes data that come with scikit-learn: 442 patients, 10 standardised
variables, noise of standard deviation 0.7. The lasso path shows one point for each level
t = ||beta||_1; here one conditional flow on the level sets, trained once, gives the posterior for
every t between 0.1 and 4, and the evidence Z(t): how well coefficients of that norm explain the
data. The prior on a level set is the uniform law by area, which for this norm is also what every
prior that depends on beta only through its norm leaves when it is conditioned on the norm. The
script prints how good the flow is at several levels, beside independent estimates of the
evidence and of the posterior means, and draws means and credible bands beside the paths of lasso
and ridge. Setting of arXiv 2406.09116. With --quick everything is too short to be good.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LassoCV
from support.lasso_figure import PosteriorPath, draw
from support.level_set_oracles import Reference, anneal, gaussian_reference, uniform_evidence
from support.level_sets import (
    Array,
    GaussianLikelihood,
    LevelRange,
    weighted_quantiles,
    weighted_samples,
)
from torch import Tensor
from tqdm import trange

import normflows_injective as nfi
from normflows_injective.flows.gauges import LpGauge

LEVELS, SIGMA = LevelRange(0.1, 4.0), 0.7
CHECKED = (0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
# Where the norm of a Gaussian vector with the likelihood's law has draws enough.
GAUSSIAN_FROM = 1.25


def load() -> tuple[Array, Array, list[str]]:
    """Standardised variables (442, 10) and target (442,), and the names of the variables."""
    data = load_diabetes()
    x = (data.data - data.data.mean(0)) / data.data.std(0)
    return x, (data.target - data.target.mean()) / data.target.std(), list(data.feature_names)


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


def follow(model: nfi.InjectiveNormalizingFlow, levels: Array, samples: int) -> PosteriorPath:
    """Weighted samples of the flow at each level, summarised."""
    rows = []
    for level in levels:
        drawn = weighted_samples(model, LEVELS, torch.full((samples,), float(level)))
        summary = drawn.truncated()
        low, high = weighted_quantiles(summary.points, summary.weights, (0.05, 0.95))
        rows.append((summary.mean()[0], low, high, drawn.log_evidence, drawn.standard_error))
    return PosteriorPath(levels, *(np.array(column) for column in zip(*rows, strict=True)))


def check(
    model: nfi.InjectiveNormalizingFlow, likelihood: GaussianLikelihood, quick: bool
) -> dict[float, Reference]:
    """Print the flow's quality at several levels; return the best reference for each."""
    rng = np.random.default_rng(0)
    samples, draws = (2000, 10**5) if quick else (50_000, 10**6)
    references = {}
    print("| t | ESS | KL, nats | log Z, flow | log Z, annealed | log Z, Gaussian | means |")
    print("|---|---|---|---|---|---|---|")
    for level in CHECKED:
        drawn = weighted_samples(model, LEVELS, torch.full((samples,), level))
        reference = anneal(likelihood, level, rng, runs=2 if quick else 10)
        cells = [_pm(drawn.log_evidence, drawn.standard_error), _pm(*reference[:2]), "–"]
        if level >= GAUSSIAN_FROM:
            reference = gaussian_reference(likelihood, level, draws, rng)
            cells[2] = _pm(*reference[:2])
        mean, error = drawn.mean()
        difference = np.abs(mean - reference.mean)
        scores = difference / np.hypot(error, reference.mean_error)
        largest = int(scores.argmax())
        deviation = math.sqrt(drawn.weights @ np.square(drawn.points - mean)[:, largest])
        references[level] = reference
        print(
            f"| {level:g} | {drawn.effective_share:.2f} | {drawn.divergence:.2f} | "
            f"{' | '.join(cells)} | {difference[largest] / deviation:.3f} sd, "
            f"z {scores[largest]:.1f} |"
        )
    estimate, error, effective = uniform_evidence(likelihood, LEVELS.low, draws, rng)
    print(
        f"\nlog Z({LEVELS.low:g}) from {draws} draws of the uniform law: {_pm(estimate, error)}, "
        f"{effective:.0f} effective draws"
    )
    return references


def _pm(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}"


def main() -> None:
    """Train, print the checks and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the figure")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    # So small a network gains nothing from more threads, and on a busy machine they slow it down.
    torch.set_num_threads(1)

    x, y, names = load()
    likelihood = GaussianLikelihood.of_regression(x, y, SIGMA)
    model = level_set_flow(likelihood, LEVELS, num_layers=2 if options.quick else 6)
    start = time.process_time()
    train(model, LEVELS, steps=60 if options.quick else options.steps)
    print(f"trained in {time.process_time() - start:.0f} s of processor time\n")
    references = check(model, likelihood, options.quick)

    grid = np.geomspace(LEVELS.low, LEVELS.high, 12 if options.quick else 80)
    path = follow(model, grid, samples=1000 if options.quick else 8000)
    best = int(path.log_evidence.argmax())
    print(f"log Z is greatest, {path.log_evidence[best]:.2f}, at t = {grid[best]:.2f}")
    chosen = float(np.abs(LassoCV(cv=10).fit(x, y).coef_).sum())
    print(f"the lasso by 10-fold cross-validation has t = {chosen:.2f}")
    file = options.out / "lasso_path.png"
    draw(path, references, x, y, names, chosen, file)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()

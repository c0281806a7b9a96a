r"""The Bayesian lasso path: one flow for the posterior on every level set of the l_1 norm.

    python examples/lasso_path.py [--steps 3000] [--quick] [--out out]

Linear regression on the diabetes data that come with scikit-learn: 442 patients, 10 standardised
variables, noise of standard deviation 0.7. The lasso path shows one point for each level
t = ||beta||_1; here one conditional flow on the level sets, trained once, gives the posterior for
every t between 0.1 and 4, and the evidence Z(t): how well coefficients of that norm explain the
data. The script prints how good the flow is at several levels, beside independent estimates of the
evidence and of the posterior means, and draws means and credible bands beside the paths of lasso
and ridge. Setting of arXiv 2406.09116. With --quick everything is too short to be good.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LassoCV, lars_path
from support.level_set_oracles import Reference, anneal, gaussian_reference, uniform_evidence
from support.level_sets import (
    Array,
    GaussianLikelihood,
    LevelRange,
    level_set_flow,
    train,
    weighted_quantiles,
    weighted_samples,
)

import normflows_injective as nfi

LEVELS, SIGMA = LevelRange(0.1, 4.0), 0.7
CHECKED = (0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
# Where the norm of a Gaussian vector with the likelihood's law has draws enough.
GAUSSIAN_FROM = 1.25
MEANINGS = {
    "bp": "blood pressure",
    "s1": "s1, total cholesterol",
    "s2": "s2, LDL",
    "s3": "s3, HDL",
    "s4": "s4, cholesterol / HDL",
    "s5": "s5, log triglycerides",
    "s6": "s6, blood sugar",
}
FLOW, LASSO, RIDGE = "#1f4e9c", "#c8102e", "0.4"


class PosteriorPath(NamedTuple):
    """What the flow says at levels (T,): moments (T, D) and log-evidence (T,)."""

    levels: Array
    mean: Array
    low: Array
    high: Array
    log_evidence: Array
    standard_error: Array


def load() -> tuple[Array, Array, list[str]]:
    """Standardised variables (442, 10) and target (442,), and the names of the variables."""
    data = load_diabetes()
    x = (data.data - data.data.mean(0)) / data.data.std(0)
    return x, (data.target - data.target.mean()) / data.target.std(), list(data.feature_names)


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


def draw(
    path: PosteriorPath, references: dict[float, Reference], file: Path, chosen: float
) -> None:
    """One panel for each coefficient against the level, and the evidence below."""
    x, y, names = load()
    lasso = lars_path(x, y, method="lasso")[2]  # its corners; it is linear between them
    scales = np.logspace(-2, 6, 300)
    ridge = np.stack(
        [np.linalg.solve(x.T @ x + s * np.eye(x.shape[1]), x.T @ y) for s in scales], axis=1
    )
    figure = plt.figure(figsize=(12, 9), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(2.0, 1.1))
    axes = upper.subplots(2, 5, sharex=True)
    for k, axis in enumerate(axes.flat):
        axis.axhline(0, color="0.8", linewidth=0.8)
        axis.fill_between(
            path.levels,
            path.low[:, k],
            path.high[:, k],
            color=FLOW,
            alpha=0.22,
            linewidth=0,
            label="flow: 90 % credible band",
        )
        axis.plot(path.levels, path.mean[:, k], color=FLOW, label="flow: posterior mean")
        for points, colour, style, label in (
            (lasso, LASSO, "--", "lasso (points)"),
            (ridge, RIDGE, ":", "ridge (points)"),
        ):
            norms = np.abs(points).sum(0)
            axis.plot(norms, points[k], style, color=colour, linewidth=1.4, label=label)
        axis.set_title(MEANINGS.get(names[k], names[k]), fontsize=11)
        axis.set_xlim(0, LEVELS.high)
        axis.margins(y=0.12)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    upper.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    upper.supxlabel(r"level $t = \|\beta\|_1$", fontsize=11)
    upper.supylabel("standardised coefficient", fontsize=11)
    _draw_evidence(lower.subplots(), path, references, chosen)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _draw_evidence(
    axis: Axes, path: PosteriorPath, references: dict[float, Reference], chosen: float
) -> None:
    best = int(path.log_evidence.argmax())
    top = path.log_evidence[best]
    relative = path.log_evidence - top
    axis.plot(path.levels, relative, color=FLOW, label="flow, importance sampling")
    error = 2 * path.standard_error
    axis.fill_between(path.levels, relative - error, relative + error, color=FLOW, alpha=0.3)
    for level, reference in references.items():
        axis.errorbar(
            level,
            reference.log_evidence - top,
            2 * reference.standard_error,
            fmt="o",
            color="k",
            ms=5,
            label="independent estimates" if level == CHECKED[0] else None,
        )
    for level, colour, align, aside, text in (
        (path.levels[best], FLOW, "left", 6, "most evidence"),
        (chosen, LASSO, "right", -30, "lasso by cross-validation"),
    ):
        axis.axvline(level, color=colour, linewidth=1, linestyle="--")
        axis.annotate(
            f"{text}\nt = {level:.2f}",
            (level, -11.5 if align == "left" else -1.5),
            xytext=(aside, 0),
            textcoords="offset points",
            ha=align,
            color=colour,
        )
    axis.set(xlim=(0, LEVELS.high), ylim=(-14, 1), xlabel=r"level $t$")
    axis.set_ylabel(r"$\log Z(t) - \max \log Z$, nats")
    axis.legend(loc="upper right", frameon=False)


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

    x, y, _ = load()
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
    draw(path, references, file, chosen)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()

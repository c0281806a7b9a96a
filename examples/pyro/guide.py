r"""Guides along curved posteriors: AutoInjective beside Pyro's, on a banana and on a horseshoe.

    python examples/pyro/guide.py [--steps 3000] [--quick] [--out out]

* A banana in 20 dimensions: x_1 ~ N(0, 3), x_2 ~ N(x_1^2 / 2, 0.03), and 18 coordinates with the
  covariance I + 2.8 1 1^T. It is normalised, so the log-evidence is zero.
* Linear regression with a horseshoe prior on the diabetes data of scikit-learn (442 patients, ten
  standardised variables): coefficients tau lambda_j z_j with half-Cauchy tau and lambda, 22
  latents whose posterior has a funnel for every coefficient that the data leave near zero.

Every guide gets the same steps, particles and learning rate. The table gives the evidence bound,
the shape k of the importance weights by Pareto smoothing (below 0.7 the guide's draws can be
reweighted to the posterior), and seconds. The figure shows the bend of the banana with draws of
the guides. With --quick everything is too short to be good.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
)
from pyro.infer.importance import psis_diagnostic
from sklearn.datasets import load_diabetes
from torch import Tensor

import normflows_injective.pyro as nfp

PARTICLES, LEARNING_RATE, DIM = 32, 1e-2, 20
Model = Callable[[], Any]
GUIDES: dict[str, Callable[[Model], Any]] = {
    "AutoLowRankMultivariateNormal": lambda model: AutoLowRankMultivariateNormal(model, rank=2),
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoIAFNormal": lambda model: AutoIAFNormal(model, hidden_dim=[64, 64], num_transforms=2),
    "nfp.AutoFlow": nfp.AutoFlow,
    "nfp.AutoInjective": lambda model: nfp.AutoInjective(model, rank=5),
}


class Row(NamedTuple):
    """Scores of a guide, and draws (n, D) of its unconstrained latents."""

    bound: float
    pareto_k: float
    seconds: float
    samples: dict[str, Tensor]


def banana() -> None:
    """The bend and its eighteen companions; log-evidence zero."""
    first = pyro.sample("x1", dist.Normal(0.0, 3.0))
    pyro.sample("x2", dist.Normal(0.5 * first**2, 0.03))
    covariance = torch.eye(DIM - 2) + 2.8
    pyro.sample("others", dist.MultivariateNormal(torch.zeros(DIM - 2), covariance))


def horseshoe() -> Callable[[], None]:
    """Regression on the diabetes data."""
    data = load_diabetes()
    x = torch.as_tensor((data.data - data.data.mean(0)) / data.data.std(0)).float()
    y = torch.as_tensor((data.target - data.target.mean()) / data.target.std()).float()

    def model() -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        local = pyro.sample("lambda", dist.HalfCauchy(torch.ones(x.shape[1])).to_event(1))
        z = pyro.sample("z", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        coefficients = tau.unsqueeze(-1) * local * z
        mean = coefficients @ x.T
        likelihood = dist.Normal(mean, sigma.unsqueeze(-1)).to_event(1)
        pyro.sample("y", likelihood, obs=y)

    return model


def run(model: Model, build: Callable[[Model], Any], steps: int, draws: int) -> Row:
    """Train a guide and judge it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = build(model)
    began = time.perf_counter()
    elbo = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=0)
    decay = 0.1 ** (1 / max(steps, 1))
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": LEARNING_RATE, "lrd": decay}), elbo)
    for _ in range(steps):
        svi.step()
    seconds = time.perf_counter() - began
    many = Trace_ELBO(num_particles=draws, vectorize_particles=True, max_plate_nesting=0)
    with torch.no_grad():
        bound = -many.loss(model, guide)
        pareto_k = psis_diagnostic(model, guide, num_particles=draws, max_plate_nesting=0)
        samples = [guide() for _ in range(draws // 20)]
    drawn = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    return Row(float(bound), float(pareto_k), seconds, drawn)


def draw(path: Path, rows: dict[str, Row]) -> None:
    """The bend, and draws of the guides."""
    figure, axes = plt.subplots(1, len(rows), figsize=(2.6 * len(rows), 2.8), sharey=True)
    bend = torch.linspace(-9, 9, 200).numpy()
    for axis, (name, row) in zip(axes, rows.items(), strict=True):
        axis.plot(bend, 0.5 * bend**2, color="0.7", lw=1)
        axis.plot(row.samples["x1"].numpy(), row.samples["x2"].numpy(), ".", ms=2, color="#1f4e9c")
        axis.set_title(name.replace("MultivariateNormal", "MVN"), fontsize=9)
        axis.set_xlim(-9, 9)
        axis.set_ylim(-4, 30)
        axis.set_xlabel("$x_1$")
    axes[0].set_ylabel("$x_2$")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    if options.quick:
        options.steps = 10
    draws = 500 if options.quick else 10_000

    targets: dict[str, Model] = {"banana": banana, "horseshoe": horseshoe()}
    for target, model in targets.items():
        rows = {name: run(model, build, options.steps, draws) for name, build in GUIDES.items()}
        print(f"\n{target}: {options.steps} steps of {PARTICLES} particles\n")
        print("| guide | evidence bound, nats | Pareto k | seconds |")
        print("|---|---|---|---|")
        for name, row in rows.items():
            print(f"| {name} | {row.bound:.2f} | {row.pareto_k:.2f} | {row.seconds:.0f} |")
        if target == "banana":
            draw(options.out / "pyro_guide.png", rows)
    print(f"\nFigure: {options.out / 'pyro_guide.png'}")


if __name__ == "__main__":
    main()

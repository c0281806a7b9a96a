r"""Mixture weights: a posterior on the simplex, by guides in two charts and by NUTS.

    python examples/pyro/simplex.py [--steps 1500] [--samples 500] [--quick] [--out out]

Sixty numbers come from a mixture of five known normal laws, three of which overlap; the weights
are unknown, with a Dirichlet prior of concentration 0.8, and the labels are summed out. The
posterior leans on faces of the simplex, where a normal law in stick-breaking coordinates fits
badly. The script trains

* Pyro's AutoNormal and AutoMultivariateNormal, on Pyro's stick-breaking chart;
* Pyro's Dirichlet;
* nfp.AutoFlow, on the same chart;
* splines on the chart SimplexStickBreaking("normal"), which sends the standard normal to the flat
  Dirichlet law, as a TransformedDistribution of nfp.FlowTransform;

and runs NUTS on that chart by nfp.ManifoldReparam. Judged by an evidence and posterior means from
importance sampling with two million draws of the prior. All densities are against the measure of
the first four weights, as Pyro's Dirichlet is. With --quick everything is too short to be good.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

import normflows_injective as nfi
import normflows_injective.pyro as nfp

K, NUM_DATA, CONCENTRATION, PARTICLES = 5, 60, 0.8, 16
LOCATIONS = torch.tensor([-2.0, -0.6, 0.0, 0.6, 2.5])
SCALES = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.7])
TRUTH = torch.tensor([0.30, 0.05, 0.30, 0.05, 0.30])
NAMES = {
    "auto_normal": "AutoNormal",
    "auto_mvn": "AutoMultivariateNormal",
    "dirichlet": "Dirichlet",
    "auto_flow": "nfp.AutoFlow",
    "normal_chart": "splines on SimplexStickBreaking('normal')",
    "nuts": "NUTS by nfp.ManifoldReparam",
}
Guide = Callable[..., object]


class Reference(NamedTuple):
    """Evidence with its standard error, and posterior means (K,)."""

    log_evidence: float
    standard_error: float
    mean: Tensor


class Posterior(NamedTuple):
    """Answer of a method: samples (n, K), evidence bound or None, seconds."""

    samples: Tensor
    bound: float | None
    seconds: float


def simulate(seed: int = 1) -> Tensor:
    """Data (N,) of the mixture."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(TRUTH, NUM_DATA, replacement=True, generator=generator)
    noise = torch.randn(NUM_DATA, generator=generator)
    return LOCATIONS[labels] + SCALES[labels] * noise


def log_likelihood(weights: Tensor, data: Tensor) -> Tensor:
    """Log-likelihood (*) of weights (*, K), labels summed out."""
    parts = torch.distributions.Normal(LOCATIONS, SCALES).log_prob(data.unsqueeze(1))
    return (weights.log().unsqueeze(-2) + parts).logsumexp(-1).sum(-1)


def mixture_model(data: Tensor) -> Tensor:
    """Dirichlet prior, mixture likelihood."""
    weights: Tensor = pyro.sample("weights", dist.Dirichlet(torch.full((K,), CONCENTRATION)))
    pyro.factor("data", log_likelihood(weights, data))
    return weights


def importance(data: Tensor, draws: int) -> Reference:
    """Evidence and means by draws of the prior, which knows nothing of any guide."""
    generator = torch.Generator().manual_seed(2)
    gamma = torch._standard_gamma(torch.full((draws, K), CONCENTRATION), generator=generator)
    weights = gamma / gamma.sum(1, keepdim=True)
    weights = weights.clamp_min(torch.finfo(weights.dtype).tiny)
    scores = torch.cat([log_likelihood(part, data) for part in weights.split(20_000)]).double()
    top = scores.max()
    relative = (scores - top).exp()
    mean = relative.mean()
    error = float(relative.std() / mean) / math.sqrt(draws)
    posterior_mean = (relative.unsqueeze(1) * weights).sum(0) / relative.sum()
    return Reference(float(top + mean.log()), error, posterior_mean)


def dirichlet_guide(data: Tensor) -> None:
    """Pyro's Dirichlet with trained concentrations."""
    concentration = pyro.param(
        "concentration", torch.full((K,), 4.0), constraint=dist.constraints.positive
    )
    pyro.sample("weights", dist.Dirichlet(concentration))


def chart_guide() -> Guide:
    """Splines of normflows that end in a chart of the simplex."""
    layers = [*nfp.flows.splines(K - 1), nfi.flows.SimplexStickBreaking(K)]
    to_simplex = nfp.FlowTransform(layers)
    base = dist.Normal(torch.zeros(K - 1), 1.0).to_event(1)

    def guide(data: Tensor) -> None:
        nfp.module("to_simplex", to_simplex)
        pyro.sample("weights", dist.TransformedDistribution(base, to_simplex))

    return guide


def run_nuts(data: Tensor, samples: int) -> Posterior:
    """One chain in the chart."""
    began = time.perf_counter()
    chart = nfp.FlowTransform(nfi.flows.SimplexStickBreaking(K))
    model = poutine.reparam(mixture_model, config={"weights": nfp.ManifoldReparam(chart)})
    chain = MCMC(
        NUTS(model),
        num_samples=samples,
        warmup_steps=max(10, samples // 2),
        disable_progbar=True,
    )
    chain.run(data)
    weights = chart(chain.get_samples()["weights_coordinates"])
    return Posterior(weights, None, time.perf_counter() - began)


def run_svi(guide: Guide, data: Tensor, steps: int) -> Posterior:
    """Train a guide, and draw from it."""
    began = time.perf_counter()
    elbo = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=0)
    decay = 0.05 ** (1 / max(steps, 1))
    svi = SVI(mixture_model, guide, pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": decay}), elbo)
    for _ in range(steps):
        svi.step(data)
    seconds = time.perf_counter() - began
    many = Trace_ELBO(num_particles=10_000, vectorize_particles=True, max_plate_nesting=0)
    with torch.no_grad():
        bound = -many.loss(mixture_model, guide, data)
        drawn = Predictive(mixture_model, guide=guide, num_samples=4000, parallel=True)(data)
    return Posterior(drawn["weights"].reshape(-1, K), float(bound), seconds)


def draw(path: Path, results: dict[str, Posterior]) -> None:
    """Marginals of the weights, by method."""
    shown = [name for name in ("nuts", "auto_mvn", "normal_chart") if name in results]
    colours = dict(zip(shown, ("0.75", "#c8102e", "#1f4e9c"), strict=False))
    figure, axes = plt.subplots(1, K, figsize=(11, 2.4), sharey=True)
    bins = torch.linspace(0, 0.6, 41).numpy()
    for k, axis in enumerate(axes):
        for name in shown:
            filled = "stepfilled" if name == "nuts" else "step"
            values = results[name].samples[:, k].detach().numpy()
            label = NAMES[name] if k == 0 else None
            axis.hist(
                values, bins, density=True, histtype=filled, color=colours[name], label=label
            )
        axis.axvline(float(TRUTH[k]), color="k", lw=0.8, ls=":")
        axis.set_xlabel(f"weight {k + 1}")
        axis.set_yticks([])
    figure.legend(loc="upper center", ncol=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.9))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    if options.quick:
        options.steps, options.samples = 20, 20

    data = simulate()
    reference = importance(data, 20_000 if options.quick else 2_000_000)
    guides: dict[str, Callable[[], Guide]] = {
        "auto_normal": lambda: AutoNormal(mixture_model),
        "auto_mvn": lambda: AutoMultivariateNormal(mixture_model),
        "dirichlet": lambda: dirichlet_guide,
        "auto_flow": lambda: nfp.AutoFlow(mixture_model),
        "normal_chart": chart_guide,
    }
    results: dict[str, Posterior] = {}
    for name in NAMES:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        if name == "nuts":
            results[name] = run_nuts(data, options.samples)
        else:
            results[name] = run_svi(guides[name](), data, options.steps)

    error = reference.standard_error
    print(f"\nLog-evidence by importance: {reference.log_evidence:.3f} +- {error:.3f}\n")
    print("| method | evidence gap, nats | largest error of a mean | seconds |")
    print("|---|---|---|---|")
    for name, posterior in results.items():
        bound = posterior.bound
        gap = "-" if bound is None else f"{reference.log_evidence - bound:.3f}"
        distance = float((posterior.samples.mean(0) - reference.mean).abs().max())
        print(f"| {NAMES[name]} | {gap} | {distance:.4f} | {posterior.seconds:.0f} |")
    path = options.out / "pyro_simplex.png"
    draw(path, results)
    print(f"\nFigure: {path}")


if __name__ == "__main__":
    main()

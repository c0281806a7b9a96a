r"""A spline flow of normflows as a prior and as a guide in one Pyro model.

    python examples/pyro/bridge.py [--steps 1500] [--quick] [--out out]

1. A rational-quadratic spline flow learns two interleaved half circles (scikit-learn's moons) in
   normflows' own loop, ``model.forward_kld``.
2. ``nfp.FlowDistribution`` makes it the prior of a Pyro model: an unknown point of the moons is
   seen through one noisy linear measurement, y = 0.6 x_1 - 0.8 x_2 + noise of deviation 0.1.
3. Another spline flow of normflows, a copy of the prior at first, is the guide of that posterior,
   which lies on both moons, and ``Trace_ELBO`` trains it; the likelihood is raised to its power
   gradually, so that neither moon is lost. Beside it AutoMultivariateNormal, and NUTS.

Evidence and posterior are known by quadrature of the prior on a grid. The script prints the gaps
and draws prior, posterior and guides. With --quick everything is too short to be good.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import normflows as nf
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from sklearn.datasets import make_moons
from torch import Tensor

import normflows_injective.pyro as nfp

DIRECTION, NOISE, OBSERVED = torch.tensor([0.6, -0.8]), 0.1, torch.tensor(0.2)
BATCH, PARTICLES = 256, 64
Guide = Callable[..., object]


class Grid(NamedTuple):
    """Cells of the plane: midpoints (G, 2), the area of one, and the sides of the picture."""

    points: Tensor
    area: float
    extent: tuple[float, float, float, float]
    size: int


class Posterior(NamedTuple):
    """Answer of a method: samples (n, 2), evidence bound or None, seconds."""

    samples: Tensor
    bound: float | None
    seconds: float


def spline_flow(layers: int = 6) -> nf.NormalizingFlow:
    """Spline couplings with LU linear maps, as in normflows' examples."""
    flows: list[nf.flows.Flow] = []
    for layer in range(layers):
        flows.append(
            nf.flows.CoupledRationalQuadraticSpline(
                2, 2, 64, tail_bound=4.0, reverse_mask=layer % 2 == 1
            )
        )
        flows.append(nf.flows.LULinearPermute(2))
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(2, trainable=False), flows)


def learn_moons(steps: int) -> nf.NormalizingFlow:
    """The loop of normflows' README."""
    model = spline_flow()
    points, _ = make_moons(20_000, noise=0.07, random_state=0)
    data = torch.as_tensor((points - points.mean(0)) / points.std(0), dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        loss = model.forward_kld(data[torch.randint(len(data), (BATCH,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    # Learned; the posterior must not teach it.
    return model.requires_grad_(False).eval()


def measured(prior: nf.NormalizingFlow) -> Callable[..., Tensor]:
    """The Pyro model."""

    def model(weight: float = 1.0) -> Tensor:
        x: Tensor = pyro.sample("x", nfp.FlowDistribution(prior))
        with pyro.poutine.scale(scale=weight):
            pyro.sample("y", dist.Normal((x * DIRECTION).sum(-1), NOISE), obs=OBSERVED)
        return x

    return model


def flow_guide(prior: nf.NormalizingFlow) -> Guide:
    """A second flow as the guide, which starts as a copy of the prior and so knows both moons."""
    flow = deepcopy(prior).requires_grad_(True).train()
    flow.q0.requires_grad_(False)

    def guide(weight: float = 1.0) -> None:
        nfp.module("guide_flow", flow)
        pyro.sample("x", nfp.FlowDistribution(flow))

    return guide


def plane(size: int = 400, half: float = 3.0) -> Grid:
    """A square of cells."""
    ticks = (torch.arange(size) + 0.5) / size * 2 * half - half
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    points = torch.stack([x.flatten(), y.flatten()], dim=1)
    return Grid(points, (2 * half / size) ** 2, (-half, half, -half, half), size)


def run_svi(model: Callable[..., Tensor], guide: Guide, steps: int) -> Posterior:
    """Train a guide, the likelihood raised from a hundredth to its power, and draw from it."""
    began = time.perf_counter()
    elbo = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=0)
    decay = 0.05 ** (1 / max(steps, 1))
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 3e-3, "lrd": decay}), elbo)
    for step in range(steps):
        svi.step(0.01 ** max(0.0, 1.0 - step / (0.6 * steps)))
    seconds = time.perf_counter() - began
    many = Trace_ELBO(num_particles=10_000, vectorize_particles=True, max_plate_nesting=0)
    with torch.no_grad():
        bound = -many.loss(model, guide)
        drawn = Predictive(model, guide=guide, num_samples=2000, parallel=True)()
    return Posterior(drawn["x"].reshape(-1, 2), float(bound), seconds)


def run_nuts(model: Callable[..., Tensor], samples: int) -> Posterior:
    """One chain; the prior's density is differentiated through the inverse of the flow."""
    began = time.perf_counter()
    chain = MCMC(NUTS(model), num_samples=samples, warmup_steps=samples // 2, disable_progbar=True)
    chain.run()
    return Posterior(chain.get_samples()["x"], None, time.perf_counter() - began)


def draw(
    path: Path, grid: Grid, prior: Tensor, posterior: Tensor, results: dict[str, Posterior]
) -> None:
    """Prior, posterior, and draws of the methods."""
    figure, axes = plt.subplots(1, 2 + len(results), figsize=(3 * (2 + len(results)), 3.3))
    for axis, density, title in zip(
        axes[:2], (prior, posterior), ("prior: a flow", "posterior by quadrature"), strict=True
    ):
        axis.imshow(
            density.view(grid.size, -1).numpy(), origin="lower", extent=grid.extent, cmap="Blues"
        )
        axis.set_title(title, fontsize=9)
    for axis, (name, result) in zip(axes[2:], results.items(), strict=True):
        axis.imshow(
            posterior.view(grid.size, -1).numpy(), origin="lower", extent=grid.extent, cmap="Blues"
        )
        axis.plot(*result.samples[:600].T.numpy(), ".", ms=1.5, color="#c8102e")
        axis.set_title(name, fontsize=9)
    for axis in axes:
        axis.set_xlim(-2.2, 2.2)
        axis.set_ylim(-2.2, 2.2)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    if options.quick:
        options.steps, options.samples = 20, 10

    torch.manual_seed(0)
    prior, grid = learn_moons(options.steps), plane(100 if options.quick else 400)
    model = measured(prior)
    with torch.no_grad():
        log_prior = torch.cat(
            [nfp.FlowDistribution(prior).log_prob(part) for part in grid.points.split(20_000)]
        )
    likelihood = torch.distributions.Normal(grid.points @ DIRECTION, NOISE).log_prob(OBSERVED)
    log_joint = log_prior + likelihood
    log_evidence = float(log_joint.double().logsumexp(0)) + math.log(grid.area)
    mass = float(log_prior.double().logsumexp(0).exp()) * grid.area
    posterior = (log_joint - log_evidence).exp()
    mean = (posterior.unsqueeze(1) * grid.points).sum(0) * grid.area

    results: dict[str, Posterior] = {}
    for name, build in (
        ("AutoMultivariateNormal", lambda: AutoMultivariateNormal(model)),
        ("normflows guide", lambda: flow_guide(prior)),
    ):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        results[name] = run_svi(model, build(), options.steps)
    pyro.set_rng_seed(0)
    results["NUTS"] = run_nuts(model, options.samples)

    print(f"\nMass of the prior on the grid: {mass:.4f}")
    print(f"Log-evidence by quadrature: {log_evidence:.4f}\n")
    print("| method | evidence gap, nats | distance of the mean | seconds |")
    print("|---|---|---|---|")
    for name, result in results.items():
        gap = "-" if result.bound is None else f"{log_evidence - result.bound:.3f}"
        distance = float((result.samples.mean(0) - mean).norm())
        print(f"| {name} | {gap} | {distance:.3f} | {result.seconds:.0f} |")
    path = options.out / "pyro_bridge.png"
    draw(path, grid, log_prior.exp(), posterior, results)
    print(f"\nFigure: {path}")


if __name__ == "__main__":
    main()

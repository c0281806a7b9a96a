r"""An unknown axis on the sphere: NUTS and SVI on a site that Pyro itself refuses.

    python examples/pyro/sphere.py [--steps 1500] [--samples 600] [--quick] [--out out]

Ten directions scatter about an axis, of which it is not known which end is which (grains of a
rock, fibres, undirected lines). With a uniform prior of the axis mu and the likelihood of Watson,

    p(x | mu) = exp(kappa (mu . x)^2) / M(kappa),      kappa = 4,

the posterior has two equal modes, mu and -mu. A guide that meets both while the likelihood is weak
keeps both, so its power is raised from a tenth to one over the first 60 % of the training. The
script asks for the evidence, the orientation matrix E[mu mu^T] and the share of each end, by
quadrature on the sphere and by

* NUTS, which reaches the site through its registered chart;
* Pyro's AutoNormal, and AutoFlow, through the same chart;
* a flow of the package on the sphere as the guide;
* Pyro's ProjectedNormal as the guide,

prints a table and draws the posterior on a map. With --quick everything is too short to be good.
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
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import normflows_injective as nfi
import normflows_injective.pyro as nfp

KAPPA, NUM_DIRECTIONS, PARTICLES = 4.0, 10, 256
AXIS = torch.tensor([0.48, 0.6, 0.64])
# Learning rates with which each kind of guide converges.
RATES = {"auto_normal": 1e-2, "projected_normal": 5e-2, "auto_flow": 3e-3, "flow": 3e-3}
NAMES = {
    "nuts": "NUTS on the registered chart",
    "auto_normal": "AutoNormal on the registered chart",
    "projected_normal": "ProjectedNormal",
    "auto_flow": "nfp.AutoFlow on the registered chart",
    "flow": "nfp.FlowDistribution of star_like_flow",
}


class Grid(NamedTuple):
    """Points of the sphere (G, 3), in latitude and longitude, with their areas (G,)."""

    points: Tensor
    area: Tensor
    latitude: Tensor
    longitude: Tensor


class Posterior(NamedTuple):
    """Answer of a method: samples (n, 3), evidence bound or None, seconds."""

    samples: Tensor
    bound: float | None
    seconds: float


def sphere_grid(rows: int = 180) -> Grid:
    """Midpoints of cells of equal angles."""
    latitude = (torch.arange(rows) + 0.5) / rows * math.pi - math.pi / 2
    longitude = (torch.arange(2 * rows) + 0.5) / rows * math.pi - math.pi
    phi, theta = (t.flatten() for t in torch.meshgrid(latitude, longitude, indexing="ij"))
    points = torch.stack([phi.cos() * theta.cos(), phi.cos() * theta.sin(), phi.sin()], dim=1)
    return Grid(points, phi.cos() * (math.pi / rows) ** 2, latitude, longitude)


def log_normaliser() -> Tensor:
    """Log of Watson's normaliser: the integral of exp(kappa t^2), t in (-1, 1), times 2 pi."""
    t = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    return (2 * math.pi * torch.trapezoid((KAPPA * t.square()).exp(), t)).log().float()


def log_likelihood(mu: Tensor, directions: Tensor) -> Tensor:
    """Log-likelihood (*) of axes (*, 3)."""
    along = (mu @ directions.T).square().sum(-1)
    return KAPPA * along - len(directions) * log_normaliser()


def scatter(seed: int = 0) -> Tensor:
    """Directions drawn by Watson's law about AXIS, by rejection."""
    generator = torch.Generator().manual_seed(seed)
    proposals = torch.randn(100_000, 3, generator=generator)
    proposals = proposals / proposals.norm(dim=1, keepdim=True)
    keep = torch.rand(len(proposals), generator=generator).log() < KAPPA * (
        (proposals @ AXIS).square() - 1
    )
    return proposals[keep][:NUM_DIRECTIONS]


def axis_model(directions: Tensor, weight: float = 1.0) -> Tensor:
    """Uniform prior of the axis, Watson's likelihood to some power."""
    prior = nfp.SurfaceDistribution(nfi.distributions.UniformSphere(3))
    mu: Tensor = pyro.sample("mu", prior)
    pyro.factor("directions", weight * log_likelihood(mu, directions))
    return mu


def projected_normal_guide(directions: Tensor, weight: float = 1.0) -> None:
    """Pyro's law of a normalised normal vector."""
    concentration = pyro.param("concentration", torch.tensor([0.1, 0.1, 1.0]))
    pyro.sample("mu", dist.ProjectedNormal(concentration))


def flow_guide() -> Callable[..., None]:
    """A flow on the sphere, which starts at the uniform law."""
    flow = nfi.flows.star_like_flow(3, num_layers=4)

    def guide(directions: Tensor, weight: float = 1.0) -> None:
        nfp.module("axis_flow", flow)
        pyro.sample("mu", nfp.FlowDistribution(flow))

    return guide


def run_nuts(directions: Tensor, samples: int) -> Posterior:
    """One chain."""
    began = time.perf_counter()
    chain = MCMC(
        NUTS(axis_model),
        num_samples=samples,
        warmup_steps=max(10, samples // 2),
        num_chains=1,
        disable_progbar=True,
    )
    chain.run(directions)
    drawn = chain.get_samples()["mu"]
    return Posterior(drawn, None, time.perf_counter() - began)


def run_svi(
    guide: Callable[..., object], directions: Tensor, steps: int, rate: float
) -> Posterior:
    """Train a guide, the likelihood raised from a tenth to its full power, and draw from it."""
    began = time.perf_counter()
    elbo = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=0)
    decay = 0.05 ** (1 / max(steps, 1))
    svi = SVI(axis_model, guide, pyro.optim.ClippedAdam({"lr": rate, "lrd": decay}), elbo)
    for step in range(steps):
        svi.step(directions, 0.1 ** max(0.0, 1.0 - step / (0.6 * steps)))
    seconds = time.perf_counter() - began
    many = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=0)
    bound = -many.loss(axis_model, guide, directions)
    with torch.no_grad():
        drawn = Predictive(axis_model, guide=guide, num_samples=4000, parallel=True)(directions)
    return Posterior(drawn["mu"].reshape(-1, 3), float(bound), seconds)


def draw(path: Path, grid: Grid, log_posterior: Tensor, results: dict[str, Posterior]) -> None:
    """The posterior on a map, with draws of two methods."""
    shown = [name for name in ("nuts", "projected_normal", "flow") if name in results]
    figure, axes = plt.subplots(
        1, len(shown), figsize=(4.6 * len(shown), 2.9), subplot_kw={"projection": "mollweide"}
    )
    density = log_posterior.exp().view(len(grid.latitude), len(grid.longitude))
    for axis, name in zip(axes, shown, strict=True):
        axis.pcolormesh(
            grid.longitude.numpy(), grid.latitude.numpy(), density.numpy(), cmap="Blues"
        )
        x, y, z = results[name].samples[:400].unbind(1)
        where = torch.atan2(y, x).numpy(), z.clamp(-1, 1).asin().numpy()
        axis.plot(*where, ".", color="#c8102e", ms=2)
        axis.set_title(NAMES[name], fontsize=9)
        axis.set_xticklabels([])
        axis.set_yticklabels([])
        axis.grid(alpha=0.3)
    figure.suptitle("Posterior of the axis (blue) and draws (red)", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    if options.quick:
        options.steps, options.samples = 20, 20

    directions, grid = scatter(), sphere_grid()
    log_joint = log_likelihood(grid.points, directions).double() - math.log(4 * math.pi)
    log_evidence = float((log_joint + grid.area.double().log()).logsumexp(0))
    weights = (log_joint + grid.area.double().log() - log_evidence).exp()
    points = grid.points.double()
    orientation = points.T @ (weights.unsqueeze(1) * points)

    results: dict[str, Posterior] = {}
    for name in NAMES:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        if name == "nuts":
            results[name] = run_nuts(directions, options.samples)
            continue
        guides: dict[str, Callable[[], Callable[..., object]]] = {
            "auto_normal": lambda: AutoNormal(axis_model),
            "auto_flow": lambda: nfp.AutoFlow(axis_model),
            "projected_normal": lambda: projected_normal_guide,
            "flow": flow_guide,
        }
        results[name] = run_svi(guides[name](), directions, options.steps, RATES[name])

    print(f"\nLog-evidence by quadrature: {log_evidence:.4f}\n")
    print("| method | evidence gap, nats | error of E[mu mu^T] | share of one end | seconds |")
    print("|---|---|---|---|---|")
    for name, posterior in results.items():
        gap = "-" if posterior.bound is None else f"{log_evidence - posterior.bound:.3f}"
        mu = posterior.samples.double()
        error = float((mu.T @ mu / len(mu) - orientation).abs().max())
        share = float((mu @ AXIS.double() > 0).double().mean())
        print(f"| {NAMES[name]} | {gap} | {error:.3f} | {share:.2f} | {posterior.seconds:.0f} |")
    path = options.out / "pyro_sphere.png"
    draw(path, grid, log_joint - log_evidence, results)
    print(f"\nFigure: {path}")


if __name__ == "__main__":
    main()

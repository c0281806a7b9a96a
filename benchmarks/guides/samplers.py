"""Samplers on manifolds: moments on the sphere, calibration on the simplex."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import HMC, MCMC, NUTS
from pyro.infer.reparam import ProjectedNormalReparam
from pyro.ops.stats import autocorrelation, effective_sample_size
from torch import Tensor

import normflows_injective as nfi
import normflows_injective.pyro as nfp

from .targets import ALPHA, KAPPA, MODE

__all__ = ["CALIBRATED", "MODES", "SPHERE", "calibrate", "sample_sphere"]

PROBLEMS, PARTS, TRIALS, DRAWS, BINS = 200, 3, 6, 31, 8
# The stereographic chart misses the last axis.
MODES = {"(1, 2, 2) / 3": MODE, "the missing point": torch.tensor([0.0, 0.0, 1.0])}


def _stereographic() -> Any:
    chart = nfp.FlowTransform(nfi.flows.SphereChart(3, "stereographic"))
    return nfp.ManifoldReparam(chart)


# By name: how a site on the sphere is reparameterised.
SPHERE: dict[str, Callable[[], Any] | None] = {
    "ManifoldReparam, stereographic": _stereographic,
    "registered constraint": None,
    "ProjectedNormalReparam": ProjectedNormalReparam,
}
# By name: layers of a chart of the simplex; None for Pyro's own.
CALIBRATED: dict[str, Callable[[], list[Any]] | None] = {
    "ManifoldReparam, SimplexStickBreaking": lambda: [nfi.flows.SimplexStickBreaking(PARTS)],
    "ManifoldReparam, orthant chart": lambda: [
        nfi.flows.SphereChart(PARTS, "orthant"),
        nfi.flows.SimplexFromOrthant(PARTS),
    ],
    "registered constraint": None,
}


def sample_sphere(name: str, mode: Tensor, warmup: int, draws: int) -> dict[str, float]:
    """Moments of a von Mises-Fisher posterior by NUTS, of the projection on the mode (3,).

    ``z_mean`` and ``z_square`` count the standard errors between the first two moments and the
    exact ones.
    """
    reparam = SPHERE[name]
    prior: Any = nfp.SurfaceDistribution(nfi.distributions.UniformSphere(3))
    if reparam is ProjectedNormalReparam:
        prior = dist.ProjectedNormal(torch.zeros(3))

    def model() -> None:
        u = pyro.sample("u", prior)
        pyro.factor("pull", KAPPA * (u @ mode))

    if reparam is not None:
        model = poutine.reparam(model, config={"u": reparam()})
    start = time.perf_counter()
    chain = _run(NUTS(model, jit_compile=True, ignore_jit_warnings=True), warmup, draws)
    seconds = time.perf_counter() - start
    values = chain.get_samples()
    if "u" not in values:
        with torch.no_grad():
            values["u"] = pyro.infer.Predictive(model, values, return_sites=["u"])()["u"]
    projection = (values["u"].reshape(-1, 3) @ mode).double()
    mean = 1 / math.tanh(KAPPA) - 1 / KAPPA
    second = 1 - 2 * mean / KAPPA
    number, error = _error(projection)
    divergent = chain.diagnostics().get("divergences", {})
    return {
        "mean": float(projection.mean()),
        "sd": float(projection.std()),
        "error": error,
        "z_mean": (float(projection.mean()) - mean) / error,
        "z_square": (float(projection.square().mean()) - second) / _error(projection.square())[1],
        "effective": number,
        "divergences": float(sum(len(steps) for steps in divergent.values())),
        "seconds": seconds,
    }


def calibrate(name: str, warmup: int, thinning: int) -> dict[str, Any]:
    """Ranks of the truth among posterior draws, over problems drawn from the prior.

    All problems lie in one plate and are sampled by one chain of HMC, whose law is the product of
    the posteriors. Trajectories are long and draws thinned, so that those of one problem are all
    but independent.
    """
    prior = dist.Dirichlet(torch.full((PARTS,), ALPHA))
    truth = prior.sample((PROBLEMS,))
    counts = dist.Multinomial(TRIALS, truth).sample()

    def model() -> None:
        with pyro.plate("problems", PROBLEMS):
            p = pyro.sample("p", prior)
            pyro.sample("counts", dist.Multinomial(TRIALS, p, validate_args=False), obs=counts)

    layers = CALIBRATED[name]
    if layers is not None:
        chart = nfp.FlowTransform(layers())
        model = poutine.reparam(model, config={"p": nfp.ManifoldReparam(chart)})
    start = time.perf_counter()
    chain = _run(HMC(model, trajectory_length=1.5), warmup, DRAWS * thinning)
    seconds = time.perf_counter() - start
    values = chain.get_samples()
    if "p" not in values:
        latent = values["p_coordinates"]
        values["p"] = torch.stack([chart(z) for z in latent])
    thinned = values["p"][thinning - 1 :: thinning]
    ranks = (thinned < truth).sum(0)
    bins = torch.stack([torch.bincount(r * BINS // (DRAWS + 1), minlength=BINS) for r in ranks.T])
    statistic = ((bins - PROBLEMS / BINS).square() / (PROBLEMS / BINS)).sum(1)
    p_values = torch.special.gammaincc(torch.tensor((BINS - 1) / 2), statistic / 2)
    return {
        "bins": bins.tolist(),
        "p": p_values.tolist(),
        "correlation": float(autocorrelation(thinned, dim=0)[1].mean()),
        "acceptance": float(chain.diagnostics()["acceptance rate"]["chain 0"]),
        "seconds": seconds,
    }


def _run(kernel: Any, warmup: int, draws: int) -> MCMC:
    chain = MCMC(kernel, num_samples=draws, warmup_steps=warmup, disable_progbar=True)
    chain.run()
    return chain


def _error(values: Tensor) -> tuple[float, float]:
    number = float(effective_sample_size(values.unsqueeze(0), chain_dim=0, sample_dim=1))
    return number, float(values.std()) / number**0.5

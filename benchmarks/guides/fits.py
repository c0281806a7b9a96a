"""The guides that are compared, and how each is trained and judged."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import normflows as nf
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
)
from pyro.nn import PyroModule
from torch import Tensor, nn

import normflows_injective as nfi
import normflows_injective.pyro as nfp

from .targets import Model, Target

__all__ = ["GUIDES", "PARTICLES", "Fit", "fit"]

PARTICLES = 32
Factory = Callable[[Model], nn.Module]


class SiteGuide(PyroModule):
    """A guide of one site by a distribution that is made from trained modules in every step."""

    def __init__(self, site: str, trained: nn.Module, law: Callable[[], Any]) -> None:
        super().__init__()
        self.site, self.trained, self.law = site, trained, law

    def forward(self) -> None:
        """Sample the site."""
        pyro.sample(self.site, self.law())


def _star_like(_: Model) -> nn.Module:
    flow = nfi.flows.star_like_flow(3)
    return SiteGuide("u", flow, lambda: nfp.FlowDistribution(flow))


def _projected_normal(_: Model) -> nn.Module:
    direction = nn.ParameterList([torch.randn(3)])
    return SiteGuide("u", direction, lambda: dist.ProjectedNormal(direction[0]))


def _on_simplex(parts: int, chart: Callable[[int], list[Any]]) -> Factory:
    def build(_: Model) -> nn.Module:
        base = nf.distributions.DiagGaussian(parts - 1, trainable=False)
        layers = [*nfp.flows.splines(parts - 1), *chart(parts)]
        flow = nfi.InjectiveNormalizingFlow(base, layers)
        return SiteGuide("p", flow, lambda: nfp.FlowDistribution(flow))

    return build


def _stick_breaking(parts: int) -> list[Any]:
    return [nfi.flows.SimplexStickBreaking(parts)]


def _orthant(parts: int) -> list[Any]:
    return [nfi.flows.SphereChart(parts, "orthant"), nfi.flows.SimplexFromOrthant(parts)]


def _couplings(dim: int) -> Any:
    return transforms.iterated(4, transforms.affine_coupling, dim)


def _permuted_couplings(dim: int) -> Any:
    parts: list[Any] = []
    for _ in range(4):
        parts += [transforms.affine_coupling(dim), transforms.permute(dim)]
    return dist.transforms.ComposeTransformModule(parts)


def _injective(rank: int, noise: str, num_aux: int = 0) -> Factory:
    return lambda model: nfp.AutoInjective(model, rank, noise=noise, num_aux=num_aux)


_NORMALS: dict[str, Factory] = {
    "AutoDiagonalNormal": AutoDiagonalNormal,
    "AutoLowRankMultivariateNormal, rank 2": lambda m: AutoLowRankMultivariateNormal(m, rank=2),
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoIAFNormal, 2 transforms": lambda m: AutoIAFNormal(m, [64, 64], num_transforms=2),
}
_BASIC: dict[str, Factory] = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
}
_DEFAULT_FLOW: dict[str, Factory] = {"nfp.AutoFlow": nfp.AutoFlow}


def _simplex_guides(parts: int) -> dict[str, Factory]:
    return {
        **_BASIC,
        **_DEFAULT_FLOW,
        "same splines, SimplexStickBreaking": _on_simplex(parts, _stick_breaking),
        "same splines, orthant chart": _on_simplex(parts, _orthant),
    }


_SPHERE_GUIDES: dict[str, Factory] = {
    **_BASIC,
    "ProjectedNormal": _projected_normal,
    **_DEFAULT_FLOW,
    "star_like_flow": _star_like,
}

# By target and name.
GUIDES: dict[str, dict[str, Factory]] = {
    "banana": {
        **_NORMALS,
        "AutoNormalizingFlow, 4 affine couplings": lambda m: AutoNormalizingFlow(m, _couplings),
        "the same with permutations": lambda m: AutoNormalizingFlow(m, _permuted_couplings),
        **_DEFAULT_FLOW,
        "nfp.AutoInjective, rank 1, mvn": _injective(1, "mvn"),
        "nfp.AutoInjective, rank 5, mvn": _injective(5, "mvn"),
        "nfp.AutoInjective, rank 5, low_rank": _injective(5, "low_rank"),
    },
    "regression": {
        **_NORMALS,
        "nfp.AutoInjective, rank 2, mvn": _injective(2, "mvn"),
        "nfp.AutoInjective, rank 5, mvn": _injective(5, "mvn"),
    },
    "dirichlet10": _simplex_guides(10),
    "dirichlet30": _simplex_guides(30),
    "vmf": _SPHERE_GUIDES,
    "bimodal": _SPHERE_GUIDES,
}


class Fit(NamedTuple):
    """The ELBO of a trained guide in nats with its standard error, and seconds of training."""

    elbo: float
    error: float
    seconds: float


def fit(target: Target, factory: Factory, rate: float, steps: int, seed: int, draws: int) -> Fit:
    """Train a guide by Adam, the rate falling to zero by a cosine, and judge it by new draws."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = factory(target.model)
    guide()
    loss = _elbo(PARTICLES)(target.model, guide)
    loss()
    optimizer = torch.optim.Adam(loss.parameters(), lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    chunk = max(2, min(1000, draws // 10))
    judge = _elbo(chunk)(target.model, guide)
    with torch.no_grad():
        values: Tensor = torch.tensor([-float(judge()) for _ in range(draws // chunk)])
    return Fit(float(values.mean()), float(values.std() / len(values) ** 0.5), seconds)


def _elbo(particles: int) -> Any:
    return Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=0)

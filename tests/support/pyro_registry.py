"""Name -> constructor of every kind of Pyro distribution and guide that the package offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import normflows as nf
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import normflows_injective as nfi
import normflows_injective.pyro as nfp
from normflows_injective.flows.gauges import LpGauge
from support.models import base, coupling, mlp_injection, perturbed, spline
from support.seeds import manual_seed


@dataclass(frozen=True)
class LawCase:
    """A module with parameters, and the distribution that is built on it at every call.

    ``scores_others`` says whether it scores what another module of its kind drew: a learned
    manifold is another one for other parameters. ``has_inverse`` says whether other values than
    its draws pass the inverse of a stack of layers.
    """

    module: Callable[[], nn.Module]
    law: Callable[[Any], Any]
    event_shape: tuple[int, ...]
    batch_shape: tuple[int, ...] = ()
    has_rsample: bool = True
    scores_others: bool = True
    has_inverse: bool = True


def _flow(law: nn.Module) -> nfp.FlowDistribution:
    return nfp.FlowDistribution(law)


def _transformed(transform: nfp.FlowTransform) -> dist.TransformedDistribution:
    latent = transform.inverse_shape(transform.forward_shape((2,)))
    return dist.TransformedDistribution(dist.Normal(torch.zeros(latent), 1).to_event(1), transform)


def _context(like: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, 12).view(3, 4).to(like)


def _affine() -> nn.Module:
    layers = [coupling(3), nf.flows.Permute(3, "shuffle"), coupling(3)]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(3), layers)


def _splines() -> nn.Module:
    return nf.NormalizingFlow(base(2), [spline(), nf.flows.LULinearPermute(2)])


def _conditional() -> nn.Module:
    autoregressive = nf.flows.MaskedAffineAutoregressive(2, 8, context_features=4)
    return nf.ConditionalNormalizingFlow(base(2), [autoregressive, nf.flows.LULinearPermute(2)])


def _class_conditional() -> nn.Module:
    return nf.ClassCondFlow(nf.distributions.ClassCondDiagGaussian(2, 5), [coupling(2)])


def _image() -> nn.Module:
    layers = [nf.flows.Invertible1x1Conv(4, True), nf.flows.AffineConstFlow((4, 2, 2))]
    return nf.NormalizingFlow(base(4, 2, 2), layers)


def _scalar() -> nn.Module:
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(1), [nf.flows.AffineConstFlow((1,))])


def _sphere() -> nn.Module:
    return nfi.flows.star_like_flow(3, num_layers=2)


def _learned() -> nn.Module:
    return nfi.InjectiveNormalizingFlow(base(2), [spline(), mlp_injection()])


def _surface_transform() -> nn.Module:
    chart = nfi.flows.SphereChart(3, "stereographic")
    return nfp.FlowTransform([coupling(2), chart, nfi.flows.RadialSurface(LpGauge(1.3))])


LAWS: dict[str, LawCase] = {
    "affine": LawCase(_affine, _flow, (3,)),
    "splines": LawCase(_splines, _flow, (2,)),
    "conditional": LawCase(
        _conditional,
        lambda m: nfp.FlowDistribution(m, context=_context(next(m.parameters()))),
        (2,),
        (3,),
    ),
    "class_conditional": LawCase(
        _class_conditional,
        lambda m: nfp.FlowDistribution(m, context=torch.tensor([0, 4, 2])),
        (2,),
        (3,),
    ),
    "image": LawCase(_image, lambda m: nfp.FlowDistribution(m, event_dim=3), (4, 2, 2)),
    "scalar": LawCase(_scalar, lambda m: nfp.FlowDistribution(m, event_dim=0), ()),
    "sphere": LawCase(_sphere, _flow, (3,)),
    "learned": LawCase(_learned, _flow, (5,), scores_others=False),
    "uniform": LawCase(
        nn.Module, lambda _: nfp.UniformOnSurface(LpGauge(1.0), dim=3), (3,), has_rsample=False
    ),
    "von_mises_fisher": LawCase(
        lambda: nfi.distributions.VonMisesFisher([1, 0, 0], 2, trainable=True),
        nfp.SurfaceDistribution,
        (3,),
        has_inverse=False,
    ),
    "angles": LawCase(
        lambda: nfi.distributions.WrappedNormal([1.0, 3.0], 0.5, trainable=True),
        nfp.SurfaceDistribution,
        (2,),
        has_inverse=False,
    ),
    "transformed": LawCase(
        lambda: nfp.FlowTransform([coupling(2), nf.flows.Permute(2), coupling(2)]),
        _transformed,
        (2,),
    ),
    "transformed_surface": LawCase(_surface_transform, _transformed, (3,)),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """The module of a case, moved off special initial values."""
    manual_seed(seed)
    return perturbed(LAWS[name].module(), 0.1)


# Guides. Models, by name, have latent variables of every kind of support.


OCTAHEDRON = nfp.UniformOnSurface(LpGauge(1.0), dim=3)


def numbers():
    pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(0.0, 1.0))


def scales():
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    share = pyro.sample("share", dist.Uniform(-1.0, 2.0))
    with pyro.plate("rows", 2):
        x = pyro.sample("x", dist.Normal(share, scale))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.ones(2))


def surfaces():
    pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    pyro.sample("octahedron", OCTAHEDRON)


def regression(data):
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(data)):
        pyro.sample("y", dist.Normal(data @ slope, 0.1), obs=torch.ones(len(data)))


MODELS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "numbers": (numbers, ()),
    "scales": (scales, ()),
    "surfaces": (surfaces, ()),
    "regression": (regression, (torch.eye(2),)),
}


def _couplings(dim: int) -> list[nf.flows.Flow]:
    return [coupling(dim) for _ in range(3)]


GUIDES: dict[str, Callable[[Callable[..., Any]], nn.Module]] = {
    "flow": nfp.AutoFlow,
    "flow_of_couplings": lambda model: nfp.AutoFlow(model, _couplings),
    "injective": lambda model: nfp.AutoInjective(model, 1),
    "injective_linear": lambda model: nfp.AutoInjective(model, 1, decoder="linear"),
    "injective_diagonal": lambda model: nfp.AutoInjective(model, 1, noise="diagonal", num_aux=2),
    "injective_low_rank": lambda model: nfp.AutoInjective(model, 1, noise="low_rank"),
    "injective_of_flows": lambda model: nfp.AutoInjective(
        model, 1, latent_flows=lambda rank: [nf.flows.AffineConstFlow((rank,))]
    ),
}

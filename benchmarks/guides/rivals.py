"""Guides for standard posteriors: ours, Pyro's, and flows of zuko where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from pyro.contrib.zuko import ZukoToPyro
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_median,
)
from torch import nn

import normflows_injective.pyro as nfp

from .posteriors import Model

__all__ = ["FIRST", "OURS", "RATES", "RIVALS"]

RATES = (0.01, 0.03)
# The guide whose time is the budget of all.
FIRST = "nfp.AutoFlow"

Factory = Callable[[Model], nn.Module]


class ZukoGuide(AutoContinuous):
    """A guide over all latents by a flow of zuko, drawn from in one pass.

    Its own direction, from data to base, becomes that of sampling. Draws are scaled by a tenth,
    as the other autoguides start, which otherwise leave the region of finite densities.
    """

    def __init__(self, model: Model, make: Callable[[int], Any]) -> None:
        super().__init__(model, init_loc_fn=init_to_median)
        self._make = make

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        self.flow = self._make(self.latent_dim)
        self.loc = nn.Parameter(self._init_loc())
        self.log_scale = nn.Parameter(torch.full_like(self.loc, 0.1).log())

    def get_posterior(self) -> Any:
        """The law of the latents."""
        import zuko

        flow = self.flow()
        place = zuko.transforms.MonotonicAffineTransform(self.loc, self.log_scale)
        place = torch.distributions.transforms.IndependentTransform(place, 1)
        pushed = zuko.transforms.ComposedTransform(place.inv, flow.transform.inv)
        return ZukoToPyro(zuko.distributions.NormalizingFlow(pushed, flow.base))


def _zuko(kind: str, **options: Any) -> Factory:
    def make(dim: int) -> Any:
        import zuko

        return getattr(zuko.flows, kind)(dim, transforms=3, hidden_features=(64, 64), **options)

    return lambda model: ZukoGuide(model, make)


def _autoregressive(num_transforms: int) -> Factory:
    return lambda model: AutoIAFNormal(model, [64, 64], num_transforms=num_transforms)


OURS: dict[str, Factory] = {
    "nfp.AutoFlow": nfp.AutoFlow,
    "nfp.AutoFlow, pathfinder": lambda model: nfp.AutoFlow(model).build(warm_start="pathfinder"),
    "nfp.AutoFlow, splines": lambda model: nfp.AutoFlow(model, nfp.flows.splines),
    "nfp.AutoInjective": nfp.AutoInjective,
}
RIVALS: dict[str, Factory] = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": AutoLowRankMultivariateNormal,
    "AutoIAFNormal, 1 transform": _autoregressive(1),
    "AutoIAFNormal, 3 transforms": _autoregressive(3),
}
if find_spec("zuko") is not None:
    RIVALS |= {
        "zuko MAF, 3 transforms": _zuko("MAF"),
        "zuko NSF, 3 transforms": _zuko("NSF"),
    }

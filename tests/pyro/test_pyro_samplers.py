"""Moments of chains on surfaces, within standard errors from their effective sample sizes."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from pyro.ops import stats
from support.seeds import shifted

import normflows_injective as nfi
import normflows_injective.pyro as nfp
from normflows_injective.flows import SimplexStickBreaking, SphereChart

pytestmark = pytest.mark.slow
KAPPA = 10.0
AXIS = torch.tensor([2.0, -1.0, -2.0]) / 3


def chain(model, draws=250, warmup=100, seed=0):
    pyro.set_rng_seed(shifted(seed))
    mcmc = infer.MCMC(
        infer.NUTS(model, max_tree_depth=5), draws, warmup_steps=warmup, disable_progbar=True
    )
    mcmc.run()
    assert len(mcmc.diagnostics()["divergences"]["chain 0"]) <= 2
    return mcmc.get_samples()


def assert_mean(values, expected, errors=4):
    """Means over the first dimension, within so many standard errors."""
    count = stats.effective_sample_size(values.unsqueeze(0)).clamp(max=len(values))
    assert (count > 4).all()
    error = values.std(0) / count.sqrt()
    assert ((values.mean(0) - expected).abs() < errors * error).all()
    assert (error < 0.2).all()


def pulled(plate=None):
    """The von Mises-Fisher law as a uniform prior and a factor."""
    prior = nfp.SurfaceDistribution(nfi.distributions.UniformSphere(3))
    if plate is None:
        x = pyro.sample("x", prior)
    else:
        with pyro.plate("points", plate):
            x = pyro.sample("x", prior)
    pyro.factor("pull", KAPPA * (x * AXIS).sum())


@pytest.mark.parametrize("way", ["plain", "reparam", "law", "plate"])
def test_von_mises_fisher(way):
    model = pulled
    if way == "law":
        law = nfp.SurfaceDistribution(nfi.distributions.VonMisesFisher(AXIS.tolist(), KAPPA))

        def model():
            pyro.sample("x", law)

    elif way == "plate":

        def model():
            pulled(3)

    elif way == "reparam":
        chart = nfp.FlowTransform(SphereChart(3, "stereographic"))
        model = pyro.poutine.reparam(model, config={"x": nfp.ManifoldReparam(chart)})
    found = chain(model)
    x = chart(found["x_coordinates"]).detach() if way == "reparam" else found["x"]
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(x.shape[:-1]))
    cosine = (x * AXIS).sum(-1)
    mean = 1 / math.tanh(KAPPA) - 1 / KAPPA
    assert_mean(cosine, mean)
    second = 1 - 2 * mean / KAPPA
    assert_mean(cosine.square(), second)
    across = torch.linalg.cross(AXIS.expand_as(x), x)
    assert_mean(across[..., 0], 0.0)


@pytest.mark.parametrize("measure", ["lebesgue", "hausdorff"])
@pytest.mark.parametrize("plate", [None, 2])
def test_dirichlet(plate, measure):
    """The density of Pyro's Dirichlet is Lebesgue's, and with another measure it is refused."""
    concentration = torch.tensor([23.8, 12.8, 5.8])
    chart = nfp.FlowTransform(SimplexStickBreaking(3, measure=measure))

    @pyro.poutine.reparam(config={"x": nfp.ManifoldReparam(chart)})
    def model():
        if plate is None:
            pyro.sample("x", dist.Dirichlet(concentration))
        else:
            with pyro.plate("rows", plate):
                pyro.sample("x", dist.Dirichlet(concentration))

    if measure == "hausdorff":
        with pytest.raises(nfi.errors.OptionError, match="measure"):
            model()
        return
    x = chart(chain(model)["x_coordinates"]).detach()
    law = dist.Dirichlet(concentration)
    assert_mean(x, law.mean)
    assert_mean((x - law.mean).square(), law.variance)


def test_uniform_law_of_a_surface_with_corners():
    """On the octahedron every coordinate is as often positive as negative, and |x| is flat."""
    from normflows_injective.flows.gauges import LpGauge

    def model():
        pyro.sample("x", nfp.UniformOnSurface(LpGauge(1.0), dim=3))

    x = chain(model, draws=150, warmup=60)["x"]
    torch.testing.assert_close(x.abs().sum(-1), torch.ones(len(x)))
    assert_mean(x[:, :2], 0.0)
    assert_mean(x.abs(), 1 / 3)
    assert_mean(x.square(), 1 / 6)

"""Circles, tori and products in Pyro: sites whose supports have charts that samplers can reach."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from support.seeds import manual_seed, shifted
from torch.distributions import biject_to

import normflows_injective.pyro as nfp
from normflows_injective.errors import OptionError
from normflows_injective.flows import TorusChart, product_flow, torus_flow


@pytest.fixture(autouse=True)
def _fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(shifted(0))
    manual_seed(0)


def perturbed(model):
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
        parameter.requires_grad_(False)
    return model.double().eval()


def torus_law(**options):
    model = torus_flow(2, num_layers=2, width=8, num_blocks=1, num_components=2, **options)
    return nfp.FlowDistribution(perturbed(model))


def product_law():
    words = {"angle": "circle", "place": "sphere", "parts": "simplex:2", "rate": "positive"}
    flow = product_flow(words, num_layers=2, width=8, num_blocks=1, num_components=2)
    return nfp.FlowDistribution(perturbed(flow.model))


LAWS = {
    "angles": torus_law,
    "vectors": lambda: torus_law(form="vectors"),
    "degrees": lambda: torus_law(period=360.0, start=0.0),
    "product": product_law,
}


@pytest.mark.parametrize("name", LAWS)
def test_supports_are_reached_from_all_of_space(name, float64_by_default):
    law = LAWS[name]()
    x = law.sample(torch.Size([20]))
    assert law.support.check(x).all()
    transform = biject_to(law.support)
    z = transform.inv(x)
    assert z.isfinite().all()
    torch.testing.assert_close(transform(z), x, rtol=1e-6, atol=1e-6)
    # The density of the coordinates integrates as that of the points does: by its own Jacobian.
    jacobian = torch.func.vmap(torch.func.jacfwd(lambda z: transform(z[None])[0]))(z)
    volume = 0.5 * torch.logdet(jacobian.mT @ jacobian)
    expected = transform.log_abs_det_jacobian(z, x)
    if name == "product":  # of which parts are measured by the first one alone
        volume = volume - 0.5 * math.log(2)
    # A part close to zero keeps few digits of its logarithm.
    torch.testing.assert_close(expected, volume, rtol=1e-5, atol=1e-5)


def von_mises():
    law = dist.VonMises(torch.tensor([2.5]), torch.tensor([4.0])).to_event(1)
    pyro.sample("angle", law)


@pytest.mark.slow
def test_a_von_mises_site_has_its_exact_moments_under_nuts(float64_by_default):
    chart = nfp.FlowTransform(TorusChart(1, kind="stereographic"))
    model = poutine.reparam(von_mises, config={"angle": nfp.ManifoldReparam(chart)})
    kernel = NUTS(model, max_tree_depth=4)
    sampler = MCMC(kernel, num_samples=160, warmup_steps=60, disable_progbar=True)
    sampler.run()
    z = sampler.get_samples()["angle_coordinates"]
    angles = chart(z).squeeze(-1)
    cosines = (angles - 2.5).cos()
    kappa = torch.tensor(4.0)
    exact = torch.special.i1e(kappa) / torch.special.i0e(kappa)
    # Batch means, because draws depend on each other.
    means = cosines.view(16, 10).mean(1)
    error = means.std() / math.sqrt(16)
    assert abs(cosines.mean() - exact) < 4 * error


def test_a_chart_that_winds_is_refused():
    with pytest.raises(OptionError, match="stereographic"):
        nfp.ManifoldReparam(nfp.FlowTransform(TorusChart(1)))


@pytest.mark.slow
def test_an_autoguide_takes_a_product(float64_by_default):
    law = product_law()

    def model():
        pyro.sample("x", law)

    guide = AutoNormal(model)
    inference = SVI(model, guide, Adam({"lr": 0.02}), Trace_ELBO())
    losses = [inference.step() for _ in range(15)]
    assert all(map(math.isfinite, losses))
    assert law.support.check(guide()["x"])

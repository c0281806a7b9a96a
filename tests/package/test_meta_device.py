"""Every layer and model on torch's meta device: shapes and devices without a single value.

What passes here builds no tensor on another device and looks at no value on its way, which is what
a device that cannot be had for the suite would punish.
"""

from __future__ import annotations

import normflows as nf
import pytest
import torch
from support.models import base, coupling, mlp_injection
from support.registry import LAYERS

import normflows_injective as nfi

# Layers whose constructor needs values, with the reason.
BUILT_FROM_VALUES = {
    "autoregressive": "normflows' MADE reads its masks",
    "autoregressive_spline": "normflows' MADE reads its masks",
    "channel_mixing_autoregressive": "normflows' MADE reads its masks",
    "patch_mixing_autoregressive": "normflows' MADE reads its masks",
    "simplex_lift": "torch.nonzero has no meta kernel",
    "simplex_lift_of_two": "torch.nonzero has no meta kernel",
    "simplex_lift_ragged": "torch.nonzero has no meta kernel",
    "simplex_lift_lebesgue": "torch.nonzero has no meta kernel",
    "kernel_rbf": "its points are data",
    "kernel_matern12": "its points are data",
    "kernel_matern32": "its points are data",
    "kernel_matern52": "its points are data",
    "kernel_fixed_points": "its points are data",
    "standardise": "it is fitted to data",
    "standardise_log": "it is fitted to data",
    "standardise_power": "it is fitted to data",
    "standardise_images": "it is fitted to data",
    "composite_units": "its units are fitted to data",
}


@pytest.fixture(autouse=True)
def cpu_only(device):
    if device.type != "cpu":
        pytest.skip("the meta device is the device of these tests")


def both_ways(layer, case):
    with torch.device("meta"):
        z = case.latents(torch.randn(5, *case.latent_shape)).requires_grad_()
        context = torch.randn(5, case.context_dim) if case.context_dim else None
        x, log_det = layer(z, context)
        back, minus_log_det = layer.inverse(x.detach(), context)
    assert x.is_meta
    assert back.is_meta
    assert x.shape == (5, *case.data_shape)
    assert back.shape == z.shape
    assert log_det.shape == minus_log_det.shape == (5,)
    (x.sum() + log_det.sum()).backward()
    assert z.grad.is_meta


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_layers_moved_there(name):
    case = LAYERS[name]
    layer = case.build().to("meta")
    assert all(t.is_meta for t in [*layer.parameters(), *layer.buffers()])
    both_ways(layer, case)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(LAYERS) - set(BUILT_FROM_VALUES)))
def test_layers_built_there(name):
    case = LAYERS[name]
    with torch.device("meta"):
        layer = case.build()
    assert all(t.is_meta for t in [*layer.parameters(), *layer.buffers()])
    both_ways(layer, case)


# torch.masked_select, with which normflows' splines begin, has no meta kernel.
STACKS = {
    "injection": lambda: [mlp_injection()],
    "latent": lambda: [coupling(2), nf.flows.LULinearPermute(2), mlp_injection()],
    "ambient": lambda: [mlp_injection(), coupling(), nf.flows.LULinearPermute(5)],
    "two_injections": lambda: [mlp_injection(3, 2), mlp_injection(5, 3)],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("estimator", ["encoder", "on_manifold", "decoder", "conditional"])
def test_models(name, estimator):
    with torch.device("meta"):
        likelihood = nfi.SurrogateLikelihood(estimator=estimator, num_probes=2)
        model = nfi.InjectiveNormalizingFlow(base(2), STACKS[name](), likelihood)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.randn(6, 5)
        model.forward_kld(x).backward()
        optimizer.step()
        assert all(p.grad is None or p.grad.is_meta for p in model.parameters())
        model.eval()
        with torch.no_grad():
            assert model.log_prob(x).shape == (6,)
            assert model.project(x).is_meta
            samples, log_q = model.sample(3)
    assert samples.shape == (3, 5)
    assert log_q.is_meta


@pytest.mark.slow
def test_models_of_known_surfaces():
    with torch.device("meta"):
        model = nfi.flows.star_like_flow(3, nfi.flows.gauges.LpGauge(1.5), num_layers=1, width=8)
        x, log_det = model.forward_and_log_det(torch.rand(6, 2))
        model.forward_kld(x.detach()).backward()
    assert x.is_meta
    assert log_det.is_meta

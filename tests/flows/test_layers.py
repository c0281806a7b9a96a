"""The contract of every layer in the registry."""

from __future__ import annotations

import normflows as nf
import pytest
import torch
from support.registry import LAYERS, perturb
from torch import nn

import normflows_injective as nfi
from normflows_injective.testing import LAYER_CHECKS, LayerCase

BATCH = 3
# They take derivatives by finite differences, or one sample at a time.
SLOW = ("check_gradients", "check_log_volume")


@pytest.fixture(params=LAYERS)
def case(request, device, dtype):
    entry = LAYERS[request.param]
    z = entry.latents(torch.randn(BATCH, *entry.latent_shape, device=device, dtype=dtype))
    context = None
    if entry.context_dim:
        context = torch.randn(BATCH, entry.context_dim, device=device, dtype=dtype)
    layer = perturb(entry.build()).to(device=device, dtype=dtype)
    return LayerCase(layer, z, context, entry.exact_inverse, entry.log_measure)


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, marks=[pytest.mark.slow] if check.__name__ in SLOW else [])
        for check in LAYER_CHECKS
    ],
    ids=lambda check: check.__name__,
)
def test_contract(case, check):
    check(case)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_built_anew_takes_over_the_state(name, device, dtype):
    entry = LAYERS[name]
    layer, twin = (perturb(entry.build()).to(device, dtype) for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    z = entry.latents(torch.randn(BATCH, *entry.latent_shape, device=device, dtype=dtype))
    context = torch.randn(BATCH, entry.context_dim).to(z) if entry.context_dim else None
    torch.testing.assert_close(twin(z, context), layer(z, context), atol=0, rtol=0)


def test_a_context_is_demanded_by_name_or_not_needed(case):
    if case.context is None:
        assert not nfi.host.context.needs_context(case.layer)
        return
    says = "takes a context of shape|was built with a context"  # a network, a whole layer
    with pytest.raises(nfi.errors.ContextError, match=says):
        case.layer(case.z)


def test_latents_of_another_width_are_refused_by_name(case):
    if case.context is not None:
        pytest.skip("the context is checked first")
    with pytest.raises(nfi.errors.ShapeError, match="must have shape"):
        case.layer(torch.cat([case.z, case.z], dim=1))


@pytest.mark.parametrize("name", LAYERS)
def test_the_registry_declares_the_shape_of_data(name):
    entry = LAYERS[name]
    context = torch.randn(BATCH, entry.context_dim) if entry.context_dim else None
    z = entry.latents(torch.randn(BATCH, *entry.latent_shape))
    assert entry.build()(z.float(), context)[0].shape == (BATCH, *entry.data_shape)


class Forgetful(nfi.flows.Injection):
    """x = (z, |z|^2) and the mistakes that a contract must find, by name."""

    def __init__(self, mistake):
        super().__init__()
        self.mistake = mistake
        self.scale = nn.Parameter(torch.ones(()))
        self.latent_shape, self.data_shape = (2,), (3,)

    def encode(self, x, context=None):
        return x[:, :-1] / self.scale

    def decode(self, z, context=None):
        if self.mistake == "batch":
            z = z - z.mean(0)
        z = z * self.scale
        return torch.cat([z, z.square().sum(1, keepdim=True)], dim=1)

    def decode_and_log_volume(self, z, context=None):
        x, log_volume = super().decode_and_log_volume(z, context)
        if self.mistake == "volume":
            log_volume = log_volume + 0.1
        if self.mistake == "gradient":
            log_volume = log_volume.detach()
        if self.mistake == "shape":
            log_volume = log_volume.mean()
        if self.mistake == "dtype":
            log_volume = log_volume.float()
        return x, log_volume


def test_a_layer_of_somebody_else_that_keeps_the_contract():
    z = torch.randn(3, 2, dtype=torch.float64)
    nfi.testing.check_layer(Forgetful(None).double(), z)


@pytest.mark.parametrize("mistake", ["batch", "volume", "gradient", "shape", "dtype"])
def test_a_broken_contract_is_found(mistake):
    z = torch.randn(3, 2, dtype=torch.float64)
    complaints = (AssertionError, nfi.errors.InjectiveFlowError, nfi.errors.NumericalWarning)
    with pytest.raises((RuntimeError, *complaints)):
        nfi.testing.check_layer(Forgetful(mistake).double(), z)


def test_injections_that_do_not_raise_the_dimension_are_refused():
    with pytest.raises(nfi.errors.NotInjectiveError, match="Pad must raise the dimension"):
        nfi.flows.Pad(3, 3)
    with pytest.raises(nfi.errors.NotInjectiveError, match="LinearInjection must raise"):
        nfi.flows.LinearInjection(4, 3)
    with pytest.raises(nfi.errors.NotInjectiveError, match="use nf.NormalizingFlow"):
        nfi.flows.FreeFormInjection(*nfi.nets.mlp_autoencoder(3, 3))


def test_reshape_refuses_another_size():
    with pytest.raises(nfi.errors.ShapeError, match=r"\(4,\) with 4 elements and \(1, 3\) with 3"):
        nfi.flows.Reshape((4,), (1, 3))


def test_free_form_declares_shapes_of_foreign_networks():
    injection = nfi.flows.FreeFormInjection(nn.Linear(5, 2), nn.Linear(2, 4), data_shape=(5,))
    with pytest.raises(
        nfi.errors.ShapeError, match=r"the decoder's output must have shape \(B, 5\)"
    ):
        injection(torch.zeros(1, 2))


def test_injection_before_a_trainable_layer_in_a_host_model_warns():
    model = nf.NormalizingFlow(
        nf.distributions.DiagGaussian(2), [nfi.flows.Pad(2, 5), nf.flows.LULinearPermute(5)]
    )
    with pytest.warns(nfi.errors.StackingWarning, match="sum of per-layer log-dets is wrong"):
        model.log_prob(torch.randn(3, 5))

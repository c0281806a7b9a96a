"""The contract of every layer in the registry."""

from __future__ import annotations

import copy

import normflows as nf
import pytest
import torch
from support.dense import dense_log_volume
from support.registry import LAYERS, perturb
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import normflows_injective as nfi

BATCH = 3


@pytest.fixture(params=LAYERS)
def case(request):
    return LAYERS[request.param]


@pytest.fixture
def layer(case, device, dtype):
    return perturb(case.build()).to(device=device, dtype=dtype)


@pytest.fixture
def z(case, device, dtype):
    return case.latents(torch.randn(BATCH, *case.latent_shape, device=device, dtype=dtype))


@pytest.fixture
def context(case, device, dtype):
    if case.context_dim == 0:
        return None
    return torch.randn(BATCH, case.context_dim, device=device, dtype=dtype)


@pytest.fixture
def tolerance(dtype):
    return 1e-9 if dtype == torch.float64 else 1e-3


def test_is_a_host_flow_with_the_hosts_return_contract(case, layer, z, context):
    x, log_det = layer(z, context)
    assert isinstance(layer, nf.flows.Flow)
    assert x.shape == (BATCH, *case.data_shape)
    assert log_det.shape == (BATCH,)
    back, inverse_log_det = layer.inverse(x.detach(), context)
    assert back.shape == z.shape
    assert inverse_log_det.shape == (BATCH,)


def test_round_trip(case, layer, z, context, tolerance):
    if not case.exact_inverse:
        pytest.skip("an untrained free-form pair is no inverse pair")
    x, log_det = layer(z, context)
    back, inverse_log_det = layer.inverse(x.detach(), context)
    torch.testing.assert_close(back, z, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(inverse_log_det, -log_det, atol=tolerance, rtol=tolerance)


@pytest.mark.slow
def test_log_volume_against_the_dense_jacobian(case, layer, z, context, tolerance):
    for sample in range(BATCH):
        row = None if context is None else context[sample : sample + 1]
        point = z[sample : sample + 1]
        expected = dense_log_volume(lambda s, row=row: layer(s, row)[0], point)
        x, log_volume = layer(point, row)
        expected = expected + case.log_measure(x.detach().double())
        actual = log_volume.double()
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def test_inverse_returns_minus_the_log_volume_at_the_encoded_point(layer, z, context, tolerance):
    x = layer(z, context)[0].detach()
    encoded, log_det = layer.inverse(x, context)
    expected = -layer(encoded, context)[1]
    torch.testing.assert_close(log_det, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.slow
def test_gradients_of_value_and_log_volume(layer, z, context):
    layer, z = layer.double(), z.double().requires_grad_()
    context = None if context is None else context.double()
    assert gradcheck(lambda s: layer(s, context), (z,))
    assert gradgradcheck(lambda s: layer(s, context), (z,))


def test_forward_mode_agrees_with_reverse_mode(layer, z, context):
    """Behind an injection a layer is pushed forward, and what comes out is differentiated."""
    tangent = torch.randn_like(z)

    def decode(s):
        # An injection differentiates itself for its log-volume.
        is_injection = isinstance(layer, nfi.flows.Injection)
        return layer.decode(s, context) if is_injection else layer(s, context)[0]

    x, pushed = torch.func.jvp(decode, (z,), (tangent,))
    cotangent = torch.randn_like(x)
    z = z.requires_grad_()
    (pulled,) = torch.autograd.grad(decode(z), z, cotangent)
    expected = (pulled * tangent).sum()
    torch.testing.assert_close((pushed * cotangent).sum(), expected, atol=1e-4, rtol=1e-4)


def test_gradients_by_parameters(layer, z, context):
    layer, z = layer.double(), z.double()
    context = None if context is None else context.double()
    names, parameters = (
        zip(*layer.named_parameters(), strict=True) if list(layer.parameters()) else ((), ())
    )
    if not names:
        pytest.skip("the layer has no parameters")
    smallest = min(range(len(names)), key=lambda i: parameters[i].numel())

    def by_parameter(parameter):
        state = {names[smallest]: parameter}
        return torch.func.functional_call(layer, state, (z, context))

    assert gradcheck(by_parameter, (parameters[smallest].detach().clone().requires_grad_(),))


def test_every_parameter_gets_a_gradient(case, layer, z, context):
    x, log_det = layer(z, context)
    encoded, inverse_log_det = layer.inverse(x.detach(), context)
    total = x.square().sum() + log_det.sum() + encoded.square().sum() + inverse_log_det.sum()
    parameters = dict(layer.named_parameters())
    if not parameters:
        return
    total.backward()
    without = [name for name, p in parameters.items() if p.grad is None]
    assert not without


def test_samples_do_not_depend_on_their_batch(layer, z, context, tolerance):
    x, log_det = layer(z, context)
    order = torch.tensor([2, 0, 1], device=z.device)
    permuted = layer(z[order], None if context is None else context[order])
    alone = layer(z[:1], None if context is None else context[:1])
    torch.testing.assert_close(permuted[0], x[order], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(permuted[1], log_det[order], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(alone[1], log_det[:1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kept", [torch.float32, torch.float64])
def test_dtype_and_device_are_kept(layer, z, context, kept):
    layer, z = layer.to(kept), z.to(kept)
    context = None if context is None else context.to(kept)
    x, log_det = layer(z, context)
    results = (x, log_det, *layer.inverse(x.detach(), context))
    assert {r.dtype for r in results} == {kept}
    assert {r.device.type for r in results} == {z.device.type}


def test_input_is_neither_mutated_nor_marked(layer, z, context):
    before = z.clone()
    x, _ = layer(z, context)
    data = x.detach()
    copy_of_data = data.clone()
    layer.inverse(data, context)
    assert torch.equal(z, before)
    assert torch.equal(data, copy_of_data)
    assert not z.requires_grad
    assert not data.requires_grad


def test_works_without_gradients(layer, z, context, tolerance):
    expected = layer(z, context)[1].detach()
    with torch.no_grad():
        without = layer(z, context)[1]
    with torch.inference_mode():
        inference = layer(z, context)[1]
    torch.testing.assert_close(without, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(inference.clone(), expected, atol=tolerance, rtol=tolerance)


def test_context_matters_where_it_is_taken(case, layer, z, context):
    if context is None:
        assert not nfi.host.context.needs_context(layer)
        return
    moved = layer(z, context + 1)[0]
    assert not torch.allclose(moved, layer(z, context)[0])
    says = "takes a context of shape|was built with a context"  # a network, a whole layer
    with pytest.raises(nfi.errors.ContextError, match=says):
        layer(z)


def test_state_round_trip_deepcopy_and_repr(case, layer, z, context):
    twin = case.build().to(z)
    twin.load_state_dict(layer.state_dict())
    expected = layer(z, context)[0]
    assert torch.equal(twin(z, context)[0], expected)
    assert torch.equal(copy.deepcopy(layer)(z, context)[0], expected)
    assert type(layer).__name__ in repr(layer)


def test_wrong_width_is_a_named_error(case, layer, z):
    if case.context_dim:
        pytest.skip("the context is checked first")
    with pytest.raises(nfi.errors.ShapeError, match="must have shape"):
        layer(torch.cat([z, z], dim=1))


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

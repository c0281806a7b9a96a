"""normflows' layers around an injection: values, surrogate gradients, refusals."""

from __future__ import annotations

import normflows as nf
import pytest
import torch
from support.dense import dense_jacobian, dense_log_volume
from support.models import base, mlp_injection
from support.seeds import seeded_generator
from torch import nn

import normflows_injective as nfi

ACTIVE = dict(num_input_channels=4, num_blocks=1, num_hidden_channels=8)


def smooth_mlp(*widths):
    return nf.nets.MLP(list(widths), leaky=0.3)


def masked(scale=True):
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    return nf.flows.MaskedAffineFlow(
        mask, smooth_mlp(4, 8, 4), smooth_mlp(4, 8, 4) if scale else None
    )


def residual():
    net = nf.nets.LipschitzMLP([4, 8, 4], init_zeros=False, lipschitz_const=0.5)
    return nf.flows.Residual(net, reduce_memory=False)


VECTOR_FLOWS = {
    "AffineConstFlow": lambda: nf.flows.AffineConstFlow((4,)),
    "ActNorm": lambda: nf.flows.ActNorm((4,)),
    "MaskedAffineFlow": masked,
    "NICE": lambda: masked(scale=False),
    "AffineCouplingBlock": lambda: nf.flows.AffineCouplingBlock(smooth_mlp(2, 8, 4)),
    "AffineCouplingBlock, sigmoid": lambda: nf.flows.AffineCouplingBlock(
        smooth_mlp(2, 8, 4), scale_map="sigmoid"
    ),
    "MaskedAffineAutoregressive": lambda: nf.flows.MaskedAffineAutoregressive(4, 8),
    "CoupledRQS": lambda: nf.flows.CoupledRationalQuadraticSpline(4, 1, 8),
    "AutoregressiveRQS": lambda: nf.flows.AutoregressiveRationalQuadraticSpline(4, 1, 8),
    "CircularCoupledRQS": lambda: nf.flows.CircularCoupledRationalQuadraticSpline(4, 1, 8, [0]),
    "CircularAutoregressiveRQS": lambda: nf.flows.CircularAutoregressiveRationalQuadraticSpline(
        4, 1, 8, [0]
    ),
    "Permute": lambda: nf.flows.Permute(4),
    "InvertibleAffine": lambda: nf.flows.InvertibleAffine(4, use_lu=False),
    "InvertibleAffine, LU": lambda: nf.flows.InvertibleAffine(4, use_lu=True),
    "LULinearPermute": lambda: nf.flows.LULinearPermute(4),
    "Planar": lambda: nf.flows.Planar((4,), act="leaky_relu"),
    "Reverse": lambda: nf.flows.Reverse(nf.flows.LULinearPermute(4)),
    "Reverse of MAF": lambda: nf.flows.Reverse(nf.flows.MaskedAffineAutoregressive(4, 8)),
    "Composite": lambda: nf.flows.Composite([nf.flows.LULinearPermute(4), nf.flows.Permute(4)]),
    "PeriodicShift": lambda: nf.flows.PeriodicShift([0], shift=0.3),
    "PeriodicWrap": lambda: nf.flows.PeriodicWrap([0], bound=9.0),
    "Shift": lambda: nf.transforms.Shift(0.2),
}


def build(name):
    return VECTOR_FLOWS[name]().double()


def data(model, seed=1):
    """Points on the manifold: normflows' periodic layers and splines are kept in their range."""
    z = 0.3 * torch.randn(6, 2, generator=seeded_generator(seed)).double()
    with torch.no_grad():
        return model.forward(z)


@pytest.fixture(params=VECTOR_FLOWS)
def model(request):
    injection = mlp_injection(4, 2)
    model = nfi.InjectiveNormalizingFlow(base(2), [injection, build(request.param)]).double()
    model.forward_kld(torch.randn(8, 4, dtype=torch.float64) * 0.3)  # initialises ActNorm
    return model


@pytest.mark.slow
def test_joint_log_volume_against_the_dense_jacobian(model):
    z = 0.3 * torch.randn(5, 2, dtype=torch.float64)
    expected = dense_log_volume(model.forward, z)
    torch.testing.assert_close(model.forward_and_log_det(z)[1].detach(), expected)


def assert_surrogate_gradients_equal_the_dense_ones(model, x):
    """All probes: S = -tr(F'(x) SG[G'(z)]), differentiated through a dense double Jacobian."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(value):
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        return [torch.zeros_like(p) if g is None else g for g, p in pairs]

    actual = gradients(model.loss_terms(x).surrogate.sum())
    decoder = dense_jacobian(model.decode, model.encode(x))
    encoder = dense_jacobian(model.encode, x)
    expected = gradients(-torch.einsum("bij,bji->", encoder, decoder.detach()))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-8, rtol=1e-6)


@pytest.mark.slow
def test_surrogate_gradient_equals_the_dense_one_for_every_parameter(model):
    model.likelihood = nfi.SurrogateLikelihood(num_probes=2)
    assert_surrogate_gradients_equal_the_dense_ones(model, data(model) + 0.01)


@pytest.mark.slow
def test_surrogate_gradient_through_a_residual_flow():
    """normflows' fixed point and its series leave its log-det inexact, not its Jacobian."""
    flows = [mlp_injection(4, 2), residual()]
    model = nfi.InjectiveNormalizingFlow(base(2), flows, nfi.SurrogateLikelihood(num_probes=2))
    model = model.double()
    assert_surrogate_gradients_equal_the_dense_ones(model, data(model) + 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", VECTOR_FLOWS)
def test_every_layer_serves_in_the_latent_block(name):
    if name.startswith("Periodic"):
        pytest.skip("wraps the normal base: not a bijection there")
    flows = [build(name), mlp_injection(6, 4).double()]
    model = nfi.InjectiveNormalizingFlow(base(4), flows).double()
    model.forward_kld(torch.randn(8, 6, dtype=torch.float64))
    z = 0.3 * torch.randn(5, 4, dtype=torch.float64)
    expected = dense_log_volume(model.forward, z)
    torch.testing.assert_close(model.forward_and_log_det(z)[1].detach(), expected)


IMAGE_FLOWS = {
    "GlowBlock": lambda: nf.flows.GlowBlock(4, 8),
    "GlowBlock, checkerboard": lambda: nf.flows.GlowBlock(4, 8, split_mode="checkerboard"),
    "Invertible1x1Conv": lambda: nf.flows.Invertible1x1Conv(4),
    "Invertible1x1Conv, LU": lambda: nf.flows.Invertible1x1Conv(4, use_lu=True),
    "AffineCouplingBlock": lambda: nf.flows.AffineCouplingBlock(
        nf.nets.ConvNet2d([2, 8, 8, 4], [3, 1, 3], init_zeros=False)
    ),
    "Squeeze": lambda: nf.flows.Squeeze(),
    "Logit": lambda: nf.transforms.Logit(),
}


@pytest.fixture(params=IMAGE_FLOWS)
def image_model(request):
    injection = nfi.flows.FreeFormInjection(nn.Linear(16, 3), nn.Linear(3, 16), (3,), (16,))
    flows = [injection, nfi.flows.Reshape((16,), (4, 2, 2)), IMAGE_FLOWS[request.param]()]
    likelihood = nfi.SurrogateLikelihood(num_probes=3)
    model = nfi.InjectiveNormalizingFlow(base(3), flows, likelihood).double()
    shape = (1, 4, 4) if request.param == "Squeeze" else (4, 2, 2)
    model.forward_kld(torch.rand(6, *shape, dtype=torch.float64) * 0.8 + 0.1)  # cold ActNorm
    return model


def latents():
    return 0.3 * torch.randn(3, 3, dtype=torch.float64)


@pytest.mark.slow
def test_log_volume_of_image_layers_behind_an_injection(image_model):
    z = latents()
    expected = dense_log_volume(image_model.forward, z)
    torch.testing.assert_close(image_model.forward_and_log_det(z)[1].detach(), expected)


@pytest.mark.slow
def test_surrogate_gradient_of_image_layers_behind_an_injection(image_model):
    with torch.no_grad():
        x = image_model.forward(latents()) + 0.01
    assert_surrogate_gradients_equal_the_dense_ones(image_model, x)


def test_a_cold_layer_is_initialised_on_the_first_batch_not_at_construction():
    norm = nf.flows.ActNorm((4,))
    model = nfi.InjectiveNormalizingFlow(base(2), [mlp_injection(4, 2), norm])
    assert not bool(norm.data_dep_init_done)
    assert torch.equal(norm.s, torch.zeros_like(norm.s))
    x = 3 * torch.randn(256, 4) + 5
    model.forward_kld(x)
    assert bool(norm.data_dep_init_done)
    torch.testing.assert_close(norm.t.flatten(), x.mean(0))


def test_a_cold_layer_and_a_batch_of_one():
    model = nfi.InjectiveNormalizingFlow(base(2), [mlp_injection(4, 2), nf.flows.ActNorm((4,))])
    with pytest.raises(nfi.errors.ShapeError, match="batch of one"):
        model.forward_kld(torch.randn(1, 4))
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.slow
def test_residual_without_memory_reduction_trains_behind_an_injection():
    net = nf.nets.LipschitzMLP([4, 8, 4], init_zeros=False, lipschitz_const=0.8)
    flow = nf.flows.Residual(net, reduce_memory=False)
    model = nfi.InjectiveNormalizingFlow(base(2), [mlp_injection(4, 2), flow])
    model.forward_kld(torch.randn(8, 4)).backward()
    assert all(
        layer.weight.grad is not None for layer in net.modules() if hasattr(layer, "weight")
    )
    nf.utils.update_lipschitz(model, 5)


def reduced():
    return nf.flows.Residual(nf.nets.LipschitzMLP([4, 8, 4]), reduce_memory=True)


REFUSED = {
    "BatchNorm": (lambda: nf.flows.BatchNorm(), "BatchNorm"),
    "Radial": (lambda: nf.flows.Radial((4,)), "Radial has no inverse"),
    "Planar": (lambda: nf.flows.Planar((4,)), "Planar has no inverse"),
    "Residual": (reduced, "reduce_memory=False"),
    "MetropolisHastings": (
        lambda: nf.flows.MetropolisHastings(
            nf.distributions.DiagGaussian(4),
            nf.distributions.DiagGaussianProposal((4,), 0.1),
            1,
        ),
        "is stochastic",
    ),
    "Reverse of an injection": (
        lambda: nf.flows.Reverse(nfi.flows.Pad(4, 5)),
        "holds an injection",
    ),
    "Composite of an injection": (
        lambda: nf.flows.Composite([nfi.flows.Pad(4, 5)]),
        "use nfi.flows.InjectiveComposite",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_cannot_be_right_are_refused_at_construction(name):
    make, text = REFUSED[name]
    with pytest.raises(nfi.errors.UnsupportedLayerError, match=text):
        nfi.InjectiveNormalizingFlow(base(2), [mlp_injection(4, 2), make()])

"""Surrogates, densities and reports in lower precision."""

from __future__ import annotations

import normflows as nf
import pytest
import torch
import torch.nn.functional as F
from support.gradients import gradients
from support.networks import Attentive, mlp
from support.seeds import manual_seed
from torch import nn

import normflows_injective as nfi
from normflows_injective.volume.estimators import ESTIMATORS
from normflows_injective.volume.lanczos import lanczos_log_volume

# Lower precision.


class Normed(nn.Module):
    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(fan_in, 32), nn.LayerNorm(32), nn.SiLU(), nn.Linear(32, fan_out)
        )

    def forward(self, x):
        return self.net(x)


PAIRS = {
    "mlp": (lambda: nfi.nets.mlp_autoencoder(12, 4, (32, 32)), (12,)),
    "conv": (lambda: nfi.nets.conv_autoencoder((1, 8, 8), 4, (16, 32)), (1, 8, 8)),
    "layer norm": (lambda: (Normed(12, 4), Normed(4, 12)), (12,)),
    "attention": (
        lambda: (Attentive(12, 4, "transformer"), Attentive(4, 12, "transformer")),
        (12,),
    ),
}


def flow(name, **options):
    pair, shape = PAIRS[name]
    model = nfi.InjectiveNormalizingFlow(
        nf.distributions.DiagGaussian(4, trainable=False),
        [nfi.flows.FreeFormInjection(*pair())],
        nfi.SurrogateLikelihood(**options),
    )
    return model, torch.randn(32, *shape)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def step(model, x, context):
    manual_seed(7)
    with context:
        loss = model.forward_kld(x)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return loss, {name: g for (name, _), g in zip(named, found, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if e != "conjugate_gradient"])
@pytest.mark.parametrize("count", [1, 4])
def test_autocast_leaves_every_gradient_its_direction(name, estimator, count):
    model, x = flow(name, estimator=estimator, num_probes=count, beta=1.0)
    expected_loss, expected = step(model, x, torch.autocast("cpu", enabled=False))
    loss, actual = step(model, x, autocast())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected_loss, rtol=2e-2, atol=2e-2)
    for parameter, gradient in expected.items():
        assert (actual[parameter] is None) == (gradient is None), parameter
        if gradient is not None and gradient.abs().max() > 1e-4:
            cosine = F.cosine_similarity(actual[parameter].flatten(), gradient.flatten(), dim=0)
            # By seeds at least 0.986, or 0.96 where rounding throws the switch of the conditional
            # estimators for a sample.
            assert cosine > (0.85 if "conditional" in estimator else 0.95), parameter


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::normflows_injective.errors.NumericalWarning")
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("count", [1, 4])
def test_conjugate_gradients_under_autocast(name, count):
    """Solved in half precision, of which it warns; still every parameter has a gradient."""
    model, x = flow(name, estimator="conjugate_gradient", num_probes=count, beta=1.0)
    _, expected = step(model, x, torch.autocast("cpu", enabled=False))
    loss, actual = step(model, x, autocast())
    assert loss.dtype == torch.float32
    assert {n for n, g in actual.items() if g is None} == {
        n for n, g in expected.items() if g is None
    }


@pytest.mark.slow
def test_autocast_inside_of_the_networks():
    """It has ended when the first layer's tangent is taken."""

    class Cast(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            with autocast():
                return self.net(x)

    for count in (1, 2):
        encoder, decoder = mlp(12, 4), mlp(4, 12)
        x, ends = torch.randn(32, 12), [*encoder.parameters(), *decoder.parameters()]
        both = []
        for pair in ((encoder, decoder), (Cast(encoder), Cast(decoder))):
            manual_seed(5)
            surrogate = ESTIMATORS["encoder"](
                x, *pair, lambda z, k=count: nfi.volume.draw_probes("orthonormal", k, z)
            )
            assert surrogate.volume.dtype == torch.float32
            both.append(gradients(surrogate.volume.sum(), ends))
        for a, e in zip(*both, strict=True):
            if e.abs().max() > 1e-4:
                assert F.cosine_similarity(a.flatten(), e.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("grad", [True, False])
def test_densities_under_autocast_are_in_full_precision(name, grad):
    model, x = flow(name)
    z = torch.randn(8, 4)
    with torch.set_grad_enabled(grad):
        expected = [model.log_prob(x), model.forward_and_log_det(z)[1]]
        with autocast():
            actual = [model.log_prob(x), model.forward_and_log_det(z)[1]]
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, e, atol=0.5, rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "conv", "layer norm"])
def test_estimated_log_volumes_under_autocast(name):
    model, x = flow(name)
    with torch.no_grad():
        z = model.encode(x)
        expected = lanczos_log_volume(model.decode, z, num_probes=4).log_volume
        with autocast():
            actual = lanczos_log_volume(model.decode, z, num_probes=4).log_volume
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=0.2, rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_reports_under_autocast(name):
    model, x = flow(name)
    expected = vars(nfi.diagnostics.injectivity_report(model, x))
    with autocast():
        actual = vars(nfi.diagnostics.injectivity_report(model, x))
    for key in ("singular_values", "left_inverse_error", "pseudo_inverse_error"):
        assert actual[key].dtype == torch.float64
        torch.testing.assert_close(actual[key], expected[key], rtol=0.3, atol=0.15)
    assert actual["reconstruction_error"].dtype == torch.float32
    for key in ("gradient_cosine", "gradient_ratio"):
        assert abs(actual[key] - expected[key]) < 0.15


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::normflows_injective.errors.NumericalWarning")
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("estimator", ["encoder", "decoder", "conditional"])
@pytest.mark.parametrize("count", [1, 2])
def test_models_in_half_precision(name, estimator, count):
    model, x = flow(name, estimator=estimator, num_probes=count, beta=1.0)
    _, expected = step(model, x, torch.autocast("cpu", enabled=False))
    loss, actual = step(model.bfloat16(), x.bfloat16(), torch.autocast("cpu", enabled=False))
    assert loss.dtype == torch.float32
    flat = [
        torch.cat([g.float().flatten() for g in found.values() if g is not None])
        for found in (actual, expected)
    ]
    assert F.cosine_similarity(*flat, dim=0) > 0.99
    assert model.log_prob(x.bfloat16()).dtype == torch.float32
    with pytest.raises(nfi.errors.DtypeError, match="must have the model's dtype torch.bfloat16"):
        model.forward_kld(x)

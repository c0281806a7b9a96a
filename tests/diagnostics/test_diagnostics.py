"""The injectivity report against dense Jacobians and cases with known answers."""

from __future__ import annotations

import builtins
import math

import pytest
import torch
from support.dense import dense_jacobian
from support.models import base, mlp_injection, model, stacks
from torch import nn

import normflows_injective as nfi
from normflows_injective.diagnostics import frechet_distance, injectivity_report


@pytest.fixture
def x():
    return torch.randn(12, 5, dtype=torch.float64)


@pytest.mark.parametrize("name", stacks())
def test_report_against_dense_jacobians(name, x):
    ours = nfi.InjectiveNormalizingFlow(base(2), stacks()[name]).double()
    report = injectivity_report(ours, x)
    z = ours.encode(x).detach()
    decoder = dense_jacobian(ours.decode, z)
    encoder = dense_jacobian(ours.encode, ours.project(x))
    spectrum = torch.linalg.svdvals(decoder)
    torch.testing.assert_close(report.singular_values, spectrum)
    torch.testing.assert_close(report.condition_number, spectrum[:, 0] / spectrum[:, 1])
    left = torch.linalg.matrix_norm(encoder @ decoder - torch.eye(2).double()) / 2**0.5
    torch.testing.assert_close(report.left_inverse_error, left)
    mismatch = torch.linalg.matrix_norm(decoder - torch.linalg.pinv(encoder))
    expected = mismatch / torch.linalg.matrix_norm(decoder)
    torch.testing.assert_close(report.pseudo_inverse_error, expected)
    torch.testing.assert_close(report.reconstruction_error, ours.reconstruction_error(x).detach())
    base_variables = ours.inverse(x).detach()
    torch.testing.assert_close(report.latent_mean, base_variables.mean(0))
    covariance = torch.cov(base_variables.T, correction=0)
    torch.testing.assert_close(report.latent_covariance, covariance)


def test_an_orthogonal_projection_pair_is_perfect(x):
    ours = nfi.InjectiveNormalizingFlow(base(2), [nfi.flows.LinearInjection(2, 5)]).double()
    report = injectivity_report(ours, x)
    assert report.left_inverse_error.max() < 1e-12
    assert report.pseudo_inverse_error.max() < 1e-12
    assert report.gradient_cosine == pytest.approx(1.0, abs=1e-9)
    assert report.gradient_ratio == pytest.approx(1.0, abs=1e-9)


def test_an_oblique_left_inverse_is_consistent_but_biased(x):
    """A left inverse is not enough: the surrogate is unbiased only for the pseudo-inverse."""
    encoder, decoder = nn.Linear(5, 2, bias=False), nn.Linear(2, 5, bias=False)
    inverse = torch.linalg.pinv(decoder.weight.detach())
    normal = torch.eye(5) - decoder.weight.detach() @ inverse
    encoder.weight.data = inverse + torch.randn(2, 5) @ normal
    ours = nfi.InjectiveNormalizingFlow(base(2), [nfi.flows.FreeFormInjection(encoder, decoder)])
    report = injectivity_report(ours.double(), x)
    assert report.left_inverse_error.max() < 1e-5
    assert report.pseudo_inverse_error.min() > 0.1
    assert report.gradient_cosine < 0.99


def test_report_leaves_parameters_gradients_and_mode_alone(x):
    ours = model().double()
    ours.forward_kld(x).backward()
    gradients = [p.grad.clone() for p in ours.parameters()]
    injectivity_report(ours, x)
    assert ours.training
    for parameter, gradient in zip(ours.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_report_with_context_and_images():
    ours = nfi.InjectiveNormalizingFlow(base(2), [mlp_injection(context_dim=3)])
    assert "12 samples" in str(injectivity_report(ours, torch.randn(12, 5), torch.randn(12, 3)))
    pair = nfi.nets.conv_autoencoder((1, 6, 6), 3, (8,))
    images = nfi.InjectiveNormalizingFlow(base(3), [nfi.flows.FreeFormInjection(*pair)])
    report = injectivity_report(images, torch.rand(6, 1, 6, 6))
    assert report.singular_values.shape == (6, 3)


def test_report_is_readable(x):
    text = str(injectivity_report(model().double(), x))
    for part in ("condition number", "|f'g' - I|", "reconstruction error", "cosine", "median"):
        assert part in text
    assert max(map(len, text.splitlines())) < 80


@pytest.mark.slow
def test_plot_without_touching_pyplot(x, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need the extra [plot]")
    figure = injectivity_report(model().double(), x).plot()
    figure.savefig(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_plot_without_matplotlib_says_how_to_install_it(x, monkeypatch):
    report = injectivity_report(model().double(), x)
    original = builtins.__import__

    def without(name, *rest, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(nfi.errors.OptionError, match=r"pip install normflows-injective\[plot\]"):
        report.plot()


@pytest.mark.parametrize("frozen", [True, False])
def test_report_without_trainable_parameters(frozen, x):
    flows = [mlp_injection()] if frozen else [nfi.flows.Pad(2, 5)]
    ours = nfi.InjectiveNormalizingFlow(base(2), flows).double().requires_grad_(False)
    report = injectivity_report(ours, x)
    assert math.isnan(report.gradient_cosine)
    assert torch.isfinite(report.condition_number).all()


def test_report_in_inference_mode(x):
    ours = model().double()
    expected = injectivity_report(ours, x)
    with torch.inference_mode():
        report = injectivity_report(ours, x + 0)
    torch.testing.assert_close(report.pseudo_inverse_error, expected.pseudo_inverse_error)
    assert repr(report) == str(report)


def test_report_of_a_diverged_model(x):
    ours = model().double()
    ours.flows[0].decoder.layers[0].weight.data.fill_(float("nan"))
    with pytest.raises(nfi.errors.NonFiniteError, match="decoder Jacobian .* diverged"):
        injectivity_report(ours, x)


def test_report_needs_two_samples():
    with pytest.raises(nfi.errors.OptionError, match="at least two samples"):
        injectivity_report(model(), torch.randn(1, 5))


def test_frechet_distance_checks_its_arguments():
    with pytest.raises(nfi.errors.ShapeError, match=r"same width, got \(4, 2\) and \(4, 3\)"):
        frechet_distance(torch.randn(4, 2), torch.randn(4, 3))
    broken = torch.zeros(4, 2)
    broken[1, 0] = float("nan")
    with pytest.raises(nfi.errors.NonFiniteError, match="reference has 1 of 8"):
        frechet_distance(torch.randn(4, 2), broken)

"""The gradient of ``reverse_alpha_div`` against closed forms, by quadrature for the samples."""

from __future__ import annotations

import math

import normflows as nf
import pytest
import torch
from support.models import mlp_injection
from torch import nn

import normflows_injective as nfi
from normflows_injective.errors import OptionError

# Mean of the target; mean and scale of the model are its parameters.
MEAN = 0.1
ORDERS = [-2.0, -1.0, -0.5, -1e-3, 1e-3, 0.5, 0.9, 1.1, 1.5, 2.0]


def scale_of(alpha: float) -> float:
    """A scale of the target with which the powers of the weights have light tails."""
    return 0.9 if alpha > 0 else 1.1


class Quantiles(nf.distributions.DiagGaussian):
    """A normal base that gives the midpoints of equal shares, so that a mean is a quadrature."""

    def forward(self, num_samples=1, context=None):
        shares = (torch.arange(num_samples, dtype=torch.float64) + 0.5) / num_samples
        z = math.sqrt(2) * torch.erfinv(2 * shares - 1).unsqueeze(1)
        return z, self.log_prob(z)


class OnTheLine(nn.Module):
    """A normal law of the coordinate on the model's line."""

    on_manifold = True

    def __init__(self, injection, scale):
        super().__init__()
        self.line, self.scale = [injection], scale

    def log_prob(self, x):
        z = self.line[0].encode(x)
        law = torch.distributions.Normal(MEAN, self.scale)
        return law.log_prob(z).sum(1) - self.line[0].decode_and_log_volume(z).log_volume


def line_model(alpha=1.0):
    injection = nfi.flows.LinearInjection(1, 3).double().requires_grad_(False)
    affine = nf.flows.AffineConstFlow((1,)).double()
    q0 = Quantiles(1, trainable=False).double()
    with torch.no_grad():
        affine.s.fill_(-0.05)
        affine.t.fill_(-0.1)
    target = OnTheLine(injection, scale_of(alpha))
    return nfi.InjectiveNormalizingFlow(q0, [affine, injection], p=target), affine


def gradients(value, affine):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, [affine.s, affine.t])])


def log_integral(alpha, affine):
    """The logarithm of the integral of p^alpha q^(1 - alpha) over two normal laws."""
    mean, variance = affine.t.sum(), (2 * affine.s.sum()).exp()
    target = scale_of(alpha) ** 2
    mixed = alpha * variance + (1 - alpha) * target
    shift = alpha * (1 - alpha) * (mean - MEAN).square() / mixed
    logs = (1 - alpha) * math.log(target) + alpha * variance.log() - mixed.log()
    return 0.5 * (logs - shift)


def divergence(alpha, affine):
    return (log_integral(alpha, affine).exp() - 1) / (alpha * (alpha - 1))


def kl(mean, scale, other_mean, other_scale):
    ratio = (scale / other_scale).square()
    shift = ((mean - other_mean) / other_scale).square()
    return 0.5 * (ratio + shift - 1 - ratio.log())


@pytest.mark.parametrize("dreg", [False, True])
@pytest.mark.parametrize("alpha", ORDERS)
def test_the_gradient_is_that_of_the_divergence(alpha, dreg):
    ours, affine = line_model(alpha)
    sign = math.copysign(1.0, alpha * (alpha - 1))
    found = gradients(ours.reverse_alpha_div(20_000, alpha, dreg), affine)
    expected = gradients(sign * log_integral(alpha, affine), affine)
    atol = 0.01 * float(expected.norm())
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)
    direction = torch.cosine_similarity(found, gradients(divergence(alpha, affine), affine), dim=0)
    assert float(direction) > 0.999


def test_the_closed_form_is_the_integral():
    _, affine = line_model()
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    q = torch.distributions.Normal(affine.t.sum(), affine.s.sum().exp()).log_prob(z)
    for alpha in ORDERS:
        p = torch.distributions.Normal(MEAN, scale_of(alpha)).log_prob(z)
        integral = (alpha * p + (1 - alpha) * q).exp().sum() * (z[1] - z[0])
        torch.testing.assert_close(integral.log(), log_integral(alpha, affine))


@pytest.mark.parametrize(("alpha", "reverse"), [(1e-3, True), (-1e-3, True), (0.99, False)])
def test_limits_are_the_two_kullback_leibler_divergences(alpha, reverse):
    ours, affine = line_model(alpha)
    found = gradients(ours.reverse_alpha_div(20_000, alpha), affine) / abs(alpha * (alpha - 1))
    q, p = (affine.t.sum(), affine.s.sum().exp()), map(torch.tensor, (MEAN, scale_of(alpha)))
    pair = (*q, *p) if reverse else (*p, *q)
    expected = gradients(kl(*pair), affine)
    torch.testing.assert_close(found, expected, atol=0.03 * float(expected.norm()), rtol=0)
    if reverse:
        torch.testing.assert_close(
            gradients(ours.reverse_kld(20_000), affine), expected, atol=1e-3, rtol=1e-2
        )


@pytest.mark.parametrize("dreg", [False, True])
def test_orders_that_train_nothing_are_refused(dreg):
    ours, _ = line_model()
    with pytest.raises(OptionError, match="alpha=0 is constant .* use reverse_kld"):
        ours.reverse_alpha_div(8, alpha=0, dreg=dreg)
    for alpha in (math.nan, math.inf, "2", None):
        with pytest.raises(OptionError, match="alpha must be a (finite )?number, got"):
            ours.reverse_alpha_div(8, alpha=alpha, dreg=dreg)


def test_path_gradients_switch_no_flags_of_parameters():
    """Another thread that trains meanwhile would lose its gradients."""
    pair = mlp_injection(3, 1).double()
    affine = nf.flows.AffineConstFlow((1,)).double()
    q0 = nf.distributions.DiagGaussian(1, trainable=False).double()
    ours = nfi.InjectiveNormalizingFlow(q0, [affine, pair])
    seen = []

    class Target(nn.Module):
        on_manifold = True

        def log_prob(self, x):
            return -x.square().sum(1)

    ours.p = Target()
    pair.encoder.register_forward_hook(
        lambda *_: seen.append(all(p.requires_grad for p in affine.parameters()))
    )
    loss = ours.reverse_kld(64, score_fn=False)
    loss.backward(retain_graph=True)
    first = [parameter.grad.clone() for parameter in ours.parameters()]
    ours.zero_grad()
    loss.backward()
    assert seen
    assert all(seen)
    torch.testing.assert_close([parameter.grad for parameter in ours.parameters()], first)

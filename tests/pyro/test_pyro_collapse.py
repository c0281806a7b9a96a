"""Noise of learned manifolds: its limit, the bias of the surrogate, and training."""

from __future__ import annotations

import math
import warnings

import normflows as nf
import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from support.pyro_manifolds import data, flow, law, linear, parameters
from support.seeds import manual_seed, shifted
from torch import nn

import normflows_injective as nfi
from normflows_injective.errors import CollapseWarning

# Collapse


def collapse_case(beta):
    """A line in the plane, data of variance one along it, at the stationary point if any."""
    model = linear(2, 1, bias=False)
    slope = 0.5 * (1 + math.sqrt(max(0.0, 1 - 2 / beta)))
    encoder, decoder = model.flows[0].encoder, model.flows[0].decoder
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor([[slope], [0.0]], dtype=torch.float64))
        encoder.weight.copy_(torch.tensor([[1.0, 0.0]]))
    points = torch.linspace(-1, 1, 41, dtype=torch.float64)
    points = points / points.square().mean().sqrt()
    return model, torch.stack([points, torch.zeros_like(points)], dim=1), slope


def loss_gradients(model, x, beta, volume):
    sigma = (2 * beta) ** -0.5
    distribution = law(model, "thicken", volume=volume, noise_scale=sigma)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)
        loss = -distribution.log_prob(x).mean()
    return torch.autograd.grad(loss, parameters(model))


@pytest.mark.parametrize("beta", [50.0, 5.0, 2.2])
def test_above_the_limit_the_loss_is_stationary_at_the_predicted_slope(beta):
    model, x, _ = collapse_case(beta)
    for gradient in loss_gradients(model, x, beta, "exact"):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("beta", "survives"), [(2.2, True), (1.8, False)])
def test_collapse_on_both_sides_of_the_limit(beta, survives):
    model, x, slope = collapse_case(beta)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(400):
        for p, gradient in zip(
            parameters(model), loss_gradients(model, x, beta, "exact"), strict=True
        ):
            p.grad = gradient
        optimizer.step()
        reached = float(model.flows[0].decoder.weight[0, 0].detach())
        if reached < 0.05:
            break
    assert (reached > 0.05) == survives
    if survives:
        assert reached == pytest.approx(slope, abs=1e-4)


@pytest.mark.parametrize("beta", [50.0, 1.8, 0.1])
def test_the_encoder_surrogate_has_no_limit(beta):
    """Stationary where the pair reproduces the line and its scale, whatever the noise."""
    model, x, _ = collapse_case(beta)
    with torch.no_grad():
        model.flows[0].decoder.weight[0, 0] = 1.0
    for gradient in loss_gradients(model, x, beta, "surrogate"):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_wide_noise_is_warned_of_once_for_a_model():
    model, x = linear(), data(64)
    x[:, 0] *= 10  # the narrow direction counts
    narrow, wide, widest = (law(model, "thicken", noise_scale=s) for s in (0.1, 0.35, 0.8))
    assert narrow.check_collapse(x) < 0.25
    with pytest.warns(CollapseWarning, match="tends to lose"):
        assert 0.25 < wide.check_collapse(x) < 0.5
    with pytest.warns(CollapseWarning, match="above the limit 0.5"):
        widest.check_collapse(x)
    with torch.no_grad():
        widest.log_prob(x)
    widest.log_prob(x[:5])  # too few to tell
    law(model, "thicken", volume="surrogate", noise_scale=0.8).log_prob(x)
    with pytest.warns(CollapseWarning, match="volume='surrogate'"):
        widest.log_prob(x)
    widest.log_prob(x)
    law(model, "thicken", noise_scale=0.8).log_prob(x)


# Bias of the surrogate


class Paraboloid(nn.Module):
    """(z, a |z|^2 / 2) with the coefficient a as its parameter."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.0))

    def forward(self, z):
        return torch.cat([z, 0.5 * self.a * z.square().sum(1, keepdim=True)], dim=1)


class Drop(nn.Module):
    """The coordinates themselves: an exact left inverse, that does not project."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3)[:2])

    def forward(self, x):
        return x @ self.weight.T


def paraboloid(encoder):
    base = nf.distributions.DiagGaussian(2, trainable=False)
    pair = nfi.flows.FreeFormInjection(encoder, Paraboloid())
    return nfi.InjectiveNormalizingFlow(base, [pair])


def test_bias_vanishes_for_a_pseudo_inverse_and_is_found_for_a_left_inverse():
    model = linear()
    with torch.no_grad():
        model.flows[0].encoder.weight.copy_(torch.linalg.pinv(model.flows[0].decoder.weight))
    for group in law(model).surrogate_bias(20):
        assert group.relative_error < 1e-12
        assert group.cosine == pytest.approx(1.0)

    before = torch.get_rng_state()
    bias = law(paraboloid(Drop())).surrogate_bias(500)
    assert torch.equal(before, torch.get_rng_state())
    assert bias.decoder.relative_error == pytest.approx(1.0, abs=1e-5)


@pytest.mark.slow
def test_bias_of_an_encoder_that_saw_only_the_manifold_is_found():
    errors = {}
    for noise in (0.0, 0.3):
        manual_seed(0)
        encoder = nfi.nets.SmoothMLP(3, 2, (64, 64))
        model = paraboloid(encoder)
        optimizer = torch.optim.Adam(encoder.parameters(), 3e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
        for _ in range(1500):
            z = torch.randn(256, 2)
            x = model.decode(z).detach()
            # On the manifold by the latents; around it by the nearest point.
            if noise == 0:
                loss = (encoder(x) - z).square().sum(1).mean()
            else:
                loss = model.reconstruction_error(x + noise * torch.randn_like(x)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        errors[noise] = law(model).surrogate_bias(1000).decoder.relative_error
    assert errors[0.0] > 0.5
    assert errors[0.3] < 0.2


@pytest.mark.slow
def test_bias_on_given_points_in_images_and_with_a_context():
    base = nf.distributions.DiagGaussian(3, trainable=False)
    pair = nfi.nets.conv_autoencoder((1, 6, 6), 3, (8, 8))
    images = nfi.InjectiveNormalizingFlow(base, [nfi.flows.FreeFormInjection(*pair)])
    distribution = law(images)
    assert distribution.event_shape == (1, 6, 6)
    assert distribution.log_prob(torch.randn(2, 4, 1, 6, 6)).shape == (2, 4)
    assert distribution.surrogate_bias(x=torch.randn(4, 1, 6, 6)).encoder.relative_error > 0

    context = torch.randn(4, 3, dtype=torch.float64)
    conditional = law(flow(context_dim=3), context=context)
    assert conditional.surrogate_bias(10).decoder.relative_error > 0
    # Without trained parameters there is no gradient to compare.
    frozen = flow().requires_grad_(False)
    assert math.isnan(law(frozen).surrogate_bias(10).decoder.relative_error)


# Training


@pytest.mark.slow
@pytest.mark.parametrize("volume", ["exact", "surrogate"])
def test_noise_learned_from_a_wide_start_collapses_by_exact_gradients_alone(volume):
    frame = torch.linalg.qr(torch.randn(10, 2))[0] * torch.tensor([3.86, 3.03])
    x = torch.randn(512, 2) @ frame.T + 0.1 * torch.randn(512, 10)
    model = linear(10, 2).float()
    log_sigma = nn.Parameter(torch.tensor(2.0).log())
    distribution = law(model, "thicken", volume=volume, noise_scale=log_sigma.exp)
    optimizer = torch.optim.Adam([*model.parameters(), log_sigma], 1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)
        for _ in range(800):
            loss = -distribution.log_prob(x[torch.randint(512, (128,))]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    smallest = torch.linalg.svdvals(model.flows[0].decoder.weight.detach())[-1]
    if volume == "exact":
        assert smallest < 0.1
    else:
        assert smallest > 1.0  # 2.6 to 3.1 by seeds
        assert float(log_sigma.detach().exp()) == pytest.approx(0.1, rel=0.3)


@pytest.mark.slow
def test_training_recovers_probabilistic_pca_with_either_volume():
    """Within 0.05 nats of the truth, and the two volumes within 0.02 of each other."""
    manual_seed(0)
    frame = torch.linalg.qr(torch.randn(10, 2))[0] * torch.tensor([3.86, 3.03])
    covariance = frame @ frame.T + 0.01 * torch.eye(10)
    truth = torch.distributions.MultivariateNormal(torch.zeros(10), covariance)
    train, test = truth.sample((2000,)), truth.sample((4000,))
    scores = {}
    steps, start, end = 700, 0.6, 0.15
    for volume in ("exact", "surrogate"):
        pyro.set_rng_seed(shifted(1))
        pyro.clear_param_store()
        model = linear(10, 2).float()
        sigma = torch.tensor(start)

        def likelihood(model=model, volume=volume, sigma=sigma):
            pyro.module("flow", model)
            distribution = law(model, "thicken", volume=volume, noise_scale=sigma)
            with pyro.plate("data", len(train), subsample_size=512) as index:
                pyro.sample("x", distribution, obs=train[index])

        optimizer = pyro.optim.ClippedAdam(
            {"lr": 0.06, "lrd": 0.02 ** (1 / steps), "clip_norm": 1e9}
        )
        svi = SVI(likelihood, lambda: None, optimizer, Trace_ELBO())
        for step in range(steps):
            # Noise that narrows: within narrow noise the pair can hardly change its scale.
            sigma.fill_(max(end, start * (end / start) ** (step / (0.7 * steps))))
            svi.step()
        with torch.no_grad():
            noise = (model.reconstruction_error(train).mean() / 8).sqrt()
            score = law(model, "thicken", noise_scale=noise).log_prob(test)
        scores[volume] = float(score.mean())
    exact = float(truth.log_prob(test).mean())
    assert abs(scores["exact"] - exact) < 0.05
    assert abs(scores["exact"] - scores["surrogate"]) < 0.02

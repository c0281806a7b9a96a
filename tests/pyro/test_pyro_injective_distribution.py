"""Learned manifolds as Pyro distributions: densities, gradients, policies, contracts of Pyro."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
import warnings

import normflows as nf
import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO
from support.manifolds import CurvedSurface
from support.paths import EXAMPLES
from support.seeds import manual_seed, shifted
from torch import nn

import normflows_injective as nfi
from normflows_injective.errors import (
    CollapseWarning,
    NotInjectiveError,
    OffManifoldError,
    OptionError,
    ShapeError,
    UnsupportedModelError,
)
from normflows_injective.pyro.laws.injective_distribution import InjectiveDistribution

D, RANK = 5, 2
POLICIES = {"reject": {"tol": 10.0}, "project": {}, "thicken": {"noise_scale": 0.3}}


def flow(latent=True, context_dim=0, **likelihood):
    pair = nfi.nets.mlp_autoencoder(D, RANK, (8,), context_dim)
    layers = [nfi.flows.FreeFormInjection(*pair)]
    if latent:
        layers = [nf.flows.LULinearPermute(RANK), *layers]
    base = nf.distributions.DiagGaussian(RANK, trainable=True)
    terms = nfi.SurrogateLikelihood(**likelihood) if likelihood else None
    return nfi.InjectiveNormalizingFlow(base, layers, terms).double()


def linear(data_dim=D, latent_dim=RANK, bias=True):
    pair = nn.Linear(data_dim, latent_dim, bias=bias), nn.Linear(latent_dim, data_dim, bias=bias)
    base = nf.distributions.DiagGaussian(latent_dim, trainable=False)
    return nfi.InjectiveNormalizingFlow(base, [nfi.flows.FreeFormInjection(*pair)]).double()


def law(model, off_manifold="project", **options):
    return InjectiveDistribution(
        model, off_manifold=off_manifold, **{**POLICIES.get(off_manifold, {}), **options}
    )


def data(*shape):
    return torch.randn(*shape, D, dtype=torch.float64)


def parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


# Densities


def test_projected_density_is_the_models():
    model, x = flow(), data(7)
    distribution = law(model)
    torch.testing.assert_close(distribution.log_prob(x), model.log_prob(x), rtol=0, atol=1e-12)
    z = model.inverse(x)
    expected = model.q0.log_prob(z) - distribution.log_prob(x)
    torch.testing.assert_close(distribution.log_volume(x), expected, rtol=0, atol=1e-12)
    assert distribution.log_volume(data(3, 2)).shape == (3, 2)


def test_thickened_density_of_a_plane_is_the_normal_law_for_small_noise():
    """Against the closed form: the covariance W W^T + sigma^2 I, with W's pseudo-inverse."""
    model = linear(6, 2, bias=False)
    injection = model.flows[0]
    with torch.no_grad():
        injection.encoder.weight.copy_(torch.linalg.pinv(injection.decoder.weight))
    weight = injection.decoder.weight.detach()
    for sigma, bound in ((1e-2, 0.02), (1e-3, 2e-4)):
        covariance = weight @ weight.T + sigma**2 * torch.eye(6, dtype=torch.float64)
        truth = torch.distributions.MultivariateNormal(torch.zeros(6).double(), covariance)
        x = truth.sample((500,))
        score = law(model, "thicken", noise_scale=sigma).log_prob(x)
        assert abs(float((score - truth.log_prob(x)).mean().detach())) < bound


class NearestPoint(nn.Module):
    """Encoder that projects onto a CurvedSurface, by Gauss-Newton steps."""

    def __init__(self, surface):
        super().__init__()
        self.surface = surface

    def forward(self, x):
        z = x[:, :2]
        for _ in range(30):
            jacobian = self.surface.jacobian(z)
            gap = (x - self.surface.decode(z)).unsqueeze(2)
            z = z + torch.linalg.lstsq(jacobian, gap).solution.squeeze(2)
        return z


class Decode(nn.Module):
    def __init__(self, surface):
        super().__init__()
        self.surface = surface

    def forward(self, z):
        return self.surface.decode(z)


def curved_flow():
    surface = CurvedSurface()
    base = nf.distributions.DiagGaussian(2, trainable=False).double()
    pair = NearestPoint(surface), Decode(surface)
    return surface, nfi.InjectiveNormalizingFlow(base, [nfi.flows.FreeFormInjection(*pair)])


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "bound"), [(0.1, 0.04), (0.03, 0.01)])
def test_thickened_density_of_a_curved_surface_agrees_with_importance_sampling(sigma, bound):
    surface, model = curved_flow()
    count, draws = 300, 2000
    x = surface.sample(count, 0, torch.float64)
    x = x + sigma * torch.randn_like(x)
    score = law(model, "thicken", noise_scale=sigma).log_prob(x)

    # Draws around the projection, by the covariance of the posterior for small noise.
    mean = model.inverse(x)
    jacobian = surface.jacobian(mean)
    precision = jacobian.mT @ jacobian / sigma**2 + torch.eye(2)
    posterior = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)
    z = posterior.sample((draws,))
    decoded = surface.decode(z.flatten(0, 1)).view(draws, count, D)
    normal = torch.distributions.Normal
    weights = (
        normal(decoded, sigma).log_prob(x).sum(2)
        + normal(0.0, 1.0).log_prob(z).sum(2)
        - posterior.log_prob(z)
    )
    truth = weights.logsumexp(0) - math.log(draws)
    assert abs((score - truth).mean().item()) < bound


@pytest.mark.slow
def test_thickened_density_of_a_circle_has_mass_one():
    circle = nfi.InjectiveNormalizingFlow(
        UniformAngle(),
        [nfi.flows.FreeFormInjection(Angle(), OnCircle())],
    )
    distribution = InjectiveDistribution(circle, off_manifold="thicken", noise_scale=0.05)
    steps = torch.linspace(-1.5, 1.5, 601)
    score = distribution.log_prob(torch.cartesian_prod(steps, steps))
    # On the measure of the tube dx is (1 + t) dt ds, whose mean is one.
    assert float(score.exp().sum()) * 0.005**2 == pytest.approx(1.0, abs=2e-3)
    assert distribution.measure == "lebesgue"


class UniformAngle(nf.distributions.BaseDistribution):
    def forward(self, num_samples=1):
        z = (2 * torch.rand(num_samples, 1) - 1) * math.pi
        return z, self.log_prob(z)

    def log_prob(self, z):
        return torch.full((len(z),), -math.log(2 * math.pi))


class Angle(nn.Module):
    def forward(self, x):
        return torch.atan2(x[:, 1:], x[:, :1])


class OnCircle(nn.Module):
    def forward(self, z):
        return torch.cat([z.cos(), z.sin()], dim=1)


def test_known_surfaces_are_exact():
    sphere = known_sphere()
    distribution = InjectiveDistribution(sphere, tol=1e-5)
    x = distribution.sample((6,))
    torch.testing.assert_close(distribution.log_prob(x.clone()), sphere.log_prob(x))
    torch.testing.assert_close(distribution.log_prob(x), sphere.log_prob(x))
    assert distribution.measure == "hausdorff"
    with pytest.raises(OptionError, match="closed form"):
        InjectiveDistribution(sphere, volume="surrogate")
    with pytest.raises(UnsupportedModelError, match="known surface"):
        distribution.surrogate_bias()
    with pytest.raises(OffManifoldError, match="where 1e-05 is allowed"):
        distribution.log_prob(1.1 * x)


def known_sphere():
    base = nf.distributions.DiagGaussian(2, trainable=False)
    return nfi.InjectiveNormalizingFlow(base, [nfi.flows.SphereChart(3)])


def test_thickening_needs_the_surfaces_own_measure():
    simplex = nfi.InjectiveNormalizingFlow(
        nf.distributions.DiagGaussian(2, trainable=False),
        [nfi.flows.SimplexStickBreaking(3, measure="lebesgue")],
    )
    assert InjectiveDistribution(simplex).measure == "lebesgue"
    with pytest.raises(OptionError, match="declare 'lebesgue'"):
        InjectiveDistribution(simplex, off_manifold="thicken", noise_scale=0.1)


# Gradients


@pytest.mark.slow
@pytest.mark.parametrize("off_manifold", POLICIES)
def test_gradients_are_those_of_finite_differences(off_manifold):
    """In every parameter of base, latent layer, encoder and decoder, and in the noise scale."""
    model, x = flow(), data(3)
    log_sigma = nn.Parameter(torch.tensor(-0.7, dtype=torch.float64))
    options = {"noise_scale": log_sigma.exp} if off_manifold == "thicken" else {}
    distribution = law(model, off_manifold, volume="exact", **options)
    inputs = [*parameters(model), *([log_sigma] if options else [])]

    def score():
        return distribution.log_prob(x).sum()

    gradients = torch.autograd.grad(score(), inputs, materialize_grads=True, allow_unused=True)
    step = 1e-6
    for parameter, gradient in zip(inputs, gradients, strict=True):
        for place in range(parameter.numel()):
            flat = parameter.data.view(-1)
            kept = float(flat[place])
            with torch.no_grad():
                flat[place] = kept + step
                above = float(score())
                flat[place] = kept - step
                below = float(score())
                flat[place] = kept
            slope = (above - below) / (2 * step)
            assert float(gradient.view(-1)[place]) == pytest.approx(slope, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("estimator", ["encoder", "decoder"])
@pytest.mark.parametrize("off_manifold", POLICIES)
def test_surrogate_has_the_exact_value_and_the_raw_surrogates_gradient(off_manifold, estimator):
    model = flow(estimator=estimator, probes="rademacher")
    x = data(6)
    corrected = law(model, off_manifold, volume="surrogate")
    exact = law(model, off_manifold, volume="exact")
    manual_seed(3)
    score = corrected.log_prob(x)
    torch.testing.assert_close(score, exact.log_prob(x), rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(corrected.log_prob(x), score, rtol=0, atol=1e-12)

    manual_seed(3)
    terms = model.loss_terms(x)
    raw = terms.log_prob_latent - terms.surrogate
    if off_manifold == "thicken":
        raw = raw - terms.reconstruction_error / (2 * 0.3**2)
    inputs = parameters(model)
    found, expected = (
        torch.autograd.grad(value.sum(), inputs, materialize_grads=True, allow_unused=True)
        for value in (score, raw)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_surrogate_with_a_pseudo_inverse_has_the_exact_gradient():
    injection = nfi.flows.LinearInjection(RANK, D)
    base = nf.distributions.DiagGaussian(RANK, trainable=False)
    model = nfi.InjectiveNormalizingFlow(
        base, [injection], nfi.SurrogateLikelihood(num_probes=RANK)
    ).double()
    x = data(6)
    gradients = [
        torch.autograd.grad(law(model, volume=volume).log_prob(x).sum(), [injection.weight])[0]
        for volume in ("exact", "surrogate")
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


def test_volume_auto_depends_on_the_dimension():
    for latent_dim, volume in ((16, "exact"), (17, "surrogate")):
        model, x = linear(20, latent_dim), torch.randn(2, 20, dtype=torch.float64)
        manual_seed(0)
        score = law(model).log_prob(x).sum()
        manual_seed(0)
        other = law(model, volume=volume).log_prob(x).sum()
        inputs = [model.flows[0].encoder.weight, model.flows[0].decoder.weight]
        pairs = (
            torch.autograd.grad(s, inputs, materialize_grads=True, allow_unused=True)
            for s in (score, other)
        )
        for one, expected in zip(*pairs, strict=True):
            torch.testing.assert_close(one, expected, rtol=0, atol=0)


@pytest.mark.parametrize("off_manifold", POLICIES)
def test_a_surrogate_never_scores_its_own_draws(off_manifold):
    model = flow()
    distribution = law(model, off_manifold, volume="surrogate")
    with pytest.raises(UnsupportedModelError, match="drew itself"):
        distribution.rsample_and_log_prob((3,))
    with torch.no_grad():
        x, score = distribution.rsample_and_log_prob((3,))
    exact = law(model, off_manifold, volume="exact")
    if off_manifold == "thicken":
        torch.testing.assert_close(score, exact.log_prob(x))
    # By copies of them it cannot know; then it scores them as data.
    assert distribution.log_prob(x.clone()).shape == (3,)


def test_draws_are_scored_without_the_encoder_and_with_gradients():
    model = flow()
    x, score = law(model, volume="auto").rsample_and_log_prob((4,))
    gradients = torch.autograd.grad(score.sum(), parameters(model), allow_unused=True)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    missing = {n for n, g in zip(names, gradients, strict=True) if g is None}
    assert missing == {n for n in names if "encoder" in n} | {
        n for n in names if n.endswith("decoder.layers.2.bias")
    }
    manual_seed(1)
    z, log_q = model.q0(4)
    manual_seed(1)
    again, score = law(model).rsample_and_log_prob((4,))
    decoded, log_det = model.forward_and_log_det(z)
    torch.testing.assert_close(again, decoded)
    torch.testing.assert_close(score, log_q - log_det)


def test_draws_that_are_thickened_have_noise_of_the_scale_and_its_gradient():
    model = linear(8, 2)
    with torch.no_grad():
        model.flows[0].encoder.weight.copy_(torch.linalg.pinv(model.flows[0].decoder.weight))
        decode = model.flows[0].decoder
        model.flows[0].encoder.bias.copy_(-model.flows[0].encoder.weight @ decode.bias)
    sigma = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = law(model, "thicken", noise_scale=sigma).rsample((20000,))
    away = model.reconstruction_error(x).mean() / 6
    assert float(away.detach()) == pytest.approx(0.09, rel=0.03)
    (gradient,) = torch.autograd.grad(away, sigma)
    assert float(gradient) == pytest.approx(2 * 0.3, rel=0.03)


def test_an_encoder_without_a_derivative_is_refused():
    class Cut(nn.Module):
        def forward(self, x):
            return x[:, :RANK].detach()

    base = nf.distributions.DiagGaussian(RANK, trainable=False)
    pair = Cut(), nn.Linear(RANK, D)
    model = nfi.InjectiveNormalizingFlow(base, [nfi.flows.FreeFormInjection(*pair)])
    x = torch.randn(3, D)
    assert law(model, volume="exact").log_prob(x).isfinite().all()
    with pytest.raises(NotInjectiveError, match=r"Remove detach\(\)"):
        law(model, volume="surrogate").log_prob(x)
    with torch.no_grad():  # where no derivative of it is needed
        assert law(model, volume="surrogate").log_prob(x).isfinite().all()


# Off the manifold


def test_values_off_the_manifold_are_rejected():
    model = linear()
    with torch.no_grad():
        encoder, decoder = model.flows[0].encoder, model.flows[0].decoder
        encoder.weight.copy_(torch.linalg.pinv(decoder.weight))
        encoder.bias.copy_(-encoder.weight @ decoder.bias)
    on = model.sample(4)[0].detach()
    away = torch.linalg.qr(decoder.weight.detach(), mode="complete").Q[:, -1]
    off = on + away
    strict = InjectiveDistribution(model, validate_args=True)
    torch.testing.assert_close(strict.log_prob(on), model.log_prob(on))
    residual = (1 / (1 + off.norm(dim=1))).max()
    message = rf"2 of 4 values lie off .* worst by {residual:.3g} of its size, where 0.001 is"
    mixed = torch.cat([on[:2], off[2:]])
    with pytest.raises(OffManifoldError, match="where 0.001 is allowed"):
        strict.log_prob(mixed)
    with pytest.raises(ValueError, match=message.replace(f"{residual:.3g}", r"[\d.]+")):
        strict.log_prob(mixed)
    assert strict.support.check(mixed).tolist() == [True, True, False, False]

    lenient = InjectiveDistribution(model, validate_args=False)
    scores = lenient.log_prob(mixed)
    assert scores[2:].tolist() == [-math.inf, -math.inf]
    torch.testing.assert_close(scores[:2], model.log_prob(on[:2]))
    scores[:2].sum().backward()
    assert decoder.weight.grad.isfinite().all()
    assert lenient.log_prob(off).tolist() == [-math.inf] * 4
    # A wider tolerance takes them, as projections do, which thickening does not.
    torch.testing.assert_close(law(model, "reject").log_prob(off), model.log_prob(off))
    torch.testing.assert_close(law(model, "project").log_prob(off), model.log_prob(on))
    for shift, expected in ((on, 0.0), (off, 1.0)):
        score = law(model, "thicken", noise_scale=0.5).log_prob(shift)
        noise = expected / (2 * 0.25) + 1.5 * math.log(2 * math.pi * 0.25)
        torch.testing.assert_close(score, model.log_prob(on) - noise)


def test_rejection_keeps_each_value_with_its_context():
    base = nf.distributions.base.ConditionalDiagGaussian(RANK, nn.Linear(3, 2 * RANK))
    model = nfi.InjectiveNormalizingFlow(base, [nfi.flows.LinearInjection(RANK, D)]).double()
    context = torch.randn(4, 3, dtype=torch.float64)
    x = model.sample(4, context)[0].detach()
    far = torch.tensor([True, False, True, False])
    x[far] += 1.0
    distribution = InjectiveDistribution(model, context=context, validate_args=False)
    scores = distribution.log_prob(x)
    assert (scores == -math.inf).tolist() == far.tolist()
    torch.testing.assert_close(scores[~far], model.log_prob(x, context)[~far])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"volume": "lanczos"}, "volume must be one of auto, exact, surrogate, got 'lanczos'"),
        ({"off_manifold": "clip"}, "off_manifold must be one of reject, project, thicken"),
        ({"off_manifold": "thicken"}, "needs noise_scale="),
        ({"off_manifold": "thicken", "noise_scale": 0.0}, "positive and finite, got 0"),
        ({"off_manifold": "thicken", "noise_scale": -1}, "positive and finite, got -1"),
        ({"off_manifold": "thicken", "noise_scale": math.nan}, "positive and finite, got nan"),
        ({"off_manifold": "thicken", "noise_scale": torch.tensor(-0.5)}, "got -0.5"),
        ({"off_manifold": "thicken", "noise_scale": "0.1"}, "callable that gives one, got '0.1'"),
        ({"off_manifold": "thicken", "noise_scale": torch.ones(3)}, "one number, got shape"),
        ({"off_manifold": "project", "noise_scale": 0.1}, "nothing is noisy"),
        ({"noise_scale": 0.1}, "that is 'reject'"),
        ({"tol": 0.0}, "tol must be a positive number, got 0.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises((OptionError, ShapeError), match=message):
        InjectiveDistribution(flow(), **options)


@pytest.mark.slow
def test_other_refusals():
    plain = nf.NormalizingFlow(nf.distributions.DiagGaussian(2), [nf.flows.Permute(2)])
    with pytest.raises(OptionError, match="must be an nfi.InjectiveNormalizingFlow, got Normal"):
        InjectiveDistribution(plain)
    late = law(flow(), "thicken", noise_scale=lambda: torch.tensor(-1.0))
    with pytest.raises(OptionError, match="got -1"):
        late.log_prob(data(2))
    with pytest.raises(OptionError, match="no noise to compare"):
        law(flow()).check_collapse(data(100))
    with pytest.raises(ShapeError, match=r"must end in the event shape \(5,\), got \(3, 1\)"):
        law(flow()).log_volume(torch.ones(3, 1))
    with pytest.raises(ShapeError, match="at least 10 data points, got 4"):
        law(flow(), "thicken").check_collapse(data(4))


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


# Contracts of Pyro


@pytest.mark.slow
@pytest.mark.parametrize("off_manifold", POLICIES)
def test_shapes(off_manifold):
    distribution = law(flow(), off_manifold)
    assert distribution().shape == (D,)
    for expanded in (distribution.expand([4]), distribution.expand([1]).expand([4])):
        assert expanded.rsample((3,)).shape == (3, 4, D)
        assert expanded.log_prob(data(3, 1)).shape == (3, 4)
    assert distribution.expand([2, 4]).to_event(1).log_prob(data(2, 4)).shape == (2,)
    assert distribution.expand([2]).to_event(1).event_shape == (2, D)
    masked = distribution.expand([3]).mask(torch.tensor([True, False, True]))
    assert masked.log_prob(data(3))[1] == 0
    assert repr(distribution.expand([4])).startswith(
        "InjectiveDistribution(InjectiveNormalizingFlow, batch_shape=(4,), event_shape=(5,)"
    )
    assert distribution.has_rsample
    dtype = law(flow().float(), off_manifold).rsample((2,)).dtype
    assert dtype == torch.float32


def test_a_context_gives_the_batch_shape():
    model, x = flow(context_dim=3), data(6)
    context = torch.randn(6, 3, dtype=torch.float64)
    distribution = law(model, context=context)
    assert distribution.batch_shape == (6,)
    torch.testing.assert_close(distribution.log_prob(x), model.log_prob(x, context))
    assert distribution.log_prob(data(2, 1)).shape == (2, 6)
    assert distribution.log_volume(data(2, 1)).shape == (2, 6)
    assert law(model, "thicken", context=context).rsample((4,)).shape == (4, 6, D)
    surrogate = law(model, "thicken", volume="surrogate", context=context)
    torch.testing.assert_close(
        surrogate.log_prob(x), law(model, "thicken", context=context).log_prob(x)
    )


@pytest.mark.parametrize("volume", ["exact", "surrogate"])
def test_data_scored_twice_around_a_change_get_the_present_density(volume):
    model, x = flow(), data(5)
    distribution = law(model, "thicken", volume=volume)
    loss = -distribution.log_prob(x).mean()
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    after = distribution.log_prob(x)
    torch.testing.assert_close(after, law(model, "thicken").log_prob(x))
    assert not torch.allclose(after.mean(), -loss)
    after.sum().backward()


@pytest.mark.parametrize("off_manifold", POLICIES)
def test_copies_and_pickles_after_a_step(off_manifold):
    distribution = law(flow(), off_manifold)
    x, score = distribution.rsample_and_log_prob((3,))
    score.sum().backward()
    given = data(4)
    for again in (copy.deepcopy(distribution), pickle.loads(pickle.dumps(distribution))):
        torch.testing.assert_close(again.log_prob(given), distribution.log_prob(given))
        assert again.model is not distribution.model


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-2.5))

    def forward(self):
        return self.log_scale.exp()


@pytest.mark.parametrize("volume", ["exact", "surrogate"])
@pytest.mark.parametrize(
    "elbo",
    [
        lambda: Trace_ELBO(),
        lambda: Trace_ELBO(num_particles=2, vectorize_particles=True),
        lambda: RenyiELBO(alpha=0.5, num_particles=2, vectorize_particles=True),
    ],
    ids=["trace", "particles", "renyi"],
)
def test_as_a_likelihood_in_a_subsampled_plate(elbo, volume):
    model, noise, x = flow(), Noise(), data(20)

    def likelihood():
        pyro.module("flow", model)
        pyro.module("noise", noise)
        shift = pyro.sample("shift", pyro.distributions.Normal(0.0, 1.0).expand([D]).to_event(1))
        distribution = law(model, "thicken", volume=volume, noise_scale=noise)
        with pyro.plate("data", len(x), subsample_size=8) as index:
            pyro.sample("x", distribution, obs=x[index] - shift.unsqueeze(-2).double())

    guide = pyro.infer.autoguide.AutoNormal(likelihood)
    svi = SVI(likelihood, guide, pyro.optim.Adam({"lr": 0.01}), elbo())
    before = {name: p.clone() for name, p in [*model.named_parameters(), ("s", noise.log_scale)]}
    losses = [svi.step() for _ in range(4)]
    assert all(map(math.isfinite, losses))
    after = dict([*model.named_parameters(), ("s", noise.log_scale)])
    assert all(not torch.equal(before[n], p) for n, p in after.items() if p.requires_grad)


def test_renyi_sees_exact_values_with_either_volume():
    model, x = flow(), data(6)
    losses = []
    for volume in ("exact", "surrogate"):
        pyro.set_rng_seed(shifted(0))

        def likelihood(volume=volume):
            with pyro.plate("data", len(x)):
                pyro.sample("x", law(model, "thicken", volume=volume), obs=x)

        losses.append(RenyiELBO(alpha=0.0, num_particles=2).loss(likelihood, lambda: None))
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)


def test_predictive_draws_from_plates():
    model = flow()

    def simulate():
        with pyro.plate("data", 6):
            pyro.sample("x", law(model, "thicken", volume="surrogate"))

    for parallel in (False, True):
        drawn = Predictive(simulate, num_samples=3, parallel=parallel)()
        assert drawn["x"].shape == (3, 6, D)


def test_as_a_prior_and_a_guide():
    """The divergence of two laws on one manifold, that of their bases by the closed form."""
    model = linear(bias=False)
    moved = copy.deepcopy(model)
    moved.q0 = nf.distributions.DiagGaussian(RANK, trainable=True).double()
    moved.flows = model.flows
    with torch.no_grad():
        moved.q0.loc.fill_(0.5)
        model.flows[0].encoder.weight.copy_(torch.linalg.pinv(model.flows[0].decoder.weight))

    def prior():
        pyro.sample("x", InjectiveDistribution(model))

    def guide():
        pyro.module("base", moved.q0)
        pyro.sample("x", InjectiveDistribution(moved))

    # Standard errors are 0.02, of log-weights of variance one half, and 0.03.
    elbo = Trace_ELBO(num_particles=2000, vectorize_particles=True)
    loss = elbo.loss_and_grads(prior, guide)
    assert loss == pytest.approx(RANK * 0.5**2 / 2, abs=0.1)
    torch.testing.assert_close(
        moved.q0.loc.grad, torch.full_like(moved.q0.loc, 0.5), rtol=0, atol=0.15
    )


# The example

EXAMPLE = EXAMPLES / "pyro" / "vae.py"


@pytest.mark.slow
def test_the_example_of_the_autoencoder_runs(tmp_path):
    pytest.importorskip("sklearn")
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--quick", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 8
    assert "nan" not in done.stdout
    assert (tmp_path / "pyro_vae.png").stat().st_size > 0


@pytest.mark.slow
def test_the_example_says_what_to_install_without_pyro():
    pytest.importorskip("sklearn")
    hide = f"import runpy, sys; sys.modules['pyro'] = None; runpy.run_path({str(EXAMPLE)!r})"
    done = subprocess.run(
        [sys.executable, "-c", hide], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode != 0
    assert "pip install normflows-injective[pyro]" in done.stderr


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

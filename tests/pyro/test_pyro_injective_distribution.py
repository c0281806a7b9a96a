"""Learned manifolds as Pyro distributions: densities, gradients, values off the manifold."""

from __future__ import annotations

import math

import normflows as nf
import pytest
import torch
from support.manifolds import CurvedSurface
from support.pyro_manifolds import POLICIES, RANK, D, data, flow, law, linear, parameters
from support.seeds import manual_seed
from torch import nn

import normflows_injective as nfi
from normflows_injective.errors import (
    NotInjectiveError,
    OffManifoldError,
    OptionError,
    ShapeError,
    UnsupportedModelError,
)
from normflows_injective.pyro.laws.injective_distribution import InjectiveDistribution

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
    actual, expected = (
        torch.autograd.grad(value.sum(), inputs, materialize_grads=True, allow_unused=True)
        for value in (score, raw)
    )
    for one, other in zip(actual, expected, strict=True):
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

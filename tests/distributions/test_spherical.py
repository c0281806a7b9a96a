"""Densities on the unit sphere, against quadrature, Bessel functions and their own samples.

Statistical tests start from a fixed seed and say how many standard errors they allow.
"""

from __future__ import annotations

import copy
import math

import normflows as nf
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from support.seeds import manual_seed
from torch.autograd import gradcheck, gradgradcheck

import normflows_injective as nfi
from normflows_injective.distributions.spherical import (
    AngularCentralGaussian,
    UniformSphere,
    log_sphere_area,
)
from normflows_injective.distributions.von_mises_fisher import VonMisesFisher, log_normaliser
from normflows_injective.flows.surfaces.off_manifold import check_policy, unit_vectors

DIMS = (2, 3, 4, 5, 10, 50, 300, 2000)
KAPPAS = (1e-3, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 1e5, 1e6)


def double(values):
    return torch.as_tensor(values, dtype=torch.float64)


def on_sphere(count, dim):
    return torch.nn.functional.normalize(torch.randn(count, dim, dtype=torch.float64))


def von_mises_fisher(loc, kappa, trainable=False, **options):
    return VonMisesFisher(double(loc), kappa, trainable, **options).double()


def skewed(dim):
    noise = torch.randn(dim, dim, dtype=torch.float64)
    # Well conditioned for all seeds, as quadrature needs.
    return torch.eye(dim, dtype=torch.float64) + 0.5 * noise / torch.linalg.matrix_norm(noise, 2)


def distributions(dim, trainable=False):
    return [
        UniformSphere(dim).double(),
        AngularCentralGaussian(skewed(dim), trainable),
        VonMisesFisher(torch.randn(dim, dtype=torch.float64), 2.5, trainable),
    ]


def quadrature(dim):
    """Points of the circle or the sphere with their weights, exact for smooth functions."""
    phi = torch.arange(200, dtype=torch.float64) * (2 * math.pi / 200)
    circle = torch.stack([phi.cos(), phi.sin()], dim=1)
    if dim == 2:
        return circle, double(2 * math.pi / 200).expand(200)
    height, weight = (double(part) for part in np.polynomial.legendre.leggauss(100))
    ring = (1 - height.square()).sqrt()[:, None, None] * circle
    points = torch.cat([ring, height[:, None, None].expand(-1, 200, 1)], dim=2)
    return points.reshape(-1, 3), (weight * 2 * math.pi / 200).repeat_interleave(200)


# --- oracles of the von Mises-Fisher normaliser


def bessel_ratio(dim, kappa):
    """The mean I_{D/2} / I_{D/2-1}: by scipy, or by its continued fraction where it underflows."""
    order = dim / 2 - 1
    scaled = scipy.special.ive(order, kappa)
    if scaled > 1e-200:
        return scipy.special.ive(order + 1, kappa) / scaled
    ratio = 0.0
    for term in reversed(range(2000)):
        ratio = 1 / ((dim + 2 * term) / kappa + ratio)
    return ratio


def log_normaliser_oracle(dim, kappa):
    """By scipy, or by the power series of positive terms where scipy underflows."""
    order = dim / 2 - 1
    scaled = scipy.special.ive(order, kappa)
    if scaled > 1e-200:
        return dim / 2 * math.log(2 * math.pi) + math.log(scaled) + kappa - order * math.log(kappa)
    terms = [1.0]
    for m in range(1, 4000):
        terms.append(terms[-1] * (kappa / 2) ** 2 / (m * (order + m)))
    return log_sphere_area(dim) + math.log(math.fsum(terms))


@pytest.mark.parametrize(
    ("dim", "kappa", "log_constant"),
    [
        (2, 3, -3.4231847),
        (3, 5, -5.2283938),
        (5, 30, -26.8394578),
        (10, 30, -22.6984525),
        (50, 100, -29.3220183),
    ],
)
def test_normaliser_at_tabulated_values(dim, kappa, log_constant):
    assert -log_normaliser(double(kappa), dim).item() == pytest.approx(log_constant, abs=5.1e-8)


@pytest.mark.parametrize("dim", DIMS)
def test_normaliser_against_bessel_functions(dim):
    actual = log_normaliser(double(KAPPAS), dim)
    expected = double([log_normaliser_oracle(dim, kappa) for kappa in KAPPAS])
    torch.testing.assert_close(actual, expected, rtol=3e-14, atol=3e-14)


@pytest.mark.parametrize("dim", DIMS)
def test_derivatives_of_the_normaliser_are_the_mean_and_the_variance(dim):
    kappa = double(KAPPAS).requires_grad_()
    (mean,) = torch.autograd.grad(log_normaliser(kappa, dim).sum(), kappa, create_graph=True)
    expected = double([bessel_ratio(dim, k) for k in KAPPAS])
    torch.testing.assert_close(mean.detach(), expected, rtol=1e-10, atol=1e-14)
    (variance,) = torch.autograd.grad(mean.sum(), kappa)
    # The mean solves a Riccati equation, which loses digits where three terms nearly cancel.
    riccati = 1 - expected.square() - (dim - 1) / kappa.detach() * expected
    torch.testing.assert_close(variance, riccati, rtol=1e-9, atol=1e-12)


def test_variance_of_a_narrow_distribution_keeps_its_digits():
    kappa = double([1e4, 1e6, 1e8]).requires_grad_()
    (mean,) = torch.autograd.grad(log_normaliser(kappa, 3).sum(), kappa, create_graph=True)
    (variance,) = torch.autograd.grad(mean.sum(), kappa)
    # In three dimensions it is 1 / kappa^2 - 1 / sinh(kappa)^2.
    torch.testing.assert_close(variance, kappa.detach() ** -2, rtol=1e-11, atol=0)


def test_normaliser_of_the_sphere_in_closed_form_and_at_no_concentration():
    kappa = double([1e-3, 0.5, 20.0])
    expected = (4 * math.pi * kappa.sinh() / kappa).log()
    torch.testing.assert_close(log_normaliser(kappa, 3), expected, rtol=1e-14, atol=0)
    for dim in DIMS:
        zero = double(0.0).requires_grad_()
        value = log_normaliser(zero, dim)
        assert value.item() == pytest.approx(log_sphere_area(dim), rel=1e-14)
        (mean,) = torch.autograd.grad(value, zero, create_graph=True)
        assert abs(mean.item()) < 1e-15
        assert torch.autograd.grad(mean, zero)[0].item() == pytest.approx(1 / dim, rel=1e-13)


def test_normaliser_of_a_batch_is_even_and_differentiable_twice():
    kappa = double([[-4.0, 0.0], [4.0, 300.0]]).requires_grad_()
    value = log_normaliser(kappa, 4)
    assert value.shape == kappa.shape
    assert value[0, 0].item() == pytest.approx(value[1, 0].item(), rel=1e-15)
    assert gradcheck(lambda k: log_normaliser(k, 4), kappa)
    assert gradgradcheck(lambda k: log_normaliser(k, 4), kappa)
    each = torch.func.vmap(torch.func.grad(lambda k: log_normaliser(k, 4)))(kappa.flatten())
    (together,) = torch.autograd.grad(value.sum(), kappa)
    torch.testing.assert_close(each.reshape(2, 2).detach(), together, rtol=1e-14, atol=1e-15)


def test_normaliser_stays_in_double_precision():
    assert log_normaliser(torch.tensor(2.0), 3).dtype == torch.float64


# --- densities


def test_areas():
    for dim, area in ((2, 6.283185307), (3, 12.566370614), (5, 26.318945070)):
        assert math.exp(log_sphere_area(dim)) == pytest.approx(area, abs=5.1e-10)
        base = UniformSphere(dim).double()
        assert base.log_prob(on_sphere(1, dim)).neg().exp().item() == pytest.approx(
            area, abs=5.1e-10
        )
    assert math.exp(log_sphere_area(1)) == pytest.approx(2.0)


@pytest.mark.parametrize("dim", [2, 3])
def test_total_mass_is_one(dim):
    points, weights = quadrature(dim)
    generic = torch.randn(dim)
    candidates = [
        *distributions(dim),
        von_mises_fisher(generic, 0.0),
        von_mises_fisher(generic, 30.0),
    ]
    for distribution in candidates:
        mass = distribution.log_prob(points).exp() @ weights
        assert mass.item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("dim", [2, 3, 7, 500])
def test_no_concentration_is_uniform(dim):
    x = on_sphere(4, dim)
    uniform = UniformSphere(dim).double()
    torch.testing.assert_close(
        von_mises_fisher(torch.randn(dim), 0.0).log_prob(x),
        uniform.log_prob(x),
        rtol=1e-13,
        atol=0,
    )
    torch.testing.assert_close(
        AngularCentralGaussian(3 * torch.eye(dim, dtype=torch.float64)).log_prob(x),
        uniform.log_prob(x),
        rtol=1e-13,
        atol=1e-12,
    )


@pytest.mark.parametrize("dim", [2, 3, 10, 100])
def test_angular_gaussian_is_the_uniform_law_pushed_by_the_matrix(dim):
    scale, u = skewed(dim), on_sphere(6, dim)
    y = u @ scale.T
    log_det = torch.linalg.slogdet(scale).logabsdet - dim * y.norm(dim=1).log()
    actual = AngularCentralGaussian(scale).log_prob(y / y.norm(dim=1, keepdim=True))
    torch.testing.assert_close(
        actual, UniformSphere(dim).double().log_prob(u) - log_det, rtol=1e-12, atol=1e-12
    )


def test_angular_gaussian_by_its_formula_and_up_to_scale():
    scale, x = skewed(5), on_sphere(6, 5)
    covariance = scale @ scale.T
    quadratic = (x @ torch.linalg.inv(covariance) * x).sum(1)
    expected = -math.log(26.318945070) - torch.logdet(covariance) / 2 - 2.5 * quadratic.log()
    torch.testing.assert_close(
        AngularCentralGaussian(scale).log_prob(x), expected, rtol=1e-10, atol=1e-9
    )
    torch.testing.assert_close(
        AngularCentralGaussian(1e-3 * scale).log_prob(x),
        AngularCentralGaussian(scale).log_prob(x),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 3, 6])
def test_densities_are_differentiable_twice_in_points_and_parameters(dim):
    x = on_sphere(3, dim).requires_grad_()
    for distribution in distributions(dim, trainable=True)[1:]:
        model = _LogProb(distribution)
        names, values = zip(*model.named_parameters(), strict=True)

        def call(x, *values, model=model, names=names):
            return torch.func.functional_call(model, dict(zip(names, values, strict=True)), x)

        assert gradcheck(call, (x, *values))
        assert gradgradcheck(call, (x, *values))


class _LogProb(torch.nn.Module):
    def __init__(self, distribution):
        super().__init__()
        self.distribution = distribution

    def forward(self, x):
        return self.distribution.log_prob(x)


def test_gradient_along_the_ray_is_zero():
    x = on_sphere(3, 4).requires_grad_()
    for distribution in distributions(4)[1:]:
        (gradient,) = torch.autograd.grad(distribution.log_prob(x).sum(), x)
        assert (gradient * x).sum(1).abs().max() < 1e-13
        assert gradient.abs().max() > 0.1


@pytest.mark.parametrize("kappa", [0.0, 1e-3])
def test_concentration_has_a_gradient_near_zero(kappa):
    base = von_mises_fisher([0.0, 1.0, 0.0], kappa, trainable=True)
    x = on_sphere(5, 3)
    base.log_prob(x).sum().backward()
    assert base.concentration.grad.item() == pytest.approx(
        (x[:, 1] - kappa / 3).sum().item(), rel=1e-6
    )


def test_concentration_below_zero_is_that_of_the_antipode():
    base, other = (
        von_mises_fisher([1.0, 2.0], 3.0, trainable=True),
        von_mises_fisher([-1.0, -2.0], 3.0),
    )
    with torch.no_grad():
        base.concentration.neg_()
    x = on_sphere(5, 2)
    torch.testing.assert_close(base.log_prob(x).detach(), other.log_prob(x))
    mean = base.sample(2000).mean(0)
    # 4 standard errors of at most 1 / sqrt(2000) each.
    expected = bessel_ratio(2, 3.0) * other.loc
    torch.testing.assert_close(mean, expected, rtol=0, atol=4 / math.sqrt(2000))


# --- samples


@pytest.mark.slow
def test_samples_lie_on_the_sphere_with_their_log_density():
    for dim in (2, 3, 20):
        for distribution in distributions(dim, trainable=True):
            x, log_p = distribution(50)
            assert x.shape == (50, dim)
            assert log_p.shape == (50,)
            torch.testing.assert_close(x.norm(dim=1), torch.ones(50, dtype=x.dtype))
            torch.testing.assert_close(log_p, distribution.log_prob(x), rtol=1e-11, atol=1e-11)
            log_p -= 1.0  # as the host does, in place
            assert distribution.sample(3).shape == (3, dim)
            assert distribution.sample().shape == (1, dim)


MEASURED = [(d, k) for d in (2, 3, 5, 20) for k in (0.0, 0.2, 4.0, 100.0, 1e5)]


@pytest.mark.parametrize(("dim", "kappa"), MEASURED)
def test_moments_of_samples(dim, kappa):
    count = 20000
    base = von_mises_fisher(torch.randn(dim), kappa)
    x = base.sample(count)
    mean = bessel_ratio(dim, kappa) if kappa else 0.0
    across = mean / kappa if kappa else 1 / dim  # second moment in each tangent direction
    t = x @ base.loc
    # 4 standard errors of the mean, from the exact variance 1 - (D-1) across - mean^2.
    exact = von_mises_fisher(base.loc, kappa, trainable=True)
    (first,) = torch.autograd.grad(
        log_normaliser(exact.concentration, dim), exact.concentration, create_graph=True
    )
    (variance,) = torch.autograd.grad(first, exact.concentration)
    assert abs(t.mean().item() - mean) < 4 * math.sqrt(variance.item() / count)
    # Second moments, with 4.5 standard errors for the largest of up to 210 entries.
    products = x[:, :, None] * x[:, None, :]
    direction = torch.outer(base.loc, base.loc)
    expected = across * torch.eye(dim, dtype=x.dtype) + (1 - dim * across) * direction
    error = products.std(0) / math.sqrt(count)
    assert ((products.mean(0) - expected).abs() <= 4.5 * error + 1e-12).all()


def distribution_of_angle(dim, kappa):
    """Cumulative distribution of the angle to the mean direction, by fine quadrature."""
    widest = min(math.pi, 12 * math.sqrt(dim / max(kappa, 1e-9)))
    angle = np.linspace(0, widest, 20001)
    # 1 - cos, without its cancellation.
    density = np.exp(-2 * kappa * np.sin(angle / 2) ** 2) * np.sin(angle) ** (dim - 2)
    total = scipy.integrate.cumulative_simpson(density, x=angle, initial=0)
    return lambda values: np.interp(values, angle, total / total[-1])


@pytest.mark.parametrize(("dim", "kappa"), MEASURED)
def test_law_of_the_angle_to_the_mean_direction(dim, kappa):
    base = von_mises_fisher(torch.randn(dim), kappa)
    chord = (base.sample(20000) - base.loc).norm(dim=1)
    angle = 2 * torch.asin((chord / 2).clamp(max=1))
    result = scipy.stats.kstest(angle.cpu().numpy(), distribution_of_angle(dim, kappa))
    assert result.pvalue > 6e-5  # four standard errors


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_tangent_directions_are_uniform_and_independent_of_the_height(dim):
    count = 20000
    base = von_mises_fisher(torch.randn(dim), 3.0)
    x = base.sample(count)
    t = x @ base.loc
    tangent = torch.nn.functional.normalize(x - t[:, None] * base.loc)
    # 4 standard errors of at most 1 / sqrt(count) for means, also weighted by the height.
    assert tangent.mean(0).abs().max() < 4 / math.sqrt(count)
    assert (t[:, None] * tangent).mean(0).abs().max() < 4 / math.sqrt(count)
    expected = (torch.eye(dim) - torch.outer(base.loc, base.loc)) / (dim - 1)
    second = tangent.T @ tangent / count
    assert (second - expected).abs().max() < 4 / math.sqrt(count)


def test_tangent_angles_on_the_sphere_are_uniform():
    base = von_mises_fisher([1.0, 2.0, -0.5], 10.0)
    x = base.sample(5000)
    basis = torch.linalg.qr(torch.stack([base.loc, *torch.eye(3, dtype=x.dtype)[:2]], dim=1)).Q
    angle = torch.atan2(x @ basis[:, 2], x @ basis[:, 1]) / (2 * math.pi) + 0.5
    assert scipy.stats.kstest(angle.cpu().numpy(), "uniform").pvalue > 6e-5


@pytest.mark.parametrize(
    "loc",
    [
        [1.0, 0.0, 0.0, 0.0],
        [-1.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, -7.0, 0.0],
        [1.0, 1e-12, 0.0, 0.0],
        [-1.0, 1e-12, 0.0, 0.0],
        [0.3, -2.0, 1.0, 0.1],
    ],
)
def test_samples_point_where_they_should(loc):
    base = von_mises_fisher(loc, 1e8)
    torch.testing.assert_close(base.loc.norm().item(), 1.0)
    x = base.sample(10)
    # Each coordinate is off by a few standard deviations of 1e-4.
    torch.testing.assert_close(x, base.loc.expand(10, 4), rtol=0, atol=6e-4)
    assert (x - base.loc).norm(dim=1).min() > 1e-6


def test_samples_of_the_angular_gaussian():
    count = 40000
    base = AngularCentralGaussian(skewed(3))
    points, weights = quadrature(3)
    density = base.log_prob(points).exp() * weights
    x = base.sample(count)
    products = x[:, :, None] * x[:, None, :]
    expected = torch.einsum("n,ni,nj->ij", density, points, points)
    # 4 standard errors, of which there are six second moments and three means.
    error = products.std(0) / math.sqrt(count)
    assert ((products.mean(0) - expected).abs() < 4 * error).all()
    assert (x.mean(0).abs() < 4 * x.std(0) / math.sqrt(count)).all()


def test_samples_of_the_uniform_law():
    x = UniformSphere(4).double().sample(20000)
    # A coordinate of S^3 has the law with density proportional to sqrt(1 - t^2).
    law = scipy.stats.beta(1.5, 1.5, loc=-1, scale=2)
    for coordinate in x.T:
        assert scipy.stats.kstest(coordinate.cpu().numpy(), law.cdf).pvalue > 6e-5


def test_which_samples_carry_a_gradient():
    _, angular, fisher = distributions(3, trainable=True)
    x, log_p = angular(5)
    assert x.requires_grad
    assert log_p.requires_grad
    x, log_p = fisher(5)
    assert not x.requires_grad
    grads = torch.autograd.grad(log_p.sum(), [fisher.loc, fisher.concentration])
    expected = torch.autograd.grad(fisher.log_prob(x).sum(), [fisher.loc, fisher.concentration])
    torch.testing.assert_close(grads, expected)
    assert not distributions(3)[1](5)[1].requires_grad


def test_samples_of_the_angular_gaussian_are_reparameterised():
    scale = skewed(3).requires_grad_()
    base = AngularCentralGaussian(scale)

    def draw(scale):
        manual_seed(1)
        return torch.func.functional_call(base, {"scale": scale}, (4,))

    assert gradcheck(draw, scale)


def test_the_score_of_the_angular_gaussian_has_mean_zero():
    base = AngularCentralGaussian(skewed(3))
    model = _LogProb(base)

    def log_prob(scale, x):
        state = {"distribution.scale": scale}
        return torch.func.functional_call(model, state, x[None])[0]

    x = base.sample(20000)
    scores = torch.func.vmap(torch.func.grad(log_prob), (None, 0))(base.scale, x)
    # 4 standard errors of nine entries.
    assert (scores.mean(0).abs() < 4 * scores.std(0) / math.sqrt(20000)).all()


# --- precision, types and state


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 3, 1000])
def test_single_precision(dim):
    scale = torch.eye(dim) + 0.4 * torch.randn(dim, dim) / math.sqrt(dim)
    candidates = [
        UniformSphere(dim),
        AngularCentralGaussian(scale, trainable=True),
        *(VonMisesFisher(torch.randn(dim), kappa, True) for kappa in (0.0, 1.0, 1e5, 1e6)),
    ]
    for distribution in candidates:
        x, log_p = distribution(20)
        assert x.dtype == log_p.dtype == torch.float32
        assert x.isfinite().all()
        precise = copy.deepcopy(distribution).double()
        x = x.detach()
        value = distribution.log_prob(x)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), precise.log_prob(x.double()), rtol=2e-7, atol=0)
        # Between the sample and its rounding the log-density varies by sqrt(D kappa) 1e-7.
        torch.testing.assert_close(log_p, value, rtol=1e-5, atol=5e-3)
        if value.requires_grad:
            (value.sum() + log_p.sum()).backward()
            assert all(p.grad.isfinite().all() for p in distribution.parameters())


def test_dtype_of_the_answer_is_that_of_the_distribution():
    for distribution in distributions(3):
        assert distribution.log_prob(on_sphere(2, 3).float()).dtype == torch.float64
        assert distribution.float().log_prob(on_sphere(2, 3)).dtype == torch.float32
        x, log_p = distribution.double()(2)
        assert x.dtype == log_p.dtype == torch.float64


def test_a_concentration_keeps_the_digits_of_double_precision():
    assert VonMisesFisher(double([1.0, 0.0]), 0.1).concentration.item() == 0.1


def test_state_and_copies():
    x = on_sphere(4, 3)
    fresh = [
        UniformSphere(3).double(),
        AngularCentralGaussian(torch.eye(3, dtype=torch.float64)),
        von_mises_fisher([0.0, 0.0, 1.0], 1.0),
    ]
    for trainable in (False, True):
        for distribution, empty in zip(distributions(3, trainable), fresh, strict=True):
            assert any(True for _ in distribution.parameters()) == (
                trainable and not isinstance(distribution, UniformSphere)
            )
            expected = distribution.log_prob(x)
            empty.load_state_dict(distribution.state_dict())
            assert torch.equal(empty.log_prob(x), expected)
            assert torch.equal(copy.deepcopy(distribution).log_prob(x), expected)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_direction_of_any_length(size):
    loc = VonMisesFisher(torch.tensor([3 * size, 4 * size]), 1.0).loc
    torch.testing.assert_close(loc, torch.tensor([0.6, 0.8]))


def test_the_tensors_of_the_caller_are_copied():
    loc, scale = double([3.0, 4.0]), skewed(2)
    fisher, angular = VonMisesFisher(loc, 1.0), AngularCentralGaussian(scale)
    before = angular.scale.clone()
    loc.zero_()
    scale.zero_()
    torch.testing.assert_close(fisher.loc, double([0.6, 0.8]))
    torch.testing.assert_close(angular.scale, before)


def test_as_base_and_as_target_of_a_flow():
    uniform, fisher = UniformSphere(3).double(), von_mises_fisher([0.0, 0.0, 1.0], 2.0, True)
    for q0 in (uniform, fisher, AngularCentralGaussian(skewed(3), True)):
        model = nf.NormalizingFlow(q0, [], p=uniform)
        x, log_q = model.sample(6)
        torch.testing.assert_close(model.log_prob(x), log_q)
        # The host adds up in float32 there.
        kld = model.forward_kld(x).double()
        torch.testing.assert_close(kld, -log_q.mean(), rtol=1e-6, atol=1e-6)
        assert isinstance(q0, nf.distributions.BaseDistribution)
        assert q0.on_manifold
        assert q0.shape == (3,)
    # KL(q | p) = log N - log A - kappa E t, exactly zero terms apart, with E t = 0 under q.
    model = nf.NormalizingFlow(uniform, [], p=fisher)
    expected = (log_normaliser(double(2.0), 3) - log_sphere_area(3)).item()
    # 4 standard errors of kappa t, whose standard deviation is 2 / sqrt(3).
    assert model.reverse_kld(10000).item() == pytest.approx(expected, abs=4 * 2 / math.sqrt(3e4))


def test_direction_and_concentration_are_learned():
    target = von_mises_fisher([1.0, -1.0, 0.5, 2.0], 12.0)
    model = von_mises_fisher([1.0, 0.0, 0.0, 0.0], 0.0, trainable=True)
    x = target.sample(4000)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -model.log_prob(x).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    # The maximum of the likelihood is where the mean vectors agree.
    mean = x.mean(0)
    with torch.no_grad():
        direction = torch.nn.functional.normalize(model.loc, dim=0)
    torch.testing.assert_close(direction, mean / mean.norm(), rtol=0, atol=1e-4)
    learned = bessel_ratio(4, model.concentration.item())
    assert learned == pytest.approx(mean.norm().item(), abs=1e-4)


# --- refusals


def test_points_off_the_sphere_are_rejected_by_name():
    x = torch.eye(3, dtype=torch.float64).repeat(2, 1)
    x[1] *= 1.5
    x[4] *= 3
    before = x.clone()
    message = (
        r"x has 2 of 6 rows off the unit sphere, the worst at index \[4\] with norm 3, where "
        r"1 \+- 0.0001 is allowed. Divide the rows by their norms, or build with "
        r"off_manifold='project', which does."
    )
    for distribution in distributions(3):
        with pytest.raises(nfi.errors.OffManifoldError, match=message):
            distribution.log_prob(x)
        near = distribution.log_prob((1 + 9e-5) * x[[0, 2, 3]])
        torch.testing.assert_close(near, distribution.log_prob(x[[0, 2, 3]]), rtol=0, atol=1e-12)
        with pytest.raises(nfi.errors.NonFiniteError, match=r"x has 1 of 6 values NaN"):
            distribution.log_prob(double([[1.0, 0, 0], [0, float("nan"), 1.0]]))
    assert torch.equal(x, before)


def test_points_off_the_sphere_are_projected_where_asked():
    x = torch.randn(4, 3, dtype=torch.float64)
    before = x.clone()
    direction = x / x.norm(dim=1, keepdim=True)
    for build in (
        lambda **options: UniformSphere(3, **options),
        lambda **options: AngularCentralGaussian(torch.diag(double([1.0, 2.0, 3.0])), **options),
        lambda **options: VonMisesFisher(double([1.0, 2.0, 3.0]), 4.0, **options),
    ):
        projecting, rejecting = build(off_manifold="project").double(), build().double()
        torch.testing.assert_close(projecting.log_prob(x), rejecting.log_prob(direction))
        with pytest.raises(nfi.errors.OptionError, match="must be one of reject, project, got 'n"):
            build(off_manifold="nearest")
    assert torch.equal(x, before)


def test_projection_of_awkward_lengths():
    for size in (1e-40, 1.0, 1e30):  # squares of which float32 does not hold
        u = unit_vectors(torch.full((2, 4), size), "project", "x")
        torch.testing.assert_close(u, torch.full((2, 4), 0.5))
    x = torch.zeros(3, 2)
    x[1, 0] = 1.0
    with pytest.raises(
        nfi.errors.OffManifoldError,
        match=r"x has 2 of 3 rows of zeros, the first at index \[0\]: they have no direction",
    ):
        unit_vectors(x, "project", "x")
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: unit_vectors(x, "project", "x"), x)
    assert gradgradcheck(lambda x: unit_vectors(x, "project", "x"), x)


def test_values_are_not_looked_at_inside_a_vmap():
    x = 2 * torch.eye(3)
    reject = torch.func.vmap(lambda v: unit_vectors(v, "reject", "v"))
    torch.testing.assert_close(reject(x), x / x.norm(dim=-1, keepdim=True))
    project = torch.func.vmap(lambda v: unit_vectors(v, "project", "v"))
    assert torch.equal(project(x), torch.eye(3))
    tangents = torch.func.jacfwd(lambda v: unit_vectors(v, "project", "v"))(x[0])
    torch.testing.assert_close(tangents, torch.diag(torch.tensor([0.0, 0.5, 0.5])))
    check_policy("reject")


def test_wrong_shapes():
    for distribution in distributions(3):
        with pytest.raises(nfi.errors.ShapeError, match=r"x must have shape \(B, 3\), got \(2, 4"):
            distribution.log_prob(on_sphere(2, 4))
        assert distribution.log_prob(on_sphere(2, 3)[:0]).shape == (0,)
    with pytest.raises(nfi.errors.ShapeError, match=r"scale must have shape \(D, D\), got \(2, 3"):
        AngularCentralGaussian(torch.ones(2, 3))
    with pytest.raises(nfi.errors.ShapeError, match=r"loc must be a vector of shape \(D,\), got"):
        VonMisesFisher(torch.ones(1, 3), 1.0)
    with pytest.raises(nfi.errors.ShapeError, match=r"concentration must be one number, got sha"):
        VonMisesFisher([1.0, 0.0], torch.ones(1))


def test_wrong_options():
    message = "integer dimension of 2 or more, got 1"
    for build in (
        lambda: UniformSphere(1),
        lambda: AngularCentralGaussian([[1.0]]),
        lambda: VonMisesFisher([1.0], 1.0),
        lambda: log_normaliser(torch.ones(()), 1),
    ):
        with pytest.raises(nfi.errors.OptionError, match=message):
            build()
    with pytest.raises(nfi.errors.OptionError, match="dim must be a positive integer, got 3.0"):
        UniformSphere(3.0)
    with pytest.raises(
        nfi.errors.OptionError, match="must be invertible, got a matrix that is si"
    ):
        AngularCentralGaussian([[1.0, 2.0], [2.0, 4.0]])
    with pytest.raises(nfi.errors.OptionError, match="concentration must not be negative, got -1"):
        VonMisesFisher([1.0, 0.0], -1)
    with pytest.raises(nfi.errors.OptionError, match="loc must have a positive length, got zeros"):
        VonMisesFisher([0.0, 0.0], 1.0)


def test_parameters_that_are_not_finite():
    nan = float("nan")
    with pytest.raises(nfi.errors.NonFiniteError, match="scale has 1 of 4 values NaN"):
        AngularCentralGaussian([[1.0, nan], [0.0, 1.0]])
    with pytest.raises(nfi.errors.NonFiniteError, match="loc has 1 of 2 values NaN"):
        VonMisesFisher([1.0, nan], 1.0)
    with pytest.raises(nfi.errors.NonFiniteError, match="concentration has 1 of 1 values NaN or"):
        VonMisesFisher([1.0, 0.0], float("inf"))
    base = VonMisesFisher([1.0, 0.0], 1.0, trainable=True)
    base.concentration.data.fill_(nan)  # rejection would go on forever
    with pytest.raises(nfi.errors.NonFiniteError, match="lower the step size"):
        base.sample(2)

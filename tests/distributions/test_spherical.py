"""Densities on the unit sphere, against quadrature, Bessel functions and their own samples.

Statistical tests start from a fixed seed and say how many standard errors they allow."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from support.points import double, legendre, on_sphere
from support.seeds import manual_seed
from support.spherical_oracles import bessel_ratio, distributions, skewed, von_mises_fisher
from torch.autograd import gradcheck, gradgradcheck

from normflows_injective.distributions.spherical import (
    AngularCentralGaussian,
    UniformSphere,
    log_sphere_area,
)
from normflows_injective.distributions.von_mises_fisher import log_normaliser


def quadrature(dim):
    """Points of the circle or the sphere with their weights, exact for smooth functions."""
    phi = torch.arange(200, dtype=torch.float64) * (2 * math.pi / 200)
    circle = torch.stack([phi.cos(), phi.sin()], dim=1)
    if dim == 2:
        return circle, double(2 * math.pi / 200).expand(200)
    height, weight = legendre(100)
    ring = (1 - height.square()).sqrt()[:, None, None] * circle
    points = torch.cat([ring, height[:, None, None].expand(-1, 200, 1)], dim=2)
    return points.reshape(-1, 3), (weight * 2 * math.pi / 200).repeat_interleave(200)


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
            log_p -= 1.0  # as normflows does, in place
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

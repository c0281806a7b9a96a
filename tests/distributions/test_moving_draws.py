"""Draws that move with the parameters: gradients of means, against quadrature.

Statistical tests allow four standard errors, which they estimate from independent batches.
"""

from __future__ import annotations

import math

import pytest
import scipy.special
import scipy.stats
import torch
from support.moving_draws import (
    circle_points,
    circulating_rsample,
    exact_gradient,
    largest_deviation,
    sampled_gradients,
    sphere_quadrature,
)
from support.points import double, legendre
from support.seeds import manual_seed
from support.spherical_oracles import bessel_ratio, skewed

from normflows_injective.distributions import (
    AngularCentralGaussian,
    PowerSpherical,
    VonMises,
    VonMisesFisher,
    WrappedNormal,
)
from normflows_injective.distributions.tilted_angle import angle_slope, moving_angle
from normflows_injective.distributions.von_mises_fisher import log_normaliser

AXIAL = {"von_mises_fisher": VonMisesFisher, "power": PowerSpherical}


def on_points(x, log_p):
    """A function of points and of log-densities, as in a divergence, without any symmetry."""
    slopes = torch.linspace(1.0, -0.7, x.shape[1], dtype=x.dtype)
    return (x @ slopes).exp() + (2 * x[:, 0] - x[:, 1]).sin() + 0.5 * log_p


def on_angles(x, log_p):
    return (x[:, 0].cos() + 0.5 * (2 * x[:, -1]).sin()).exp() + 0.5 * log_p


# --- gradients of means


@pytest.mark.parametrize("kappa", [0.0, 0.5, 6.0, 60.0])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("name", AXIAL)
def test_gradients_of_means_against_quadrature(name, dim, kappa):
    manual_seed(1)
    law = AXIAL[name](torch.randn(dim).double(), kappa, True).double()
    exact = exact_gradient(law, on_points, *sphere_quadrature(dim))
    assert largest_deviation(sampled_gradients(law, on_points), exact) < 4


@pytest.mark.parametrize("dim", [2, 3])
def test_gradients_of_the_angular_gaussian_against_quadrature(dim):
    manual_seed(2)
    law = AngularCentralGaussian(skewed(dim), True)
    exact = exact_gradient(law, on_points, *sphere_quadrature(dim))
    assert largest_deviation(sampled_gradients(law, on_points), exact) < 4


@pytest.mark.parametrize(
    "law",
    [
        VonMises(double([2.0]), 0.7, True),
        VonMises(double([3.0]), 30.0, True),
        VonMises(double([-1.0]), 0.0, True),
        WrappedNormal(double([3.0]), 0.3, True),
        WrappedNormal(double([1.0]), 1.4, True),
    ],
)
def test_gradients_of_laws_of_angles_against_quadrature(law):
    manual_seed(3)
    x = circle_points()
    exact = exact_gradient(law, on_angles, x, double(2 * math.pi / len(x)))
    assert largest_deviation(sampled_gradients(law, on_angles), exact) < 4


@pytest.mark.parametrize("build", [VonMises, WrappedNormal])
def test_gradients_on_a_torus_against_quadrature(build):
    manual_seed(4)
    law = build(double([2.0, -3.0]), double([0.8, 1.7]), True)
    each = circle_points(80)[:, 0]
    x = torch.cartesian_prod(each, each)
    exact = exact_gradient(law, on_angles, x, double((2 * math.pi / 80) ** 2))
    assert largest_deviation(sampled_gradients(law, on_angles), exact) < 4


@pytest.mark.parametrize("kappa", [1e-3, 3.0, 200.0, 1e5])
@pytest.mark.parametrize("dim", [4, 30, 300])
def test_moments_of_von_mises_fisher_in_high_dimensions(dim, kappa):
    """E (c.x) + E (c.x)^2 = m c.mu + m / kappa + (1 - D m / kappa) (c.mu)^2 for unit c."""
    manual_seed(5)
    law = VonMisesFisher(torch.randn(dim).double(), kappa, True).double()
    c = torch.nn.functional.normalize(torch.randn(dim).double() / 9 + law.loc.detach(), dim=0)
    k = law.concentration
    (mean,) = torch.autograd.grad(log_normaliser(k, dim), k, create_graph=True)
    along = c @ torch.nn.functional.normalize(law.loc, dim=0)
    value = mean * along + mean / k + (1 - dim * mean / k) * along.square()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(law.parameters()))])
    f = lambda x, _: x @ c + (x @ c).square()  # noqa: E731
    assert _deviation_along_directions(sampled_gradients(law, f), exact) < 4


@pytest.mark.parametrize("kappa", [1e-3, 3.0, 200.0, 1e5])
@pytest.mark.parametrize("dim", [4, 30, 300])
def test_means_of_power_spherical_in_high_dimensions(dim, kappa):
    """E c.x = kappa / (kappa + D - 1) c.mu."""
    manual_seed(6)
    law = PowerSpherical(torch.randn(dim).double(), kappa, True).double()
    c = torch.randn(dim).double()
    k = law.concentration
    value = k / (k + dim - 1) * (c @ torch.nn.functional.normalize(law.loc, dim=0))
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(law.parameters()))])
    found = sampled_gradients(law, lambda x, _: x @ c)
    assert _deviation_along_directions(found, exact) < 4


def _deviation_along_directions(found, exact):
    """Of the concentration, and of the gradient's and a random direction of the mean direction."""
    along, last = exact.clone(), torch.zeros_like(exact)
    along[-1], last[-1] = 0, 1
    columns = torch.stack([last, along / along.norm(), torch.randn_like(exact)], dim=1)
    columns[-1, 2] = 0
    return largest_deviation(found @ columns, exact @ columns)


@pytest.mark.parametrize("dim", [2, 4, 10])
def test_the_gradient_of_accepted_proposals_is_biased_and_ours_is_not(dim):
    """Of E t, whose derivative is the variance of t."""
    manual_seed(7)
    law = VonMisesFisher(torch.eye(dim)[0].double(), 2.0, True).double()
    mean = bessel_ratio(dim, 2.0)
    variance = double([1 - mean**2 - (dim - 1) / 2.0 * mean])
    along = lambda x, _: x[:, 0]  # noqa: E731
    ours = sampled_gradients(law, along)[:, -1:]
    assert largest_deviation(ours, variance) < 4
    circulating = []
    for _ in range(60):
        x, _ = circulating_rsample(law)(500)
        circulating.append(torch.autograd.grad(x[:, 0].mean(), law.concentration)[0])
    assert largest_deviation(torch.stack(circulating)[:, None], variance) > 20


# --- the implicit derivative


@pytest.mark.parametrize("kappa", [1e-3, 0.5, 40.0, 1e5])
@pytest.mark.parametrize("dim", [2, 3, 5, 100, 1000])
def test_angles_of_power_spherical_move_as_the_inverse_distribution(dim, kappa):
    """Against central differences of the quantiles of the beta law."""
    beta = (dim - 1) / 2
    p = double([1e-4, 0.03, 0.5, 0.9, 0.9999]).numpy()
    # Quantiles of 1 - z = sin^2(theta / 2), which keep their digits.
    half = lambda k: double(scipy.special.betaincinv(beta, beta + k, p)).sqrt().asin()  # noqa: E731
    step = 1e-4 * max(kappa, 1.0)
    expected = 2 * (half(kappa + step) - half(kappa - step)) / (2 * step)
    tilt = PowerSpherical(torch.ones(dim), 1.0)._tilt()
    found = angle_slope(2 * half(kappa), double(kappa), tilt)
    # The quantiles have relative errors of 1e-14 and more, which the step magnifies.
    rounding = 1e-13 * half(kappa) / step
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=float(rounding.max()))


@pytest.mark.parametrize("kappa", [1e-3, 0.5, 20.0, 1e5])
def test_heights_in_three_dimensions_move_as_their_closed_form(kappa):
    """With t = 1 + log(1 - u (1 - exp(-2 kappa))) / kappa differentiated by autograd."""
    u = double([1e-6, 0.2, 0.5, 0.8, 1 - 1e-6])
    k = double(kappa).requires_grad_()
    drop = -torch.log1p(u * torch.expm1(-2 * k)) / k
    theta = 2 * (drop / 2).sqrt().asin()
    expected = torch.stack([torch.autograd.grad(t, k, retain_graph=True)[0] for t in theta])
    tilt = VonMisesFisher(torch.ones(3), 1.0)._tilt()
    found = angle_slope(theta.detach(), k.detach(), tilt)
    tolerance = 1e-9 if kappa > 0.1 else 1e-6  # the closed form cancels at small kappa
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("kappa", [1e-3, 0.5, 20.0, 1e3, 1e5])
@pytest.mark.parametrize("dim", [2, 4, 100, 1000])
@pytest.mark.parametrize("name", AXIAL)
def test_angles_move_as_a_fine_quadrature_says(name, dim, kappa):
    """At the probable angles and beyond, against 120 panels of Gauss and Legendre."""
    tilt = AXIAL[name](torch.ones(dim), 1.0)._tilt()
    average = tilt.mean(double(kappa))
    fisher = name == "von_mises_fisher"
    drop = 1 - bessel_ratio(dim, kappa) if fisher else (dim - 1) / (dim - 1 + kappa)
    centre, spread = 2 * math.asin(math.sqrt(drop / 2)), 1 / math.sqrt(dim + kappa)
    angles = [a for c in (-4, -1, 0.2, 1, 4) if 0 < (a := centre + c * spread) < math.pi]
    for theta in map(double, angles):
        upper = tilt.statistic(theta) >= average
        end = theta + (-60 if upper else 60) * spread
        phi, weight = _panels(float(end.clamp(0, math.pi)), float(theta))
        ratio = kappa * (tilt.statistic(phi) - tilt.statistic(theta))
        ratio = ratio + (dim - 2) * (phi.sin() / theta.sin()).log()
        expected = -(weight * (tilt.statistic(phi) - average) * ratio.exp()).sum()
        found = angle_slope(theta, double(kappa), tilt)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def _panels(end, start, count=120, power=6):
    """Nodes and weights from an end, where there may be a singularity, to a start."""
    nodes, weights = legendre(24, 0.0, 1 / count)
    u = (torch.arange(count, dtype=torch.float64)[:, None] / count + nodes).flatten()
    slopes = power * u ** (power - 1) * (start - end)
    return end + (start - end) * u**power, weights.repeat(count) * slopes


@pytest.mark.parametrize("build", [VonMisesFisher, PowerSpherical])
def test_draws_can_be_differentiated_twice(build):
    """Of a draw with fixed random numbers, whose gradient moves with the parameters."""
    law = build(double([1.0, 2.0, -1.0]), 3.0, True)

    def slope(kappa):
        manual_seed(8)
        law.concentration.data.fill_(float(kappa))
        x, _ = law.rsample(6)
        return x, law.concentration

    x, kappa = slope(3.0)
    (first,) = torch.autograd.grad(x[:, 0].sum(), kappa, create_graph=True)
    (second,) = torch.autograd.grad(first, kappa)
    # Of one angle, followed along the curve that keeps its probability.
    tilt, theta, h = law._tilt(), double([0.4, 1.0, 2.5]), 1e-4
    k = double(3.0).requires_grad_()
    t = theta.clone().requires_grad_()
    g = angle_slope(t, k, tilt)
    by_angle, by_kappa = torch.autograd.grad(g.sum(), [t, k])
    ahead = angle_slope(theta + h, k.detach(), tilt) - angle_slope(theta - h, k.detach(), tilt)
    torch.testing.assert_close(by_angle, ahead / (2 * h), rtol=1e-6, atol=1e-7)
    ahead = angle_slope(theta, k.detach() + h, tilt) - angle_slope(theta, k.detach() - h, tilt)
    torch.testing.assert_close(by_kappa, ahead.sum() / (2 * h), rtol=1e-6, atol=1e-7)
    assert second.isfinite()


def test_forward_mode_agrees_with_reverse_mode():
    tilt = VonMisesFisher(torch.ones(4), 1.0)._tilt()
    drop, kappa = double([0.1, 1.0, 1.9]), double([2.0, 3.0, 4.0])
    move = lambda k: moving_angle(drop, k, tilt)  # noqa: E731
    _, tangent = torch.func.jvp(move, (kappa,), (torch.ones_like(kappa),))
    (gradient,) = torch.func.vjp(move, kappa)[1](torch.ones_like(kappa))
    torch.testing.assert_close(tangent, gradient)


# --- special points and types


@pytest.mark.parametrize("build", [VonMisesFisher, PowerSpherical])
@pytest.mark.parametrize("loc", [[0.0, 1.0, 0.0], [-0.0, 1.0, 0.0], [1.0, 0, 0], [-1.0, 0, 0]])
def test_the_gradient_in_the_mean_direction_at_the_edges_of_the_reflection(build, loc):
    manual_seed(9)
    law = build(double(loc), 4.0, True)
    exact = exact_gradient(law, on_points, *sphere_quadrature(3))
    assert largest_deviation(sampled_gradients(law, on_points), exact) < 4


@pytest.mark.parametrize("build", [VonMisesFisher, PowerSpherical])
def test_a_concentration_below_zero_has_draws_of_the_antipode_with_the_right_gradient(build):
    manual_seed(10)
    law = build(double([1.0, 2.0, 0.5]), 2.0, True)
    with torch.no_grad():
        law.concentration.neg_()
    exact = exact_gradient(law, on_points, *sphere_quadrature(3))
    assert largest_deviation(sampled_gradients(law, on_points), exact) < 4


@pytest.mark.parametrize("dim", [2, 3, 300])
@pytest.mark.parametrize("kappa", [0.0, 1e-3, 1.0, 1e5])
@pytest.mark.parametrize("build", [VonMisesFisher, PowerSpherical])
def test_draws_in_single_precision(build, kappa, dim):
    law = build(torch.randn(dim), kappa, True)
    x, log_p = law.rsample(200)
    assert x.dtype == log_p.dtype == torch.float32
    torch.testing.assert_close(x.norm(dim=1), torch.ones(200))
    torch.testing.assert_close(log_p, law.log_prob(x), rtol=1e-5, atol=5e-3)
    grads = torch.autograd.grad(x.sum() + log_p.sum(), list(law.parameters()))
    assert all(g.isfinite().all() for g in grads)


def test_draws_of_forward_and_of_rsample():
    fisher, power = (build(double([1.0, 2.0]), 3.0, True) for build in AXIAL.values())
    manual_seed(11)
    still, _ = fisher(5)
    manual_seed(11)
    moving, _ = fisher.rsample(5)
    assert torch.equal(still, moving)
    assert not still.requires_grad
    assert moving.requires_grad
    assert power(5)[0].requires_grad
    assert all(law.has_rsample for law in (fisher, power))
    assert not fisher.sample(3).requires_grad


def test_angles_at_the_ends_have_finite_slopes():
    for build in (VonMisesFisher, PowerSpherical):
        for dim in (2, 3, 30):
            kappa = double([0.0, 1.0, 1e5]).requires_grad_()
            for drop in (0.0, 1e-30, 2.0):
                tilt = build(torch.ones(dim), 1.0)._tilt()
                angle = moving_angle(double([drop] * 3), kappa, tilt)
                (slope,) = torch.autograd.grad(angle.sum(), kappa)
                assert slope.isfinite().all()
                assert (slope <= 0).all()

"""The power spherical law, and entropies of laws on spheres, against quadrature."""

from __future__ import annotations

import copy
import math

import pytest
import scipy.stats
import torch
from support.moving_draws import sphere_quadrature
from support.points import double, on_sphere
from support.seeds import manual_seed

import normflows_injective as nfi
from normflows_injective.distributions import PowerSpherical, UniformSphere, VonMisesFisher
from normflows_injective.distributions.spherical import log_sphere_area

KAPPAS = (0.0, 1e-3, 0.7, 5.0, 40.0)


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("dim", [2, 3])
def test_total_mass_is_one(dim, kappa):
    # Of D = 2 and small kappa the power has a cusp at the antipode, which equal steps see slowly.
    points, weights = sphere_quadrature(dim, turns=20_000 if dim == 2 else 200)
    law = PowerSpherical(double([0.3, -2.0, 1.0][:dim]), kappa)
    assert (law.log_prob(points).exp() @ weights).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dim", [4, 10, 50])
def test_total_mass_in_high_dimensions_by_importance(dim):
    """By draws of a von Mises-Fisher law, within four of the standard errors, below 0.01."""
    law = PowerSpherical(torch.eye(dim)[0].double(), 6.0)
    other = VonMisesFisher(torch.eye(dim)[0].double(), 3.0)
    x, log_q = other(20_000)
    ratio = (law.log_prob(x) - log_q).exp()
    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert error < 0.01
    assert abs(float(ratio.mean()) - 1) < 4 * error


def test_density_by_its_formula_and_at_special_points():
    law = PowerSpherical(double([0.0, 2.0, 0.0]), 2.5)
    x = on_sphere(6, 3)
    log_n = (4.5 * math.log(2) + math.log(math.pi)) + math.lgamma(3.5) - math.lgamma(4.5)
    torch.testing.assert_close(law.log_prob(x), 2.5 * (1 + x[:, 1]).log() - log_n)
    antipode = double([[0.0, -1.0, 0.0]])
    assert law.log_prob(antipode).item() == -math.inf
    flat = PowerSpherical(double([0.0, 2.0, 0.0]), 0.0)
    expected = -math.log(4 * math.pi)
    assert flat.log_prob(antipode).item() == pytest.approx(expected)
    near = double([[math.sin(1e-9), -math.cos(1e-9), 0.0]])
    # There 1 + t is half the square of the distance to the antipode.
    value = 2.5 * math.log(1e-18 / 2) - log_n
    assert law.log_prob(near).item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("kappa", [0.0, 0.2, 4.0, 100.0, 1e5])
@pytest.mark.parametrize("dim", [2, 3, 20])
def test_law_of_the_height_of_draws(dim, kappa):
    manual_seed(1)
    law = PowerSpherical(torch.randn(dim).double(), kappa)
    chord = (law.sample(20_000) - law.loc).square().sum(1) / 4  # 1 - z
    beta = (dim - 1) / 2
    result = scipy.stats.kstest(chord.numpy(), scipy.stats.beta(beta, beta + kappa).cdf)
    assert result.pvalue > 6e-5  # four standard errors


def test_tangent_directions_of_draws_are_uniform():
    law = PowerSpherical(double([1.0, 2.0, -0.5]), 10.0)
    x = law.sample(5000)
    basis = torch.linalg.qr(torch.stack([law.loc, *torch.eye(3, dtype=x.dtype)[:2]], dim=1)).Q
    angle = torch.atan2(x @ basis[:, 2], x @ basis[:, 1]) / (2 * math.pi) + 0.5
    assert scipy.stats.kstest(angle.numpy(), "uniform").pvalue > 6e-5


@pytest.mark.parametrize("build", [VonMisesFisher, PowerSpherical])
@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("dim", [2, 3])
def test_entropies_and_their_gradients_against_quadrature(build, dim, kappa):
    points, weights = sphere_quadrature(dim, turns=20_000 if dim == 2 else 400)
    law = build(double([0.3, -2.0, 1.0][:dim]), kappa, True)
    log_p = law.log_prob(points)
    kept = log_p > -300  # not the antipode, where the density is zero
    expected = -(log_p[kept].exp() * log_p[kept]) @ weights[kept]
    entropy = law.entropy()
    assert entropy.shape == ()
    tolerance = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(entropy, expected, **tolerance)
    torch.testing.assert_close(law.kl_uniform(), log_sphere_area(dim) - expected, **tolerance)
    if kappa > 0.5:
        slopes = [torch.autograd.grad(h, law.concentration)[0] for h in (entropy, expected)]
        torch.testing.assert_close(*slopes, rtol=0, atol=1e-5)


@pytest.mark.parametrize("build", [VonMisesFisher, PowerSpherical])
@pytest.mark.parametrize("kappa", [1e-3, 3.0, 1e3, 1e5])
@pytest.mark.parametrize("dim", [5, 100])
def test_entropies_in_high_dimensions_are_means_of_draws(build, dim, kappa):
    """Within four standard errors of 20,000 draws."""
    law = build(torch.randn(dim).double(), kappa)
    log_p = law.rsample(20_000)[1]
    error = float(log_p.std()) / math.sqrt(len(log_p))
    assert abs(float(-log_p.mean() - law.entropy())) < 4 * error + 1e-9


def test_entropy_of_von_mises_fisher_in_three_dimensions():
    """In closed form, log(4 pi sinh(kappa) / kappa) - kappa coth(kappa) + 1."""
    for kappa in (0.5, 5.0, 300.0):
        log_sinh = kappa + math.log1p(-math.exp(-2 * kappa)) - math.log(2)
        expected = math.log(4 * math.pi / kappa) + log_sinh - kappa / math.tanh(kappa) + 1
        law = VonMisesFisher(double([1.0, 0.0, 0.0]), kappa)
        assert law.entropy().item() == pytest.approx(expected, rel=1e-12)


def test_entropy_of_the_uniform_law():
    for dim in (2, 3, 10):
        uniform = UniformSphere(dim).double()
        assert uniform.entropy().item() == pytest.approx(log_sphere_area(dim))
        assert PowerSpherical(torch.ones(dim).double(), 0.0).kl_uniform().abs() < 1e-14


def test_state_copies_and_refusals():
    law = PowerSpherical([1.0, 2.0, 0.0], 2.0, trainable=True)
    x = on_sphere(4, 3).float()
    expected = law.log_prob(x)
    assert torch.equal(copy.deepcopy(law).log_prob(x), expected)
    other = PowerSpherical([0.0, 0.0, 1.0], 1.0)
    other.load_state_dict(law.state_dict())
    assert torch.equal(other.log_prob(x), expected)
    with pytest.raises(nfi.errors.OptionError, match="concentration must not be negative, got -1"):
        PowerSpherical([1.0, 0.0], -1)
    with pytest.raises(nfi.errors.OptionError, match="loc must have a positive length"):
        PowerSpherical([0.0, 0.0], 1.0)
    with pytest.raises(nfi.errors.OffManifoldError):
        law.log_prob(2 * x)
    law.concentration.data.fill_(math.nan)
    with pytest.raises(nfi.errors.NonFiniteError, match="lower the step size"):
        law(2)

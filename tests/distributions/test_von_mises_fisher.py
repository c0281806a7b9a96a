"""The normaliser of the von Mises-Fisher law, against Bessel functions."""

from __future__ import annotations

import math

import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from support.points import double
from support.spherical_oracles import bessel_ratio
from torch.autograd import gradcheck, gradgradcheck

from normflows_injective.distributions.spherical import log_sphere_area
from normflows_injective.distributions.von_mises_fisher import log_normaliser

DIMS = (2, 3, 4, 5, 10, 50, 300, 2000)
KAPPAS = (1e-3, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 1e5, 1e6)


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

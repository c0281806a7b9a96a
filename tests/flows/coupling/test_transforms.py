"""Transforms of an element, splines among them."""

from __future__ import annotations

import math

import pytest
import torch
from normflows.utils import splines as host_splines
from support.comparison import close
from support.dense import dense_jacobian

from normflows_injective.flows.coupling import Additive, Affine, CentredAffine, Spline
from normflows_injective.flows.splines import UNIT_DERIVATIVE, bounded_spline

pytestmark = pytest.mark.usefixtures("float64_by_default")


DOUBLE = torch.float64


# --- transforms of an element --------------------------------------------------------------------


def test_transform_is_increasing_and_has_the_derivative_it_says(transform):
    parameters = torch.randn(4, 3, transform.num_parameters)
    x = 3 * torch.randn(4, 3)
    z, log_det = transform.inverse(x, parameters)
    back, log_det_back = transform.forward(z, parameters)
    close(back, x, 1e-9)
    close(log_det_back, -log_det, 1e-9)
    for row in range(4):
        given = parameters[row : row + 1]
        jacobian = dense_jacobian(
            lambda s, given=given: transform.inverse(s, given)[0], x[row : row + 1]
        )[0].detach()
        slopes = jacobian.diagonal()
        close(jacobian, slopes.diag(), 0)
        assert bool((slopes > 0).all())
        close(log_det[row], slopes.log().sum(), 1e-9)


def test_transform_is_the_identity_at_zero_parameters(transform):
    x = 3 * torch.randn(5, 3)
    at_rest = torch.zeros(5, 3, transform.num_parameters)
    for direction in (transform.forward, transform.inverse):
        z, log_det = direction(x, at_rest)
        close(z, x, 1e-14)
        close(log_det, 0.0, 1e-13)


@pytest.mark.slow
def test_transform_has_gradients_and_tangents(transform):
    x = torch.randn(1, 2).requires_grad_()
    parameters = torch.randn(1, 2, transform.num_parameters).requires_grad_()
    for direction in (transform.forward, transform.inverse):
        assert torch.autograd.gradcheck(direction, (x, parameters), check_forward_ad=True)


def test_volumes_are_kept_exactly():
    parameters, x = 3 * torch.randn(5, 4, 2), torch.randn(5, 4)
    for direction in (CentredAffine().forward, CentredAffine().inverse):
        assert torch.equal(direction(x, parameters)[1], torch.zeros(5))
        jacobian = dense_jacobian(lambda s, f=direction: f(s, parameters[:1])[0], x[:1])
        close(torch.linalg.slogdet(jacobian)[1], 0.0, 1e-12)
        assert float(jacobian[0].diagonal().detach().std()) > 1e-2
    assert torch.equal(Additive().inverse(x, parameters[..., :1])[1], torch.zeros(5))


def test_of_a_single_element_volumes_are_kept_by_shifts_alone():
    parameters, x = torch.randn(5, 1, 2), torch.randn(5, 1)
    for name in ("forward", "inverse"):
        expected = getattr(Additive(), name)(x, parameters[..., 1:])[0]
        assert torch.equal(getattr(CentredAffine(), name)(x, parameters)[0], expected)


@pytest.mark.parametrize("bound", [0.5, 2.0])
def test_log_scales_are_softly_bounded(bound):
    said = torch.tensor([[[1e6, 0.0]], [[-1e6, 0.0]], [[1e-6, 0.0]]])
    log_det = Affine(bound).inverse(torch.ones(3, 1), said)[1]
    close(log_det[:2], [bound, -bound], 1e-12)
    close(log_det[2] / 1e-6, 1.0, 1e-9)
    close(Affine(None).inverse(torch.ones(3, 1), said / 1e6)[1], said[:, 0, 0] / 1e6, 0)


# --- splines -------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("num_bins", [1, 2, 7])
def test_spline_is_that_of_the_host(inverse, num_bins):
    x = torch.empty(500).uniform_(-3, 3)
    rows, derivatives = torch.randn(500, 2 * num_bins), torch.randn(500, num_bins + 1)
    derivatives[:, -1] = derivatives[:, 0]
    ends = {"left": -3.0, "right": 3.0, "bottom": -3.0, "top": 3.0}
    expected = host_splines.rational_quadratic_spline(
        x, rows[:, :num_bins], rows[:, num_bins:], derivatives, inverse=inverse, **ends
    )
    # Zero is a slope of one here, and normflows adds its floor to the softplus of what it gets.
    all_rows = torch.cat([rows, derivatives[:, 1:-1] - UNIT_DERIVATIVE], dim=1)
    at_ends = derivatives[:, 0] - UNIT_DERIVATIVE
    for actual, wanted in zip(
        bounded_spline(x, all_rows, at_ends, 3.0, inverse), expected, strict=True
    ):
        close(actual, wanted, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1.0, 5.0, 20.0])
def test_spline_is_inverted_to_the_last_digits_in_single_precision(size):
    spline = Spline(8)
    x = torch.empty(20_000, 1, dtype=torch.float32).uniform_(-4, 4)
    parameters = (size * torch.randn(20_000, 1, spline.num_parameters)).float()
    z = spline.inverse(x, parameters)[0]
    # Where the spline is flat digits of x are lost, but what is found goes to z again.
    back, log_det = spline.forward(z, parameters)
    again, log_det_again = spline.inverse(back, parameters)
    assert float((again - z).abs().max()) < 1e-4
    assert torch.isfinite(log_det).all()
    assert float((log_det + log_det_again).abs().quantile(0.99)) < 0.02


def test_spline_keeps_its_interval_and_what_is_beyond():
    spline = Spline(5, 2.0)
    parameters = torch.randn(1, 1, spline.num_parameters).expand(7, 1, -1).requires_grad_()
    x = torch.tensor([[-1e9], [-2.5], [-2.0], [2.0], [2.0 + 1e-9], [math.inf], [math.nan]])
    z, log_det = spline.inverse(x, parameters)
    torch.testing.assert_close(z.detach(), x, equal_nan=True, atol=1e-12, rtol=0)
    # Its derivative is one at the ends, so that it is smooth there.
    close(log_det, 0.0, 1e-12)
    (gradient,) = torch.autograd.grad(z[:6].nan_to_num().sum() + log_det.sum(), parameters)
    assert torch.isfinite(gradient).all()


def test_spline_has_finite_gradients_at_its_knots():
    spline = Spline(4, 2.0)
    knots = torch.linspace(-2, 2, 5)[:, None].requires_grad_()
    parameters = torch.zeros(5, 1, spline.num_parameters).requires_grad_()
    for direction in (spline.forward, spline.inverse):
        z, log_det = direction(knots, parameters)
        found = torch.autograd.grad(z.sum() + log_det.sum(), (knots, parameters))
        assert all(torch.isfinite(g).all() for g in found)
        close(found[0], 1.0, 1e-12)

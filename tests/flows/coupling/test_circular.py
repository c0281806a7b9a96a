"""Convex sums of Möbius maps: maps of the circle without a seam, exact in both directions."""

from __future__ import annotations

import math

import pytest
import torch
from support.seeds import manual_seed

from normflows_injective.errors import OptionError
from normflows_injective.flows.coupling import MobiusMixture


@pytest.fixture(autouse=True)
def _seed():
    manual_seed(0)


def angles_and_parameters(mixture, dtype, rows=200, spread=3.0):
    angles = (2 * torch.rand(rows, 3, dtype=dtype) - 1) * math.pi
    return angles, spread * torch.randn(rows, 3, mixture.num_parameters, dtype=dtype)


def between(first, second):
    """Distances of angles along the circle."""
    return (torch.remainder(first - second + math.pi, 2 * math.pi) - math.pi).abs()


@pytest.mark.parametrize("num_components", [1, 2, 7])
def test_both_directions_are_inverse_to_each_other(num_components):
    mixture = MobiusMixture(num_components)
    x, parameters = angles_and_parameters(mixture, torch.float64)
    z, log_det = mixture.inverse(x, parameters)
    back, log_back = mixture.forward(z, parameters)
    assert z.abs().max() <= math.pi
    # The derivative is between 0.01 and 99, by which rounding grows.
    assert between(back, x).max() < 1e-11
    torch.testing.assert_close(log_back, -log_det, rtol=0, atol=1e-9)


def test_log_det_is_that_of_central_differences():
    mixture = MobiusMixture(5)
    x, parameters = angles_and_parameters(mixture, torch.float64, rows=50, spread=1.0)
    step = 1e-6
    ahead, behind = (mixture.inverse(x + s, parameters)[0] for s in (step, -step))
    slopes = between(ahead, behind) / (2 * step)
    torch.testing.assert_close(
        mixture.inverse(x, parameters)[1], slopes.log().sum(1), rtol=1e-6, atol=1e-6
    )


def test_first_and_second_derivatives_of_the_solved_direction():
    mixture = MobiusMixture(2)
    x, parameters = angles_and_parameters(mixture, torch.float64, rows=2, spread=1.0)
    z = mixture.inverse(x, parameters)[0].clamp(-3.1, 3.1).requires_grad_()
    inputs = (z, parameters.requires_grad_())
    assert torch.autograd.gradcheck(mixture.forward, inputs)
    assert torch.autograd.gradgradcheck(mixture.forward, inputs, atol=1e-4)


@pytest.mark.parametrize("derivative", [0, 1, 2, 3])
def test_derivatives_of_the_log_slope_are_continuous_across_the_cut(derivative):
    mixture = MobiusMixture(4)
    parameters = torch.randn(1, 1, mixture.num_parameters, dtype=torch.float64)

    def log_slope(angle):
        value = mixture.inverse(angle.view(1, 1), parameters)[1].sum()
        for _ in range(derivative):
            (value,) = torch.autograd.grad(value, angle, create_graph=True)
        return value.detach()

    below, above = (
        log_slope(torch.tensor(end, dtype=torch.float64, requires_grad=True))
        for end in (math.pi - 1e-9, -math.pi + 1e-9)
    )
    torch.testing.assert_close(below, above, rtol=1e-5, atol=1e-5)


def test_it_starts_as_the_identity_and_its_points_part_under_adam():
    mixture = MobiusMixture(3)
    angles = torch.linspace(-3, 3, 50, dtype=torch.float64).view(-1, 1)
    parameters = torch.zeros(mixture.num_parameters, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(mixture.inverse(angles, parameters.expand(50, 1, -1))[0], angles)
    optimizer = torch.optim.Adam([parameters], lr=0.1)
    for _ in range(5):
        _, log_det = mixture.inverse(angles, parameters.expand(50, 1, -1))
        loss = -(log_det * (3 * angles[:, 0]).cos()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _, a, b, _ = mixture._read(parameters.detach().view(1, 1, -1))
    points = torch.stack([a, b], -1).view(3, 2)
    assert torch.pdist(points).min() > 0.01


def test_extreme_parameters_stay_finite(dtype):
    mixture = MobiusMixture(3)
    angles = torch.tensor([[-math.pi, 0.0, math.pi]], dtype=dtype)
    for size in (1e-20, 1e4, 1e15):
        parameters = torch.full((1, 3, mixture.num_parameters), size, dtype=dtype)
        for direction in (mixture.forward, mixture.inverse):
            image, log_det = direction(angles, parameters.requires_grad_())
            (image.sum() + log_det.sum()).backward()
            assert image.isfinite().all()
            assert log_det.isfinite().all()
            assert parameters.grad.isfinite().all()
            parameters = parameters.detach()


@pytest.mark.parametrize("radius", [0.0, 1.0, -0.5, 2.0])
def test_a_radius_outside_of_the_disk_is_refused(radius):
    with pytest.raises(OptionError, match="max_radius must be between 0 and 1"):
        MobiusMixture(2, radius)

"""The floor under volume-preserving flows against closed forms and quadrature."""

from __future__ import annotations

import math

import pytest
import torch

from normflows_injective.diagnostics import volume_preserving_floor, volume_preserving_floor_on_box
from normflows_injective.diagnostics.floors import uniform_floor
from normflows_injective.errors import NonFiniteError, OptionError, ShapeError


def mixture(means, variances, weights=None):
    """Log-density of isotropic Gaussians, and a sampler."""
    means = torch.tensor(means, dtype=torch.float64)
    variances = torch.tensor(variances, dtype=torch.float64)
    dim = means.shape[1]

    def log_prob(x):
        squares = (x.unsqueeze(1) - means).square().sum(2)
        scores = -0.5 * squares / variances - 0.5 * dim * (2 * math.pi * variances).log()
        return scores.logsumexp(1) - math.log(len(means))

    def sample(count):
        index = torch.randint(len(means), (count,))
        noise = torch.randn(count, dim, dtype=torch.float64)
        return means[index] + variances[index].sqrt().unsqueeze(1) * noise

    return log_prob, sample


PAPER = mixture([[-0.5, -0.5], [0.5, 0.5]], [0.2, 0.1])
UNEQUAL = mixture([[-1.5, 0.0], [1.5, 0.0]], [0.3, 0.03])


def ring(x):
    return -((x.norm(dim=1) - 1.5).square()) / 0.02


BOXES = {
    "paper": (PAPER[0], 4.0, 0.00703, 1.49366),
    "unequal": (UNEQUAL[0], 5.0, 0.19041, 1.17570),
    "ring": (ring, 3.0, 0.0484, 1.35970),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOXES)
def test_table_by_quadrature(name):
    log_prob, half, floor, entropy = BOXES[name]
    result = volume_preserving_floor_on_box(log_prob, [-half, -half], [half, half], 800)
    assert float(result.floor) == pytest.approx(floor, abs=6e-5)
    assert float(result.entropy) == pytest.approx(entropy, abs=3e-5)
    assert float(result.standard_error) == 0


@pytest.mark.parametrize("name", ["paper", "unequal"])
def test_table_from_samples(name):
    log_prob, _, floor, entropy = BOXES[name]
    x = {"paper": PAPER, "unequal": UNEQUAL}[name][1](100_000)
    result = volume_preserving_floor(log_prob(x), 2)
    # Standard errors here: .0006 and .0024 of the floor.
    assert 2e-4 < float(result.standard_error) < 4e-3
    assert float(result.floor) == pytest.approx(floor, abs=4.5 * float(result.standard_error))
    assert float(result.entropy) == pytest.approx(entropy, abs=0.01)


@pytest.mark.parametrize(
    ("dim", "floor"),
    [(1, 0.1765), (2, 0.306853), (4, 0.4959), (8, 0.7403), (16, 1.0268), (64, 1.6697)],
)
def test_uniform_laws_of_any_volume(dim, floor):
    assert uniform_floor(dim) == pytest.approx(floor, abs=5e-5)
    result = volume_preserving_floor(torch.full((20_000,), 3.7), dim)
    assert float(result.floor) == pytest.approx(uniform_floor(dim), abs=2e-4)
    assert float(result.standard_error) < 1e-4  # no sample differs from another
    assert float(result.entropy) == pytest.approx(-3.7, abs=1e-6)


def test_uniform_on_a_checkerboard_and_on_a_square():
    def checkerboard(x):
        dark = (x.floor().sum(1) % 2 == 0).double()
        return dark.log()

    for log_prob in (checkerboard, lambda x: x.new_zeros(len(x))):
        result = volume_preserving_floor_on_box(log_prob, [-2, -2], [2, 2], 400)
        assert float(result.floor) == pytest.approx(1 - math.log(2), abs=1e-5)


def test_scale_of_the_best_base():
    """A ball of radius R has s^2 = R^2 / (D + 2)."""
    area = math.pi * 3.0**2
    result = volume_preserving_floor(torch.full((20_000,), -math.log(area)), 2)
    assert float(result.scale) == pytest.approx(1.5, abs=1e-4)


@pytest.mark.slow
def test_gaussians_have_no_floor():
    covariance = torch.tensor([[2.0, 0.9], [0.9, 0.5]], dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(torch.ones(2).double(), covariance)
    result = volume_preserving_floor_on_box(normal.log_prob, [-9, -5], [11, 7], 1000)
    assert abs(float(result.floor)) < 1e-5
    assert float(result.scale) == pytest.approx(float(torch.linalg.det(covariance)) ** 0.25)
    estimate = volume_preserving_floor(normal.log_prob(normal.sample((100_000,))), 2)
    assert abs(float(estimate.floor)) < 4.5 * float(estimate.standard_error)


def test_gaussians_in_ten_dimensions():
    normal = torch.distributions.Normal(torch.zeros(10).double(), 3.0)
    result = volume_preserving_floor(normal.log_prob(normal.sample((50_000,))).sum(1), 10)
    assert abs(float(result.floor)) < 4.5 * float(result.standard_error)
    assert float(result.scale) == pytest.approx(3.0, rel=0.01)


@pytest.mark.slow
def test_separated_equal_gaussians_have_no_floor():
    log_prob, _ = mixture([[-20.0, 0.0], [0.0, 0.0], [20.0, 0.0]], [1.0, 1.0, 1.0])
    result = volume_preserving_floor_on_box(log_prob, [-28, -8], [28, 8], 1600)
    assert abs(float(result.floor)) < 1e-4


@pytest.mark.slow
def test_standard_error_is_that_of_repetitions():
    log_prob, sample = UNEQUAL
    results = [volume_preserving_floor(log_prob(sample(2000)), 2) for _ in range(200)]
    floors = torch.stack([result.floor for result in results])
    stated = torch.stack([result.standard_error for result in results])
    # Both have heavy tails, so their middles are compared; a quartile distance of 200 repetitions
    # is known to 8 %.
    low, high = torch.quantile(floors, torch.tensor([0.25, 0.75], dtype=floors.dtype))
    spread = float(high - low) / 1.349
    assert float(stated.median()) / spread == pytest.approx(1.0, abs=0.35)
    # The outermost volumes come from few samples, which adds a bias below the error.
    assert abs(float(floors.median()) - 0.19042) < spread


def test_floor_does_not_depend_on_the_unit():
    log_prob = UNEQUAL[0](UNEQUAL[1](5000))
    inches = volume_preserving_floor(log_prob, 2)
    miles = volume_preserving_floor(log_prob + 2 * 300, 2)
    assert float(miles.floor) == pytest.approx(float(inches.floor), abs=1e-9)
    assert float(miles.scale) == pytest.approx(float(inches.scale) * math.exp(-300))
    torch.testing.assert_close(miles.standard_error, inches.standard_error, atol=1e-9, rtol=0)


def test_gaussian_in_784_dimensions():
    squares = torch.distributions.Chi2(torch.full((20_000,), 784.0).double()).sample()
    result = volume_preserving_floor(-0.5 * squares - 392 * math.log(2 * math.pi), 784)
    assert abs(float(result.floor)) < 0.01
    assert float(result.scale) == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("dim", [2, 784])
def test_student_whose_densities_span_more_than_float64(dim):
    """It decreases with the radius, so that the floor is its divergence from a Gaussian."""
    degrees = 10.0
    chi = [torch.distributions.Chi2(torch.full((20_000,), nu).double()) for nu in (dim, degrees)]
    squares = degrees * chi[0].sample() / chi[1].sample()
    power = 0.5 * (degrees + dim)
    constant = math.lgamma(power) - math.lgamma(degrees / 2)
    constant -= 0.5 * dim * math.log(degrees * math.pi)
    log_prob = constant - power * torch.log1p(squares / degrees)
    ends = torch.tensor([power, degrees / 2]).double().digamma()
    entropy = power * float(ends[0] - ends[1]) - constant
    variance = degrees / (degrees - 2)
    expected = 0.5 * dim * (1 + math.log(2 * math.pi * variance)) - entropy
    result = volume_preserving_floor(log_prob, dim)
    if dim == 784:
        assert float(log_prob.max() - log_prob.min()) > 1000
        assert expected == pytest.approx(44.75, abs=0.01)
    assert abs(float(result.floor) - expected) < 4.5 * float(result.standard_error)


def test_widely_spread_densities_are_finite():
    result = volume_preserving_floor(torch.randn(2000).double() * 200 - 3000, 784)
    assert all(torch.isfinite(value) for value in result)
    with pytest.raises(NonFiniteError, match="The scale is inf, out of the range"):
        volume_preserving_floor(torch.randn(2000).double() * 200 - 3000, 2)


def test_bad_input_is_named():
    with pytest.raises(ShapeError, match=r"shape \(N,\), one per sample, got \(200, 2\)"):
        volume_preserving_floor(torch.zeros(200, 2), 2)
    with pytest.raises(OptionError, match="at least 100 samples, got 7"):
        volume_preserving_floor(torch.zeros(7), 2)
    with pytest.raises(NonFiniteError, match="were these drawn by p"):
        volume_preserving_floor(torch.full((200,), -math.inf), 2)
    with pytest.raises(OptionError, match="high must exceed low"):
        volume_preserving_floor_on_box(ring, [0, 0], [1, 0])
    with pytest.raises(ShapeError, match="D ends each, got 2 and 1"):
        volume_preserving_floor_on_box(ring, [0, 0], [1])
    with pytest.raises(OptionError, match="too many"):
        volume_preserving_floor_on_box(ring, [0] * 4, [1] * 4)
    with pytest.raises(OptionError, match="zero at every centre"):
        volume_preserving_floor_on_box(lambda x: x[:, 0].log() - math.inf, [0], [1], 10)
    with pytest.raises(ShapeError, match=r"log_prob must return shape \(10,\)"):
        volume_preserving_floor_on_box(lambda x: x, [0], [1], 10)
    with pytest.raises(NonFiniteError, match="no value on a grid"):
        volume_preserving_floor_on_box(lambda x: x[:, 0] * math.nan, [0], [1], 10)

"""Oracle 19: the squared 2-Wasserstein distance between Gaussian fits, as in arXiv 2106.01413."""

import pytest
import scipy.linalg
import torch
from support.geometry import seeded

import normflows_injective as nfi


def standardised(num_samples: int, dimension: int) -> torch.Tensor:
    """Points whose mean is exactly 0 and whose covariance, divided by N, is exactly I."""
    x = torch.randn(num_samples, dimension, dtype=torch.float64)
    x = x - x.mean(0)
    return torch.linalg.qr(x).Q * num_samples**0.5


@seeded(190)
def test_oracle_19_zero_between_a_set_and_itself():
    """The distance of a set from itself, in any order, is zero."""
    x = torch.randn(50, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    distance = nfi.diagnostics.frechet_distance
    assert float(distance(x, x)) == pytest.approx(0, abs=1e-10)
    assert float(distance(x, x.flip(0))) == pytest.approx(0, abs=1e-10)
    assert float(distance(x, x + 1)) == pytest.approx(4, abs=1e-10)


@pytest.mark.parametrize(("dimension", "first", "second"), [(1, 1.0, 3.0), (6, 0.5, 2.0)])
@seeded(191)
def test_oracle_19_isotropic_gaussians(dimension, first, second):
    """N(m1, s1^2 I) and N(m2, s2^2 I) are at |m1 - m2|^2 + D (s1 - s2)^2, exactly at 1/N."""
    shift = torch.randn(dimension, dtype=torch.float64)
    x = first * standardised(20, dimension) - 3.0
    y = second * standardised(30, dimension) - 3.0 + shift
    expected = float(shift.square().sum()) + dimension * (first - second) ** 2
    assert float(nfi.diagnostics.frechet_distance(x, y)) == pytest.approx(expected, rel=1e-10)


@seeded(192)
def test_oracle_19_general_covariances():
    """Against the formula with scipy's matrix square root of C1 C2, and symmetric."""
    a, b = torch.randn(2, 5, 5, dtype=torch.float64)
    x, y = standardised(40, 5) @ a, standardised(40, 5) @ b
    first, second = (a.T @ a).numpy(), (b.T @ b).numpy()
    cross = scipy.linalg.sqrtm(first @ second).real.trace()
    expected = first.trace() + second.trace() - 2 * cross
    assert float(nfi.diagnostics.frechet_distance(x, y)) == pytest.approx(expected, rel=1e-9)
    assert float(nfi.diagnostics.frechet_distance(y, x)) == pytest.approx(expected, rel=1e-9)


@seeded(193)
def test_oracle_19_degenerate_covariances():
    """Samples in a subspace: orthogonal lines of unit variance are at 1 + 1 - 0."""
    x, y = torch.zeros(2, 30, 3, dtype=torch.float64)
    x[:, 0], y[:, 1] = standardised(30, 1)[:, 0], standardised(30, 1)[:, 0]
    assert float(nfi.diagnostics.frechet_distance(x, y)) == pytest.approx(2, rel=1e-10)
    assert float(nfi.diagnostics.frechet_distance(x, x)) == pytest.approx(0, abs=1e-10)

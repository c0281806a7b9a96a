"""Probes: moments and variance formulas (oracle 12), and that K reaches the estimator (20)."""

from functools import partial

import pytest
import torch
from support.dense import dense_jacobian
from support.geometry import seeded, tanh_pair
from torch import Tensor

import normflows_injective as nfi
from normflows_injective.errors import OptionError
from normflows_injective.volume import Estimator, draw_probes
from normflows_injective.volume.estimators import EncoderSurrogate, Surrogate
from normflows_injective.volume.probes import PROBES

DIMENSION, DRAWS = 5, 100_000


def draw(kind: str, num_probes: int) -> Tensor:
    """Probes of shape (K, DRAWS, d)."""
    return draw_probes(kind, num_probes, torch.zeros(DRAWS, DIMENSION, dtype=torch.float64))


def trace_variance(kind: str, num_probes: int, matrix: Tensor) -> float:
    """Variance of the mean of K terms v'Mv, in closed form."""
    d, k = matrix.shape[0], num_probes
    symmetric = (matrix + matrix.T) / 2
    square = float(symmetric.square().sum())
    deviatoric = square - float(symmetric.trace()) ** 2 / d
    return {
        "gaussian": 2 / k * square,
        "rademacher": 2 / k * (square - float(symmetric.diagonal().square().sum())),
        "sphere": 2 * d / (k * (d + 2)) * deviatoric,
        "orthonormal": 2 * d * (d - k) / (k * (d - 1) * (d + 2)) * deviatoric,
    }[kind]


def trace_estimates(v: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("kbi,ij,kbj->kb", v, matrix, v).mean(0)


@pytest.mark.parametrize("num_probes", [1, 2, 4, 5])
@pytest.mark.parametrize("kind", PROBES)
@seeded(120)
def test_oracle_12_variance_formulas(kind, num_probes):
    """Mean and variance of the trace estimate, within 4 standard errors of 100 000 draws."""
    matrix = torch.randn(DIMENSION, DIMENSION, dtype=torch.float64)
    estimates = trace_estimates(draw(kind, num_probes), matrix)
    expected = trace_variance(kind, num_probes, matrix)
    centred = estimates - matrix.trace()
    if expected == 0:
        assert centred.abs().max() < 1e-12
        return
    squares = centred.square()
    standard_error_of_mean = float(estimates.std()) / DRAWS**0.5
    standard_error_of_variance = float(squares.std()) / DRAWS**0.5
    assert abs(float(centred.mean())) < 4 * standard_error_of_mean
    assert abs(float(squares.mean()) - expected) < 4 * standard_error_of_variance
    assert standard_error_of_variance < 0.02 * expected


@pytest.mark.parametrize("num_probes", [1, 2, 4])
@pytest.mark.parametrize("kind", PROBES)
@seeded(121)
def test_oracle_12_variance_at_consistency(kind, num_probes):
    """At f'g' = I only Gaussian probes have a variance, 2d/K (within 4 standard errors)."""
    estimates = trace_estimates(draw(kind, num_probes), torch.eye(DIMENSION, dtype=torch.float64))
    squares = (estimates - DIMENSION).square()
    if kind == "gaussian":
        standard_error = float(squares.std()) / DRAWS**0.5
        assert abs(float(squares.mean()) - 2 * DIMENSION / num_probes) < 4 * standard_error
    else:
        assert squares.max() < 1e-24


@seeded(122)
def test_oracle_12_trace_order():
    """The rank-d projector g'f' of a consistent pair has the variance that f'g' = I has not."""
    g = torch.randn(3, 2, dtype=torch.float64)
    projector = g @ torch.linalg.pinv(g)
    assert trace_variance("sphere", 1, projector) == pytest.approx(2 * 3 / 5 * (2 - 4 / 3))
    v = draw_probes("sphere", 1, torch.zeros(DRAWS, 3, dtype=torch.float64))
    squares = (trace_estimates(v, projector) - 2).square()
    standard_error = float(squares.std()) / DRAWS**0.5
    assert abs(float(squares.mean()) - 0.8) < 4 * standard_error


@pytest.mark.slow
@pytest.mark.parametrize("num_probes", [1, 3])
@pytest.mark.parametrize("kind", PROBES)
@seeded(123)
def test_oracle_12_second_moment_is_the_identity(kind, num_probes):
    """E[v v'] = I for every single probe, within 4.5 standard errors per entry."""
    for v in draw(kind, num_probes):
        products = torch.einsum("bi,bj->bij", v, v)
        standard_error = products.std(0) / DRAWS**0.5
        deviation = products.mean(0) - torch.eye(DIMENSION, dtype=torch.float64)
        assert (deviation.abs() <= 4.5 * standard_error + 1e-12).all()


@pytest.mark.parametrize("num_probes", [1, 2, 5])
@seeded(124)
def test_oracle_12_orthonormal_probes(num_probes, dtype, device):
    """The columns of sqrt(d) Q: v_k . v_l = d where k = l, else zero, for every sample."""
    z = torch.zeros(7, DIMENSION, dtype=dtype, device=device)
    v = draw_probes("orthonormal", num_probes, z)
    assert v.dtype == dtype
    gram = torch.einsum("kbi,lbi->bkl", v, v)
    expected = DIMENSION * torch.eye(num_probes, dtype=dtype, device=device)
    torch.testing.assert_close(gram, expected.expand_as(gram))


@pytest.mark.parametrize("kind", PROBES)
@seeded(125)
def test_oracle_12_probes_of_different_samples_are_independent(kind):
    """Neighbours in a batch are uncorrelated, within 4.5 standard errors."""
    (v,) = draw(kind, 1)
    correlation = (v[0::2] * v[1::2]).mean(0)  # E[v] = 0 for a single probe of every kind.
    assert (correlation.abs() < 4.5 / (DRAWS / 2) ** 0.5).all()


class Recorder(Estimator):
    """Delegates to the encoder form and keeps the probes."""

    def __call__(self, x, encode, decode, draw_probes):
        self.probes = draw_probes(encode(x))
        return EncoderSurrogate()(x, encode, decode, lambda z: self.probes)

    def _surrogate(self, encoded, encode, decode, probes) -> Surrogate:
        raise NotImplementedError


@pytest.mark.parametrize("kind", PROBES)
@seeded(200)
def test_oracle_20_number_of_probes_reaches_the_estimator(kind):
    """The K and the kind that were asked for are drawn, once per sample of the batch."""
    encoder, decoder = tanh_pair(5, 3, torch.device("cpu"), torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    for num_probes in (1, 2, 3):
        recorder = Recorder()
        likelihood = nfi.SurrogateLikelihood(
            num_probes=num_probes, probes=kind, estimator=recorder
        )
        with seeded(5):
            likelihood(x, encoder, decoder)
        with seeded(5):
            expected = draw_probes(kind, num_probes, encoder(x))
        assert recorder.probes.shape == (num_probes, 4, 3)
        assert torch.equal(recorder.probes, expected)


@pytest.mark.parametrize("num_probes", [1, 2])
@seeded(201)
def test_oracle_20_more_probes_lower_the_variance(num_probes):
    """The spread of the surrogate itself is that of K probes, within 4 standard errors."""
    encoder, decoder = tanh_pair(5, 3, torch.device("cpu"), torch.float64)
    x = torch.randn(1, 5, dtype=torch.float64)
    matrix = (dense_jacobian(encoder, x) @ dense_jacobian(decoder, encoder(x)))[0].detach()
    likelihood = nfi.SurrogateLikelihood(num_probes=num_probes)
    volume = likelihood(x.expand(20_000, 5), encoder, decoder).volume.detach()
    squares = (volume + matrix.trace()).square()
    standard_error = float(squares.std()) / 20_000**0.5
    expected = trace_variance("orthonormal", num_probes, matrix)
    assert abs(float(squares.mean()) - expected) < 4 * standard_error


@pytest.mark.parametrize("kind", PROBES)
def test_oracle_20_more_probes_than_dimensions_are_refused(kind):
    """K > d has no orthonormal probes, and K = d of them are exact already."""
    encoder, decoder = tanh_pair(5, 3, torch.device("cpu"), torch.float64)
    x = torch.zeros(2, 5, dtype=torch.float64)
    with pytest.raises(OptionError, match="between 1 and the latent dimension 3, got 4"):
        nfi.SurrogateLikelihood(num_probes=4, probes=kind)(x, encoder, decoder)
    with pytest.raises(OptionError, match="got 0"):
        partial(draw_probes, kind, 0)(x)

"""Estimated log-volumes: their error against the stated one, precision, memory, breakdown."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from support.dense import dense_log_volume
from support.networks import Cold
from support.seeds import manual_seed, seeded_generator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import normflows_injective as nfi
from normflows_injective.volume import EstimatedVolume, lanczos, log_volume
from normflows_injective.volume.bidiagonal import Bidiagonal, bidiagonalise, gauss_rule


def estimate(decode, z, **options) -> EstimatedVolume:
    return log_volume(decode, z, method="lanczos", **options)


def log_spectrum(dimension: int, condition: float):
    return condition ** -torch.linspace(0, 1, dimension, dtype=torch.float64)


def with_spectrum(spectrum, data_dim: int, seed: int = 0):
    """A matrix (D, d) of given singular values with random singular vectors."""
    generator = seeded_generator(seed)
    draws = (
        torch.randn(n, len(spectrum), generator=generator, dtype=torch.float64)
        for n in (data_dim, len(spectrum))
    )
    left, right = (torch.linalg.qr(draw).Q for draw in draws)
    return left @ spectrum.diag() @ right


def curved(dimension: int):
    """A nonlinear decoder to half as many dimensions again; its Jacobian depends on the sample."""
    inner = with_spectrum(log_spectrum(dimension, 30.0), dimension)
    outer = with_spectrum(log_spectrum(dimension, 3.0), dimension + dimension // 2, 1)

    def decode(z):
        return (z + 2 * torch.tanh(z @ inner.to(z).T)) @ outer.to(z).T

    return decode


@pytest.mark.slow
def test_standardised_errors_follow_the_t_distribution():
    """200 samples, 8 probes: errors over stated errors against Student's t with 7 degrees.

    The Kolmogorov-Smirnov distance of 200 draws exceeds 0.115 once in a hundred times, and the
    mean square of the errors over that of the stated ones differs from one by 0.11 (one standard
    error: of 200 squares of normals, and of 200 chi-squares with 7 degrees of freedom).
    """
    decode, z = curved(64), torch.randn(200, 64, dtype=torch.float64)
    with torch.no_grad():
        exact = log_volume(decode, z)
    volume, error = (term.double() for term in estimate(decode, z.float()))
    assert volume.shape == error.shape == (200,)
    standardised = (volume - exact) / error
    assert stats.kstest(standardised.numpy(), stats.t(7).cdf).statistic < 0.16
    ratio = (volume - exact).square().mean() / error.square().mean()
    assert abs(ratio.item() - 1) < 5 * math.sqrt(2 / 200 + 2 / 7 / 200)


@pytest.mark.slow
@pytest.mark.parametrize("num_probes", [2, 12])
def test_the_stated_variance_is_unbiased_for_few_probes_and_for_most(num_probes):
    """At 12 of 16 probes the stated variance would be four times too large without 1 - K/d."""
    decode, z = curved(16), torch.randn(300, 16, dtype=torch.float64)
    with torch.no_grad():
        exact = log_volume(decode, z)
    volume, error = estimate(decode, z, num_probes=num_probes)
    ratio = (volume - exact).square().mean() / error.square().mean()
    assert abs(ratio.item() - 1) < 5 * math.sqrt(2 / 300 + 2 / (num_probes - 1) / 300)


@pytest.mark.parametrize("dimension", [1, 2, 3, 7])
def test_all_probes_and_all_steps_are_exact(dimension):
    decode, z = curved(dimension), torch.randn(5, dimension, dtype=torch.float64)
    volume, error = estimate(decode, z, num_probes=max(dimension, 2), num_steps=100)
    torch.testing.assert_close(volume, dense_log_volume(decode, z), rtol=0, atol=1e-10)
    assert error.max() == 0


@pytest.mark.parametrize("factor", [1e-12, 3.0, 1e12])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_an_isometry_times_a_constant_is_exact_after_one_step(factor, precision, monkeypatch):
    calls = []

    def counted(*args):
        calls.append(len(args[2]))
        return nfi.autodiff.products.jvp(*args)

    monkeypatch.setattr(lanczos, "jvp", counted)
    isometry = factor * with_spectrum(torch.ones(40, dtype=torch.float64), 60).to(precision)
    z = torch.randn(3, 40, dtype=precision)
    volume, error = estimate(lambda s: s @ isometry.T, z)
    assert volume.dtype == error.dtype == precision
    expected = torch.full((3,), 40 * math.log(factor), dtype=precision)
    torch.testing.assert_close(volume, expected, rtol=1e-5, atol=1e-4)
    assert error.max() < 1e-4
    assert calls == [8]


SPECTRA = {
    "even over decades": lambda d, c: log_spectrum(d, c),
    "down to zero": lambda d, c: torch.linspace(1, 1 / c, d, dtype=torch.float64),
    "two levels": lambda d, c: torch.cat([torch.ones(d // 2), torch.full((d // 2,), 1 / c)]),
    "half flat": lambda d, c: torch.cat([torch.ones(d // 2), log_spectrum(d // 2, c)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_truncated_rule_lies_within_its_stated_error(name, condition):
    """32 steps of 256: for one spectrum the Gauss rule alone is 230 nats off, with spread 30.

    Ten stated errors, because Student's t with 7 degrees exceeds four once in two hundred times,
    and there are 96 values. The median of six exceeds 2.5 once in 20,000 times. The truncation
    cannot scatter like that, so it is compared with its allowance alone below.
    """
    spectrum = SPECTRA[name](256, condition).double()
    volume, error = estimate(lambda z: z * spectrum, torch.zeros(6, 256).double(), num_steps=32)
    standardised = (volume - spectrum.log().sum()) / error
    assert standardised.abs().median() < 2.5
    assert standardised.abs().max() < 10


@pytest.mark.slow
@pytest.mark.parametrize("condition", [1e2, 1e3, 1e4])
def test_with_all_probes_only_the_truncation_is_left_and_it_is_covered(condition):
    """Without statistical error: the rule lies above, the corrected one within its allowance."""
    spectrum = log_spectrum(128, condition)
    z = torch.zeros(2, 128, dtype=torch.float64)
    for num_steps in (16, 32, 64):
        volume, error = estimate(lambda s: s * spectrum, z, num_probes=128, num_steps=num_steps)
        missing = volume - spectrum.log().sum()
        assert (missing.abs() <= error).all()
        assert (missing + error > 0).all()  # the Gauss rule itself


def test_more_steps_lower_the_rule_down_to_the_integral():
    spectrum = log_spectrum(20, 1e3)
    start = torch.randn(3, 2, 20, dtype=torch.float64)
    start = start / start.norm(dim=2, keepdim=True)
    product = spectrum.mul
    process = bidiagonalise(product, product, start, 20, 20, 1e-15)
    rules = torch.stack([gauss_rule(process, count)[0] for count in range(1, 21)])
    assert (rules.diff(dim=0) < 1e-10).all()
    expected = (start.square() * spectrum.log()).sum(2)
    torch.testing.assert_close(rules[-1], expected, rtol=0, atol=1e-9)
    assert process.complete.all()


def gram_lanczos(matrix, steps: int):
    """What this is not: the Lanczos process on the Gram matrix, in the matrix's precision."""
    v = torch.linalg.qr(torch.randn(steps, steps).to(matrix)).Q
    basis = [v]
    tridiagonal = torch.zeros(steps, steps, steps, dtype=torch.float64)
    for step in range(steps):
        w = matrix.T @ (matrix @ basis[-1])
        tridiagonal[:, step, step] = (basis[-1] * w).sum(0)
        for _ in range(2):
            for other in basis:
                w = w - other * (other * w).sum(0)
        if step + 1 < steps:
            tridiagonal[:, step, step + 1] = tridiagonal[:, step + 1, step] = w.norm(dim=0)
            basis.append(w / w.norm(dim=0))
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    return (vectors[:, 0].square() * nodes.log()).sum(1).mean() * steps / 2


def test_float32_at_condition_number_ten_thousand_where_the_gram_route_fails():
    matrix = with_spectrum(log_spectrum(24, 1e4), 48).float()
    expected = torch.linalg.svdvals(matrix.double()).log().sum()
    volume, error = estimate(lambda z: z @ matrix.T, torch.zeros(1, 24), num_probes=24)
    assert error == 0
    assert (volume - expected).abs() < 2e-4
    gram = gram_lanczos(matrix, 24)
    assert not (gram - expected).abs() < 0.05  # NaN from a negative node, or far off


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes():
            stored = out.untyped_storage().nbytes() // out.element_size()
            self.elements = max(self.elements, stored)
        return out


@pytest.mark.slow
@pytest.mark.parametrize(("chunk_size", "probes"), [(None, 8), (2, 2)])
def test_memory_at_a_thousand_dimensions(chunk_size, probes):
    def decode(z):
        return torch.cat([z + 0.3 * z.roll(1, 1).sin(), 0.5 * z.cos()], dim=1)

    z = torch.randn(1, 1024)
    with torch.no_grad():
        exact = log_volume(decode, z)
    with LargestTensor() as largest:
        volume, error = estimate(decode, z, num_steps=16, chunk_size=chunk_size)
    # Vectors of the data side, kept for reorthogonalisation; far below the Jacobian's 1024 * 2048.
    assert largest.elements == probes * 16 * 2048
    assert (volume - exact).abs() < 5 * error
    assert error < 30


def test_the_probe_does_see_a_jacobian():
    """The measurement above, on the exact method."""
    with LargestTensor() as largest, torch.no_grad():
        log_volume(lambda z: torch.cat([z, z], dim=1), torch.randn(1, 100))
    assert largest.elements >= 100 * 200


@pytest.mark.slow
def test_chunks_change_nothing_but_the_memory():
    decode, z = curved(12), torch.randn(3, 12, dtype=torch.float64)
    results = []
    for chunk_size in (None, 1, 3, 100):
        manual_seed(5)
        results.append(estimate(decode, z, chunk_size=chunk_size, num_steps=6))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_samples_that_break_down_early_leave_the_others_alone():
    """Three distinct singular values end after three steps, one after one; 20 go on."""
    spectra = torch.stack(
        [
            torch.full((20,), 2.0),
            torch.tensor([1.0, 3.0, 0.01]).repeat(7)[:20],
            torch.arange(1.0, 21.0),
        ]
    ).double()
    volume, error = estimate(lambda z: z * spectra, torch.zeros(3, 20).double(), num_probes=20)
    torch.testing.assert_close(volume, spectra.log().sum(1), rtol=0, atol=1e-8)
    # Cut at 10 steps, the first two are still exact and say so.
    volume, error = estimate(
        lambda z: z * spectra, torch.zeros(3, 20).double(), num_probes=20, num_steps=10
    )
    torch.testing.assert_close(volume[:2], spectra.log().sum(1)[:2], rtol=0, atol=1e-8)
    assert error[:2].max() < 1e-8
    assert error[2] > 1e-3


def test_rank_deficiency_warns_and_says_where():
    spectra = torch.ones(3, 10)
    spectra[1, 3] = 0.0
    with pytest.warns(nfi.errors.NumericalWarning, match=r"1 of 3 .*\(first at index 1") as seen:
        volume, error = estimate(lambda z: z * spectra, torch.zeros(3, 10))
    blamed = (__file__, estimate.__code__.co_firstlineno + 1)
    assert (seen[0].filename, seen[0].lineno) == blamed
    assert volume[1] < -10
    torch.testing.assert_close(volume[[0, 2]], torch.zeros(2), rtol=0, atol=1e-5)
    assert not error.isnan().any()


def test_a_constant_direction_has_no_volume_and_an_unknown_error():
    with pytest.warns(nfi.errors.NumericalWarning, match="1 of 2 decoder Jacobians"):
        volume, error = estimate(lambda z: z.square(), torch.tensor([[0.0], [0.5]]).double())
    assert volume.tolist() == [-torch.inf, pytest.approx(0, abs=1e-12)]
    assert error.tolist() == [torch.inf, 0.0]


def test_a_decoder_that_gives_nan_gives_it_here():
    z = torch.randn(3, 6, dtype=torch.float64)
    z[1, 0] = -1.0
    z[[0, 2], 0] = 1.0
    volume, error = estimate(lambda s: s * s[:, :1].sqrt(), z)
    assert volume.isnan().tolist() == error.isnan().tolist() == [False, True, False]


def test_images():
    net = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 4, 3, padding=1))
    net, z = net.double(), torch.randn(4, 2, 3, 3, dtype=torch.float64)
    volume, error = estimate(net, z, num_probes=18)
    torch.testing.assert_close(volume, dense_log_volume(net, z), rtol=0, atol=1e-8)
    assert error.max() == 0


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_cold_layer_and_every_gradient_mode(mode):
    net = Cold(3).double()
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    before = z.detach().clone()
    with mode():
        inside = z if mode is not torch.inference_mode else z.clone()
        volume, error = estimate(net, inside, num_probes=3)
    assert bool(net.norm.data_dep_init_done)
    assert not volume.requires_grad
    assert not error.requires_grad
    assert z.grad is None
    assert torch.equal(z, before)
    torch.testing.assert_close(volume, dense_log_volume(net, z.detach()))


def test_layers_that_write_into_their_input_do_not_move_the_point():
    def decode(z):
        z += 1.0
        return torch.cat([z, z**2], dim=1)

    z = torch.randn(3, 4, dtype=torch.float64)
    before = z.clone()
    volume, _ = estimate(decode, z, num_probes=4)
    assert torch.equal(z, before)
    expected = 0.5 * torch.log1p(4 * (z + 1).square()).sum(1)
    torch.testing.assert_close(volume, expected)


def test_half_precision_is_lifted():
    z = torch.randn(2, 12, dtype=torch.bfloat16)
    volume, error = estimate(lambda s: torch.cat([2 * s, s], 1), z)
    assert volume.dtype == error.dtype == torch.float32
    torch.testing.assert_close(volume, torch.full((2,), 6 * math.log(5)), rtol=0, atol=0.05)


def test_maps_and_layers_that_are_refused():
    with pytest.raises(nfi.errors.NotInjectiveError, match="takes 3 dimensions to 2"):
        estimate(nn.Linear(3, 2), torch.randn(4, 3))
    with pytest.raises(nfi.errors.UnsupportedLayerError, match="couples the samples"):
        estimate(nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5)), torch.randn(3, 2))
    with pytest.raises(nfi.errors.ShapeError, match="batch of one"):
        estimate(Cold(3), torch.randn(1, 3))
    with pytest.raises(nfi.errors.NotInjectiveError, match="does not depend on its input"):
        estimate(lambda z: z.detach() * 2, torch.randn(3, 2))


OPTIONS = [
    ({"method": "slq"}, "method must be one of exact, lanczos, got 'slq'"),
    ({"num_probes": 4}, "num_probes and num_steps are options of method='lanczos'"),
    ({"method": "exact", "num_steps": 4}, "but the method is 'exact', which needs neither"),
    ({"method": "lanczos", "num_probes": 1}, "num_probes must be at least 2, got 1: the standard"),
    ({"method": "lanczos", "num_probes": 0}, "Leave it out for 8"),
    ({"method": "lanczos", "num_steps": 3}, "num_steps must be at least 4, got 3: the trunc"),
    ({"method": "lanczos", "num_steps": 0}, "Leave it out for 64"),
    ({"method": "lanczos", "chunk_size": 0}, "chunk_size must be at least 1 or None, got 0"),
]


@pytest.mark.parametrize(("options", "text"), OPTIONS)
def test_options_out_of_range(options, text):
    with pytest.raises(nfi.errors.OptionError, match=text):
        log_volume(nn.Linear(6, 8), torch.randn(3, 6), **options)


def test_fewer_steps_are_enough_where_there_are_fewer_dimensions():
    volume, _ = estimate(lambda z: torch.cat([z, z], 1), torch.zeros(2, 2), num_steps=2)
    torch.testing.assert_close(volume, torch.full((2,), math.log(2)))


def test_remainder_of_a_power_a_geometric_series_and_no_convergence():
    def rest(errors):
        quarter, half, full = (torch.tensor([error]) for error in errors)
        return lanczos._remainder(half - full, quarter - half, doublings=3.0).item()

    assert rest([16.0, 4.0, 1.0]) == pytest.approx(1.0)  # errors as 1 / m^2: exact
    assert rest([4.0, 2.0, 1.0]) == pytest.approx(1.0)  # as 1 / m: exact
    assert rest([3.0, 2.0, 1.0]) == pytest.approx(3.0)  # no shrinking: three more doublings
    assert rest([0.0, 0.0, 0.0]) == 0


def test_the_rule_of_a_known_block():
    """B = diag(2, 3) coupled by 1: nodes and weights of B'B by hand."""
    block = Bidiagonal(
        torch.tensor([[[2.0, 3.0]]]), torch.tensor([[[1.0]]]), torch.tensor([[True]])
    )
    gram = torch.tensor([[4.0, 2.0], [2.0, 10.0]], dtype=torch.float64)
    nodes, vectors = torch.linalg.eigh(gram)
    expected = (vectors[0].square() * nodes.log()).sum() / 2
    torch.testing.assert_close(gauss_rule(block, 2)[0][0, 0], expected)
    torch.testing.assert_close(gauss_rule(block, 1)[0][0, 0].exp().float(), torch.tensor(2.0))


def test_attention_in_the_decoder():
    """The fused kernels have no second derivatives; the formula has."""
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    layers = [torch.nn.Linear(4, 16), torch.nn.Unflatten(1, (2, 8)), layer, torch.nn.Flatten()]
    decoder = torch.nn.Sequential(*layers).double()
    z = torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        exact = log_volume(decoder, z)
    estimate = log_volume(decoder, z, method="lanczos", num_probes=4)
    torch.testing.assert_close(estimate.log_volume, exact)

"""Estimates of the dimension of data, on manifolds whose dimension is known."""

from __future__ import annotations

import builtins
import math

import pytest
import torch
from support.data_manifolds import DATA_MANIFOLDS, data_on
from support.seeds import seeded_generator

import normflows_injective as nfi
from normflows_injective.diagnostics import suggest_latent_dim
from normflows_injective.diagnostics.dimension.codes import _lengths, _read
from normflows_injective.diagnostics.dimension.neighbours import _by_ratios, nearest
from normflows_injective.diagnostics.dimension.rows import prepare
from normflows_injective.errors import NonFiniteError, OptionError, ShapeError


def report_on(name, count=1500, noise=0.0, **options):
    options.setdefault("num_steps", None)
    return suggest_latent_dim(data_on(name, count, noise), **options)


# Without an autoencoder the range has to be right, if wide.
@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.03])
@pytest.mark.parametrize("name", DATA_MANIFOLDS)
def test_local_estimates_contain_the_intrinsic_dimension(name, noise):
    report, known = report_on(name, noise=noise), DATA_MANIFOLDS[name]
    assert report.intrinsic[0] <= known.intrinsic <= report.intrinsic[1], report
    assert report.recommended[0] <= known.intrinsic, report
    assert known.chart <= report.recommended[1], report
    assert report.recommended[1] <= report.principal_components.rank


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA_MANIFOLDS)
def test_the_range_contains_the_truth(name):
    report, known = report_on(name, 1500, 0.02, num_steps=300), DATA_MANIFOLDS[name]
    assert report.recommended[0] <= known.intrinsic, report
    assert known.chart <= report.recommended[1], report


# What one estimator gets wrong, another one gets right.
@pytest.mark.slow
def test_noise_misleads_neighbours_and_not_gaps():
    report = report_on("torus in 20", 3000, 0.03)
    assert report.two_nearest[0].dim > 3
    clearest = max(report.local_components, key=lambda one: one.gap)
    assert clearest.median == 2


def test_curvature_has_gaps_of_its_own_that_do_not_count():
    for size in report_on("torus in 20").local_components[:3]:
        assert (size.low, size.median, size.high) == (2, 2, 2)


@pytest.mark.slow
def test_thin_directions_mislead_errors_and_not_gaps():
    x = data_on("rank 18 of 20", 1500, 0.0)
    x = x @ torch.linalg.qr(torch.randn(20, 20, dtype=x.dtype)).Q
    basis = torch.linalg.svd(x, full_matrices=False)[2]
    x = x @ basis.T * torch.linspace(1, 0.1, 20, dtype=x.dtype) @ basis
    report = suggest_latent_dim(x, standardise=False, num_steps=100)
    assert report.chart[1] < 18
    assert report.recommended[1] == 18


def test_many_dimensions_mislead_neighbours_and_not_the_rank():
    report = report_on("rank 18 of 20")
    assert all(scale.dim < 17 for scale in report.two_nearest)
    assert report.principal_components.rank == report.recommended[1] == 18


def test_curvature_misleads_components_and_not_neighbours():
    report = report_on("clusters")
    assert report.principal_components.for_shares[1] > 3
    assert abs(report.two_nearest[0].dim - 2) < 5 * report.two_nearest[0].standard_error


@pytest.mark.slow
def test_closed_manifolds_need_more_coordinates_than_dimensions():
    report = report_on("torus in 20", 2000, num_steps=300)
    assert report.intrinsic == (2, 2)
    assert report.chart[1] == report.recommended[1] == 4
    codes = report.code_errors
    assert codes.errors[1] > 0.1 > 0.01 > codes.errors[3]


@pytest.mark.slow
def test_one_autoencoder_unbends_what_components_cannot():
    codes = report_on("curved graph over 4", 2000, num_steps=700).code_errors
    assert codes.errors[3] < 0.6 * codes.linear_errors[3]
    assert codes.high < 9


def test_the_ratio_estimator_against_exponential_numbers():
    """Censoring leaves the estimate unbiased, up to 1/m, with the standard error it states."""
    numbers = torch.rand(200, 500, generator=seeded_generator(1), dtype=torch.float64)
    estimates = [_by_ratios(-row.log() / 7) for row in numbers]
    dims = torch.tensor([dim for dim, _ in estimates])
    error = estimates[0][1]
    # 200 estimates: their mean has a 14th of the error of one, their spread one of 5 %.
    assert abs(float(dims.mean()) - 7) < 5 * error / math.sqrt(200)
    assert abs(float(dims.std()) / error - 1) < 0.25


def test_neighbours_against_all_distances():
    rows = torch.randn(60, 4, generator=seeded_generator(2), dtype=torch.float64) + 1e4
    distances, indices = nearest(rows, rows[:7], 5)
    expected = (rows[:7, None] - rows[None]).norm(dim=2).sort(1)
    torch.testing.assert_close(distances, expected.values[:, 1:6], rtol=1e-6, atol=0)
    assert torch.equal(indices, expected.indices[:, 1:6])


def test_components_against_singular_values():
    x = data_on("rank 18 of 20", 300, 0.0)
    spectrum = suggest_latent_dim(x, standardise=False, num_steps=None).principal_components
    expected = torch.linalg.svdvals(x - x.mean(0)).square() / 299
    torch.testing.assert_close(spectrum.variances, expected, atol=1e-10, rtol=1e-8)
    shares = expected.cumsum(0) / expected.sum()
    assert spectrum.for_shares[1] == int((shares < 0.95).sum()) + 1


def test_wide_rows_have_the_spectrum_of_their_inner_products():
    x = data_on("flat 5 in 20", 60, 0.05)
    wide = torch.cat([x, torch.zeros(60, 80, dtype=x.dtype)], dim=1)
    wide = wide @ torch.linalg.qr(torch.randn(100, 100, dtype=x.dtype)).Q
    reports = [suggest_latent_dim(y, standardise=False, num_steps=1) for y in (x, wide)]
    spectra = [report.principal_components for report in reports]
    torch.testing.assert_close(spectra[0].variances, spectra[1].variances[:20])
    torch.testing.assert_close(spectra[1].basis.mT @ spectra[1].basis, torch.eye(60).double())
    # Rows are sorted, so the wide ones come in another order.
    ratios = [report.two_nearest[0].dim for report in reports]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-6)
    assert spectra[0].rank == spectra[1].rank == 20
    assert "The rank of 60 rows is less than 60" in str(reports[1])


@pytest.mark.slow
def test_very_wide_rows_are_fewer():
    prepared = prepare(torch.randn(1001, 21_000), False, 10_000, seeded_generator(0))
    assert prepared.rows.shape == (1000, 21_000)
    assert any("as many as 21000 columns allow" in note for note in prepared.notes)


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rank_survives_rounding(dtype, offset):
    x = (data_on("rank 18 of 20", 500, 0.0) + offset).to(dtype)
    assert suggest_latent_dim(x, num_steps=None).principal_components.rank == 18


def test_the_rule_that_reads_the_errors():
    floor = [0.5, 0.2, 0.04, 0.03, 0.025, 0.02]
    assert _read((1, 2, 3, 4, 5, 6), floor, 9) == (3, 3, True)
    assert _read((1, 2, 3, 4), [0.5, 0.04, 0.03, 0.005], 9) == (2, 4, False)
    # The last length but one cannot be a floor, and a smooth decay has none.
    assert _read((1, 2), [0.3, 0.0], 2) == (2, 2, False)
    assert _read((1, 2, 3), [0.5, 0.4, 0.3], 9)[:2] == (3, 3)
    assert _lengths(40)[:16] == tuple(range(1, 17))
    assert _lengths(40)[16:] == (18, 21, 24, 28, 32, 37, 40)


def test_data_that_fill_their_space_are_told_that_an_injection_leaves_something_out():
    full = suggest_latent_dim(torch.randn(400, 3), num_steps=None)
    assert full.recommended[1] == 3
    assert "give an injective flow 2 at most" in " ".join(full.notes)
    flat = suggest_latent_dim(data_on("flat 5 in 20", 400, 0.0), num_steps=None)
    assert "at most, or take nf.NormalizingFlow" not in " ".join(flat.notes)


def test_units_are_removed_unless_told_otherwise():
    x = data_on("flat 5 in 20", 500, 0.0)
    scales = torch.logspace(-3, 3, 20, dtype=x.dtype)
    plain, scaled = (suggest_latent_dim(y, num_steps=None) for y in (x, scales * x))
    assert plain.recommended == scaled.recommended
    assert any("divided by their standard deviations" in note for note in scaled.notes)
    raw = suggest_latent_dim(scales * x, standardise=False, num_steps=None)
    assert not any("standard deviations" in note for note in raw.notes)
    assert raw.principal_components.for_shares[0] < plain.principal_components.for_shares[0]


def test_constant_columns_repeated_rows_and_many_rows_are_named():
    x = data_on("flat 5 in 20", 400, 0.0)
    x = torch.cat([x, torch.full((400, 1), 3.0), (x[:, :1] > 0).to(x)], dim=1)
    report = suggest_latent_dim(torch.cat([x, x[:50]]), num_steps=None)
    text = str(report)
    assert "50 rows that repeat others were left out" in text
    assert "1 column (20) is constant" in text
    assert "1 column (21) has fewer than 20 different values" in text
    assert (report.num_rows, report.num_columns) == (400, 21)
    few = suggest_latent_dim(x, num_steps=None, max_rows=300)
    assert few.num_rows == 300
    assert "300 of 400 rows, drawn at random" in str(few)


def test_few_rows_widen_the_range():
    x = data_on("flat 5 in 20", 1000, 0.0)
    some = suggest_latent_dim(x, num_steps=None)
    few = suggest_latent_dim(x[:100] + 1e-2 * torch.randn(100, 20).double(), num_steps=None)
    assert "100 rows are few" in str(few)
    assert few.recommended[0] < few.intrinsic[0]
    assert few.recommended[1] > few.chart[1]
    assert some.recommended[0] == 5


@pytest.mark.parametrize("num_steps", [1, None])
@pytest.mark.parametrize("shape", [(40, 1), (30, 50), (40, 1, 3, 3)])
def test_small_and_odd_shapes(shape, num_steps):
    report = suggest_latent_dim(torch.randn(shape), num_steps=num_steps)
    low, high = report.recommended
    assert 1 <= low <= high <= min(math.prod(shape[1:]), shape[0] - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_of_the_data_and_the_default_one_do_not_matter(dtype, float64_by_default):
    x = data_on("circle in 10", 60, 0.01).to(dtype).requires_grad_()
    assert suggest_latent_dim(x, num_steps=2).recommended[1] >= 2


def test_what_is_refused():
    with pytest.raises(OptionError, match="at least 30 rows, got 29"):
        suggest_latent_dim(torch.randn(29, 3))
    with pytest.raises(OptionError, match="10 different rows among 50"):
        suggest_latent_dim(torch.randn(10, 3).repeat(5, 1))
    with pytest.raises(ShapeError, match="no column that varies"):
        # Columns that differ in their last digit alone.
        suggest_latent_dim(1 + torch.finfo(torch.float32).eps * torch.randint(3, (40, 9)))
    broken = torch.randn(40, 3)
    broken[4, 1] = math.inf
    with pytest.raises(NonFiniteError, match="x has 1 of 120"):
        suggest_latent_dim(broken)
    with pytest.raises(NonFiniteError, match="standard deviations of x.*Divide x by a constant"):
        suggest_latent_dim(1e200 * torch.randn(40, 3, dtype=torch.float64))
    with pytest.raises(OptionError, match="num_steps.*leave the autoencoder out"):
        suggest_latent_dim(torch.randn(40, 3), num_steps=0)
    with pytest.raises(OptionError, match="max_rows"):
        suggest_latent_dim(torch.randn(40, 3), max_rows=10)


@pytest.mark.slow
def test_random_numbers_come_from_the_generator_alone():
    x = data_on("circle in 10", 300, 0.01)
    before, state = x.clone(), torch.get_rng_state()
    reports = [suggest_latent_dim(x, num_steps=5) for _ in range(2)]
    other = suggest_latent_dim(x, num_steps=5, generator=seeded_generator(7))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(x, before)
    assert reports[0].code_errors == reports[1].code_errors != other.code_errors
    with torch.inference_mode():
        inside = suggest_latent_dim(x + 0, num_steps=5)
    assert inside.code_errors == reports[0].code_errors


def test_the_report_is_readable():
    report = report_on("circle in 10", 300, num_steps=5)
    text = str(report)
    for part in ("principal components", "two nearest", "neighbourhoods", "RECOMMENDED: 1 to"):
        assert part in text
    assert repr(report) == text
    assert max(map(len, text.splitlines())) < 80
    assert "an autoencoder would tell" in str(report_on("circle in 10", 300))


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [5, None])
def test_the_plot(num_steps, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need the extra [plot]")
    report = report_on("circle in 10", 300, num_steps=num_steps)
    report.plot().savefig(tmp_path / "dimension.png")
    assert (tmp_path / "dimension.png").stat().st_size > 10_000


def test_the_plot_without_matplotlib_says_how_to_install_it(monkeypatch):
    report = report_on("circle", 100)
    original = builtins.__import__

    def without(name, *rest, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(nfi.errors.OptionError, match=r"pip install normflows-injective\[plot\]"):
        report.plot()

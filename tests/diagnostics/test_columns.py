"""The report on the columns of a table."""

from __future__ import annotations

import math

import pytest
import torch
from support.comparison import close
from support.seeds import seeded_generator

from normflows_injective.diagnostics import column_report
from normflows_injective.errors import NonFiniteError, ShapeError

ROWS = 2000
NAMES = ["normal", "count", "decimal", "zeros", "constant", "heavy", "fill", "copy", "sum"]


def table(dtype=torch.float64):
    """One column of every kind."""
    columns = torch.randn(ROWS, 9, dtype=torch.float64)
    columns[:, 1] = (3 * columns[:, 1]).round()
    columns[:, 2] = 170 + (30 * columns[:, 2]).round() / 10
    columns[:, 3] *= torch.rand(ROWS) < 0.3
    columns[:, 4] = 7.0
    columns[:, 5] = torch.tan(math.pi * (torch.rand(ROWS) - 0.5))
    columns[3, 6] = 9.97e36
    columns[:, 7] = columns[:, 0]
    columns[:, 8] = 2 * columns[:, 0] - columns[:, 2] + 5
    return columns.to(dtype)


@pytest.mark.parametrize("kept", [torch.float32, torch.float64])
def test_every_kind_of_column_is_told(kept):
    report = column_report(table(kept), names=NAMES)
    found = {column.name: column for column in report.columns}
    assert report.rank == 6
    assert report.num_duplicates == 0
    assert [c.name for c in report.columns if c.depends] == ["constant", "copy", "sum"]
    assert [c.name for c in report.columns if c.copy_of] == ["copy"]
    assert found["copy"].copy_of == "normal"
    assert [c.name for c in report.columns if c.is_constant] == ["constant"]
    assert abs(found["count"].width - 1) < 1e-9
    assert abs(found["decimal"].width - 0.1) < 1e-4
    assert found["count"].tied_share > 0.99
    assert 0.65 < found["zeros"].tied_share < 0.75
    assert found["zeros"].width == 0
    assert found["fill"].num_outside == 1
    assert found["heavy"].num_outside > 0.02 * ROWS
    assert not found["normal"].remedies


def test_discrete_columns():
    x = torch.randint(3, (100, 2), dtype=torch.float64)
    x[:, 1] = torch.randn(100)
    assert [column.is_discrete for column in column_report(x).columns] == [True, False]


def test_every_finding_is_printed_with_its_remedy():
    text = str(column_report(table(), names=NAMES))
    for words in (
        "2000 rows of 9 columns, rank 6, 0 duplicate rows",
        "count, decimal: on a coarse grid, whose width stands above. A density there is unbounded",
        "% of the rows have the value 0. A density there is unbounded: model these rows apart",
        "constant: constant at 7. Drop it",
        "heavy tails. Use nfi.flows.Standardise.fit(x, transform='auto')",
        "fill: a few values beyond ten robust deviations. Look whether they are fill values",
        "copy: a copy of normal. Drop it",
        "sum: a linear function of earlier columns. Drop it, or use at most 6 latent",
    ):
        assert words in text


def test_digits_that_were_rounded_away_are_no_defect():
    """Ties of a fine grid, which every table of measurements has."""
    x = torch.randn(ROWS, 2, dtype=torch.float64)
    x[:, 0] = (1000 * x[:, 0]).round() / 1000
    # Three digits for small numbers and two for large ones: ties on no grid.
    x[:, 1] = torch.where(x[:, 1].abs() < 1, 1000 * x[:, 1], 10 * (100 * x[:, 1]).round()) / 1000
    x[:, 1] = (1000 * x[:, 1]).round() / 1000
    rounded, mixed = column_report(x).columns
    assert rounded.tied_share > 0.3
    assert not rounded.remedies
    assert not mixed.remedies


def test_many_columns_share_a_remedy():
    x = torch.randint(5, (200, 7), dtype=torch.float64)
    assert "column 3 and 3 more: on a coarse grid" in str(column_report(x))


def test_duplicate_rows_are_counted():
    x = torch.randn(50, 2)
    x[:, 1] = 0.0
    x[10] = x[0]
    x[10, 1] = -0.0  # the same number
    x[20] = x[0]
    report = column_report(x)
    assert report.num_duplicates == 2
    assert "Duplicate rows: keep them out" in str(report)


def test_noise_of_the_width_of_the_ties_goes_to_tied_columns_alone():
    x = table()
    report = column_report(x)
    noisy = report.dequantise(x, seeded_generator(0))
    again = report.dequantise(x, seeded_generator(0))
    assert torch.equal(noisy, again)
    moved = (noisy != x).any(0).tolist()
    assert moved == [False, True, True, *6 * [False]]
    assert torch.equal(noisy[:, 1].round(), x[:, 1])
    noise = (noisy[:, 2] - x[:, 2]) / 0.1
    # The standard error of a uniform mean is .29 / sqrt(2000), of its deviation about .0033.
    close(noise.mean(), 0.0, 0.03)
    close(noise.std(), 12**-0.5, 0.015)
    assert noise.abs().max() < 0.5 + 1e-9
    assert column_report(noisy).columns[2].tied_share == 0
    with pytest.raises(ShapeError, match=r"x must have shape \(B, 9\)"):
        report.dequantise(x[:, :3])


def test_a_continuous_column_in_float32_has_no_grid():
    x = torch.rand(200_000, 1)  # some of them tie by rounding
    column = column_report(x).columns[0]
    assert column.tied_share > 0
    assert column.width == 0
    assert not column.remedies


def test_large_offsets_do_not_make_columns_dependent():
    x = 1e6 + torch.randn(ROWS, 3)
    assert column_report(x).rank == 3
    x[:, 2] = x[:, 0] + x[:, 1] - 1e6
    assert column_report(x).rank == 2


def test_wide_tables_have_at_most_one_dimension_less_than_rows():
    assert column_report(torch.randn(5, 10, dtype=torch.float64)).rank == 4


def test_what_is_no_finite_table_is_refused():
    with pytest.raises(ShapeError, match=r"a table of shape \(N, D\)"):
        column_report(torch.zeros(4, 2, 2))
    with pytest.raises(ShapeError, match="at least two rows"):
        column_report(torch.zeros(1, 2))
    x = torch.zeros(4, 2)
    x[0, 1] = math.nan
    with pytest.raises(NonFiniteError, match=r"in column 1 \(1\)"):
        column_report(x)

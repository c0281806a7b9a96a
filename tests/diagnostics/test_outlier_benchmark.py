"""The benchmark of outliers runs, and its anomalies are what their names say."""

from __future__ import annotations

import pytest
import torch
from support.paths import ROOT
from support.seeds import seeded_generator

for needed in ("sklearn", "tabulate"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")


@pytest.fixture
def outliers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.diagnostics import outliers

    return outliers


def test_anomalies_have_the_shape_of_fresh_rows(outliers):
    rows = outliers.manifold_rows("surface in R^5", 50, seed=0)
    assert set(rows.anomalies) == set(outliers.KINDS)
    assert all(x.shape == rows.test.shape == (50, 5) for x in rows.anomalies.values())
    again = outliers.manifold_rows("surface in R^5", 50, seed=0)
    assert torch.equal(rows.train, again.train)
    other = outliers.manifold_rows("surface in R^5", 50, seed=1)
    assert not torch.equal(rows.test, other.test)


def test_permuted_columns_keep_their_values_and_a_shift_moves_one_cell(outliers):
    from benchmarks.diagnostics.anomalies import _of_cells

    fresh, train = torch.randn(40, 3), torch.randn(100, 3)
    found = _of_cells(fresh, train, 2.0, seeded_generator(0))
    assert torch.equal(found["permuted"].sort(0).values, fresh.sort(0).values)
    moved = (found["cell"] - fresh).abs() > 1e-4
    assert moved.sum(1).tolist() == [1] * 40
    sizes = (found["cell"] - fresh).abs() / train.std(0)
    torch.testing.assert_close(sizes[moved], torch.full((40,), 2.0), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_short_run_gives_both_tables(outliers):
    rows = outliers.manifold_rows("surface in R^5", 60, seed=0)
    record = {"key": "surface in R^5-0", **outliers.measure(rows, 40, 0)}
    assert set(record["areas"]) == set(outliers.KINDS)
    assert all(0 <= v <= 1 for area in record["areas"].values() for v in area.values())
    assert outliers.areas([record]).count("\n") == 1 + len(outliers.KINDS)
    assert outliers.alarms([record]).count("\n") == 2

"""Functions of whole tables take arrays and data frames as they take tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.seeds import shifted

import normflows_injective as nfi
from normflows_injective.diagnostics import (
    column_report,
    injectivity_report,
    suggest_latent_dim,
)


class Frame:
    """What a data frame has that is looked at."""

    columns = ("a", "b", "c", "d", "e")

    def __init__(self, values: NDArray[Any]) -> None:
        self.values, self.shape = values, values.shape

    def __len__(self) -> int:
        return len(self.values)

    def to_numpy(self) -> NDArray[Any]:
        return self.values


@pytest.fixture
def values() -> NDArray[np.float64]:
    return np.random.default_rng(shifted(0)).normal(size=(60, 5))


@pytest.fixture(params=[torch.float32, torch.float64])
def model(request: pytest.FixtureRequest, values: NDArray[np.float64]) -> Any:
    return nfi.injective_flow(values, 2, hidden=(8,)).to(request.param)


@pytest.mark.parametrize("kind", [np.asarray, Frame])
def test_scores_of_an_array(model: Any, values: NDArray[np.float64], kind: Any) -> None:
    dtype = next(model.parameters()).dtype
    x = torch.as_tensor(values).to(dtype)
    expected = nfi.score(model, x[:9], x)
    by_place = nfi.score(model, kind(values[:9]), kind(values))
    by_name = nfi.score(model, x=kind(values[:9]), reference=x)
    for found in (by_place, by_name):
        assert found.log_prob.dtype == dtype
        torch.testing.assert_close(found.log_prob, expected.log_prob)
        torch.testing.assert_close(found.p_value, expected.p_value)


def test_contexts_of_arrays(values: NDArray[np.float64]) -> None:
    model = nfi.injective_flow(values, 2, hidden=(8,), context_dim=1)
    context = values[:, :1]
    x, known = (torch.as_tensor(part).float() for part in (values, context))
    expected = nfi.score(model, x, x, known, known)
    found = nfi.score(model, values, values, context=context, reference_context=context)
    torch.testing.assert_close(found.log_prob, expected.log_prob)


def test_a_report_of_an_array(model: Any, values: NDArray[np.float64]) -> None:
    x = torch.as_tensor(values).to(next(model.parameters()).dtype)
    expected = injectivity_report(model, x)
    torch.testing.assert_close(
        injectivity_report(model, values).singular_values, expected.singular_values
    )


def test_columns_have_the_names_of_a_frame(values: NDArray[np.float64]) -> None:
    frame = Frame(values)
    assert [c.name for c in column_report(frame).columns] == list(frame.columns)
    assert column_report(frame, list("vwxyz")).columns[0].name == "v"
    assert column_report(values).columns[0].name == "column 0"


def test_dimensions_of_an_array_of_whole_numbers() -> None:
    table = np.random.default_rng(shifted(0)).integers(0, 99, size=(200, 3))
    expected = suggest_latent_dim(torch.as_tensor(table).double(), num_steps=None)
    assert suggest_latent_dim(table, num_steps=None).recommended == expected.recommended


def test_what_holds_no_numbers_is_refused(model: Any) -> None:
    with pytest.raises(nfi.errors.DtypeError, match="x must hold numbers"):
        nfi.score(model, np.array([["a", "b"]]))
    with pytest.raises(nfi.errors.DtypeError, match="got list"):
        nfi.score(model, [[1.0, 2.0]])

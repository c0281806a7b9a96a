"""Log-volumes by Gram matrices: their error, the measure of it, and where QR takes over."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.seeds import seeded_generator
from torch import Tensor

from normflows_injective.volume import factoring, gram


def matrices(
    count: int, rows: int, columns: int, condition: float, seed: int
) -> tuple[Tensor, float]:
    """Matrices of a condition number in float64, and their common log-volume."""
    noise = seeded_generator(seed)

    def orthonormal(height: int) -> Tensor:
        normal = torch.randn(count, height, columns, dtype=torch.float64, generator=noise)
        return torch.linalg.qr(normal).Q

    exponents = torch.linspace(0, -math.log10(condition), columns, dtype=torch.float64)
    values = 10**exponents
    matrix = (orthonormal(rows) * values) @ orthonormal(columns).mT
    return matrix, float(values.log().sum())


@pytest.mark.parametrize("columns", [1, 3, 40, 150])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_the_measured_error_is_about_the_error(columns, condition):
    """The least ratio of both was .2 among 2,400 matrices, so that 20 times the measure holds."""
    matrix, expected = matrices(100 if columns < 100 else 10, 200, columns, condition, seed=0)
    found = gram.gram_volume(matrix)
    error = (found.log_volume - expected).abs()
    # Rounding of sums of d numbers, which no product shows.
    floor = 1e-15 * columns * max(1.0, abs(expected))
    assert bool((error <= 20 * found.error + floor).all())
    assert float(found.error.median()) <= 1e-16 * 100 * columns * condition**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1e1, 1e4, 1e6, 1e10])
def test_volumes_are_right_at_every_condition(dtype, condition):
    if dtype == torch.float32 and condition > 1e6:
        pytest.skip("float32 cannot hold such a matrix.")
    matrix, _ = matrices(50, 30, 6, condition, seed=1)
    matrix = matrix.to(dtype)
    expected = torch.linalg.svdvals(matrix.double()).log().sum(1)
    found = factoring.volumes_of(matrix)
    bound = 1e-5 if dtype == torch.float32 else max(1e-10, 1e-15 * condition)
    torch.testing.assert_close(found.log_volume, expected, rtol=0, atol=bound)


def test_qr_takes_the_matrices_whose_error_is_too_large(monkeypatch):
    good, _ = matrices(6, 20, 4, 10.0, seed=2)
    bad, _ = matrices(2, 20, 4, 1e8, seed=3)
    seen = []
    qr = torch.linalg.qr

    def counted(matrix: Tensor, **options: Any) -> Any:
        seen.append(len(matrix))
        return qr(matrix, **options)

    monkeypatch.setattr(torch.linalg, "qr", counted)
    mixed = torch.cat([good[:3], bad, good[3:]])
    found = factoring.volumes_of(mixed)
    assert seen == [2]
    torch.testing.assert_close(found.log_volume, torch.linalg.svdvals(mixed).log().sum(1))
    assert not found.deficient.any()


def test_matrices_without_full_rank_are_deficient():
    matrix, _ = matrices(4, 9, 3, 10.0, seed=4)
    matrix[1, :, 2] = matrix[1, :, 0]
    matrix[3] = 0.0
    assert factoring.volumes_of(matrix.float()).deficient.tolist() == [False, True, False, True]


def test_what_is_not_finite_stays_so():
    matrix, expected = matrices(3, 9, 3, 10.0, seed=5)
    matrix[1, 4, 1] = torch.nan
    found = factoring.volumes_of(matrix)
    assert found.log_volume.isnan().tolist() == [False, True, False]
    assert float(found.log_volume[2]) == pytest.approx(expected)


@pytest.mark.parametrize("columns", [1, 5, 130, 300])
def test_half_of_a_gram_matrix_is_that_half(columns):
    matrix = torch.randn(2, columns, 7, dtype=torch.float64, generator=seeded_generator(6))
    torch.testing.assert_close(
        gram._lower_gram(matrix).tril(), (matrix @ matrix.mT).tril(), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("piece", [1, 64, 2**20])
def test_pieces_do_not_change_the_volumes(monkeypatch, piece):
    matrix, _ = matrices(11, 8, 4, 100.0, seed=7)
    expected = gram.gram_volume(matrix)
    monkeypatch.setattr(gram, "_PIECE", piece)
    found = gram.gram_volume(matrix.mT.contiguous().mT)
    torch.testing.assert_close(found.log_volume, expected.log_volume)
    torch.testing.assert_close(found.diagonal, expected.diagonal)


def test_random_states_are_left_alone():
    state = torch.get_rng_state()
    gram.gram_volume(torch.eye(3, dtype=torch.float64).unsqueeze(0))
    assert torch.equal(torch.get_rng_state(), state)

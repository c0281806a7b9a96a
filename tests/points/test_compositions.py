"""What the treatments of zeros keep, and what they invent."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom
from support.points import double
from support.seeds import seeded_generator

from normflows_injective import points
from normflows_injective.errors import NonFiniteError, OffManifoldError, OptionError, ShapeError


def parts_with_zeros(rows=200, dim=5):
    """Random parts of which about a third are zero, never all, and all rows of other sums."""
    generator = seeded_generator(0)
    x = torch.rand(rows, dim, generator=generator, dtype=torch.float64) + 0.01
    x[:, 1:] *= torch.rand(rows, dim - 1, generator=generator) > 0.3
    return x * torch.rand(rows, 1, generator=generator, dtype=torch.float64) * 100


LIMITS = [0.1, 0.02, 0.01, 0.1, 0.3]
TREATMENTS = {
    "limits": lambda x: points.compositions_without_zeros(x, 0.01),
    "limits of parts": lambda x: points.compositions_without_zeros(x, LIMITS, 0.2),
    "counts": lambda x: points.compositions_from_counts(x.ceil()),
    "counts by Laplace": lambda x: points.compositions_from_counts(x.ceil(), concentration=1),
}


@pytest.mark.parametrize("name", TREATMENTS)
def test_parts_are_positive_of_sum_one_and_ratios_of_others_are_kept(name):
    x = parts_with_zeros()
    x = x.ceil() if name.startswith("counts") else x
    found = TREATMENTS[name](x)
    assert found.shape == x.shape
    assert bool((found > 0).all())
    torch.testing.assert_close(found.sum(1), torch.ones(len(x)).double())
    present = x[:, 1:] > 0
    ratios, kept = x[:, 1:] / x[:, :1], found[:, 1:] / found[:, :1]
    torch.testing.assert_close(kept[present], ratios[present], rtol=1e-14, atol=0)
    whole = (x > 0).all(1)
    assert bool(whole.any())
    torch.testing.assert_close(found[whole], (x / x.sum(1, keepdim=True))[whole])


@pytest.mark.parametrize("name", TREATMENTS)
def test_units_and_order_of_rows_do_not_count(name):
    x = parts_with_zeros()
    torch.testing.assert_close(TREATMENTS[name](x.flip(0)), TREATMENTS[name](x).flip(0))
    if name.startswith("limits"):
        torch.testing.assert_close(TREATMENTS[name](1e200 * x), TREATMENTS[name](x))
    torch.testing.assert_close(
        TREATMENTS[name](x.view(20, 10, 5)).view(200, 5), TREATMENTS[name](x)
    )


def test_replaced_parts_are_the_fraction_of_the_limit():
    found = points.compositions_without_zeros(double([[3, 0, 0, 1]]), double([1, 0.1, 0.2, 1]))
    expected = double([[0.75 * 0.805, 0.065, 0.13, 0.25 * 0.805]])
    torch.testing.assert_close(found, expected)


def test_replaced_counts_are_the_mean_of_the_posterior():
    """Of a Dirichlet law whose prior has the concentration in each part, by draws of it."""
    counts, alpha = double([[7, 0, 2, 0]]), 0.8
    found = points.compositions_from_counts(counts, alpha)[0]
    posterior = torch.distributions.Dirichlet(counts[0] + alpha)
    torch.testing.assert_close(found[[1, 3]], posterior.mean[[1, 3]])
    left = 1 - 2 * alpha / (9 + 4 * alpha)
    torch.testing.assert_close(found[[0, 2]], double([7, 2]) / 9 * left)


def test_the_stated_bias_of_replaced_parts():
    """A share uniform below the limit has the mean logarithm log(limit) - 1."""
    limit = 1e-3
    true = limit * (torch.arange(200_000).double() + 0.5) / 200_000
    rows = torch.stack([true, 0.4 * (1 - true), 0.6 * (1 - true)], 1)
    measured = rows.clone()
    measured[:, 0] = 0
    for fraction, bias in ((0.65, 0.57), (math.exp(-1), 0.0)):
        found = points.compositions_without_zeros(measured, limit, fraction)
        errors = (found[:, 0] / found[:, 1]).log() - (rows[:, 0] / rows[:, 1]).log()
        assert abs(float(errors.mean()) - (1 + math.log(fraction))) < 1e-3
        assert abs(float(errors.mean()) - bias) < 2e-3
        assert abs(float(errors.std()) - 1) < 1e-2
        invented = (found[:, 0] / found[:, 1]).log()
        assert float(invented.max() - invented.min()) < 1e-12
        torch.testing.assert_close(found[:, 1] / found[:, 2], rows[:, 1] / rows[:, 2])


@pytest.mark.parametrize(
    ("alpha", "biases"), [(0.5, (1.68, -0.03, -0.19)), (1.0, (2.30, 0.22, -0.09))]
)
def test_the_stated_bias_of_replaced_counts(alpha, biases):
    """The mean over all counts that a multinomial law gives, by its exact probabilities."""
    total, count = 1000, np.arange(60)
    rest = (total - count) // 2
    counts = torch.from_numpy(np.stack([count, rest, total - count - rest], 1)).double()
    found = points.compositions_from_counts(counts, alpha)
    log_ratio = (found[:, 0] / found[:, 1]).log().numpy()
    for expected, bias in zip((0.1, 1.0, 2.0), biases, strict=True):
        share = expected / total
        mean = (binom.pmf(count, total, share) * log_ratio).sum()
        assert abs(mean - math.log(2 * share / (1 - share)) - bias) < 0.006


def test_gradients_are_those_of_the_maps():
    x = double([[3.0, 0.0, 1.0], [2.0, 5.0, 1.0]]).requires_grad_()
    present = x.detach() > 0

    def closed(x):
        return points.compositions_without_zeros(torch.where(present, x, 0), 0.01)

    assert torch.autograd.gradcheck(closed, x)
    limits = double([0.01, 0.02, 0.01]).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda limits: points.compositions_without_zeros(x.detach(), limits), limits
    )


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: points.compositions_without_zeros([[1.0, -2.0]], 0.1), OffManifoldError,
         r"parts must not be negative, got -2 at index \[0\]"),
        (lambda: points.compositions_from_counts([[1, 0], [0, 0]]), OffManifoldError,
         r"the sum of counts must be positive, got 0 at index \[1\], and 1 of 2"),
        (lambda: points.compositions_without_zeros([[1.0], [2.0]], 0.1), ShapeError, "two parts"),
        (lambda: points.compositions_from_counts(3), ShapeError, r"shape \(\*, K\)"),
        (lambda: points.compositions_without_zeros([1.0, 0.0], [0.1, 0.1, 0.1]), ShapeError,
         "limits must have one value"),
        (lambda: points.compositions_without_zeros([1.0, 0.0], 0.0), OptionError,
         "limits must be positive shares, got 0"),
        (lambda: points.compositions_without_zeros([1.0, 0.0], 0.1, 1.5), OptionError, "fraction"),
        (lambda: points.compositions_without_zeros([1.0, 0.0, 0.0], 0.9), OptionError,
         "would fill a row, and leave -0.17"),
        (lambda: points.compositions_from_counts([0.5, 1.0]), OptionError, "whole numbers"),
        (lambda: points.compositions_from_counts([1, 0], 0), OptionError, "concentration"),
        (lambda: points.compositions_from_counts([1.0, math.inf]), NonFiniteError, "counts"),
    ],
)  # fmt: skip
def test_what_is_no_composition_is_refused_by_name(call, error, text):
    with pytest.raises(error, match=text):
        call()

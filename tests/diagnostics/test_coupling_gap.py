"""The coupling gap against closed forms, within its own standard errors."""

from __future__ import annotations

import math

import pytest
import torch
from support.seeds import default_generator, seeded_generator

from normflows_injective.diagnostics import MomentRegression, coupling_gap
from normflows_injective.errors import DtypeError, NonFiniteError, OptionError, ShapeError
from normflows_injective.flows.volume_preserving import random_rotation
from normflows_injective.layerwise.block import Moments, partial_step
from normflows_injective.layerwise.regression import Rows, fit_moments, step_gains


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded_generator(seed)).double()


def student(count, dim, degrees, seed=0):
    """Spherical Student-t vectors of unit scale, from normals alone."""
    chi = normal(count, degrees, seed=seed + 100).square().sum(1, keepdim=True)
    return normal(count, dim, seed=seed) / (chi / degrees).sqrt()


def gaussian_gap(covariance, mean, rotation, active):
    """Closed form of the gap of a Gaussian: the oracle of conditional means and variances."""
    turned, centre = rotation @ covariance @ rotation.T, rotation @ mean
    kept = len(covariance) - active
    cross, given = turned[kept:, :kept], turned[:kept, :kept]
    explained = (cross @ torch.linalg.inv(given) @ cross.T).diagonal()
    variance = turned.diagonal()[kept:] - explained
    mean_square = centre[kept:].square() + explained
    return 0.5 * (mean_square + variance - 1 - variance.log()).sum()


def student_gap(degrees, dim, scale=1.0):
    """The formula of the conditional variances of a spherical t law, by Monte Carlo over b.

    Their mean is the variance scale^2 nu / (nu - 2); only that of the logarithm is drawn.
    """
    kept = dim // 2
    b = student(1_000_000, kept, degrees, seed=77)
    variance = scale**2 * (degrees + b.square().sum(1)) / (degrees + kept - 2)
    mean = scale**2 * degrees / (degrees - 2)
    return float(0.5 * (dim - kept) * (mean - 1 - variance.log().mean()))


def test_partial_step_changes_the_loss_by_its_formula():
    """1/2 [S^2 sigma^2 + (S m + T)^2 - sigma^2 - m^2] - log S, for a with these moments."""
    noise = normal(4_000, 1)
    noise = (noise - noise.mean()) / noise.std(correction=0)  # moments exact, not estimated
    m, sigma = 0.7, 1.9
    a, b = m + sigma * noise, torch.zeros(4_000, 1).double()

    class Known:
        def __call__(self, given):
            ones = torch.ones_like(a)
            return Moments(m * ones, math.log(sigma) * ones)

    for step_size in (0.25, 0.5, 1.0):
        scale, shift = 1 + step_size * (1 / sigma - 1), -step_size * m / sigma
        change = 0.5 * (scale**2 * sigma**2 + (scale * m + shift) ** 2 - sigma**2 - m**2)
        change -= math.log(scale)
        gain = step_gains(Known(), b, a, step_size).mean()
        assert float(gain) == pytest.approx(-change, rel=1e-12)
        log_scale, moved = partial_step(Known()(b), step_size)
        assert float(log_scale[0].exp()) == pytest.approx(scale)
        assert float(moved[0]) == pytest.approx(shift)


@pytest.mark.slow
def test_gaussian_in_four_dimensions():
    mixing = torch.eye(4).double() + 0.4 * normal(4, 4, seed=1)
    mean = torch.tensor([0.3, -0.2, 0.1, 0.4]).double()
    covariance = mixing @ mixing.T
    z = normal(20_000, 4, seed=2) @ mixing.T + mean
    result = coupling_gap(z, 3)
    expected = torch.stack([gaussian_gap(covariance, mean, q, 2) for q in result.rotations])
    errors = (result.per_rotation - expected) / result.per_rotation_standard_error
    assert errors.abs().max() < 4.5  # the greatest of three
    chosen = expected[result.chosen]
    assert chosen.min() > expected.max() - 4 * result.per_rotation_standard_error.max()
    assert float(result.gap) == pytest.approx(
        float(chosen.mean()), abs=4 * float(result.standard_error)
    )
    # Mean and covariance say it all: a paired comparison, far sharper than either error.
    assert abs(float(result.rest)) < 0.002


@pytest.mark.slow
def test_circle():
    angle = 2 * math.pi * torch.rand(16_000, 1, generator=seeded_generator(3)).double()
    z = 1.3 * torch.cat([angle.cos(), angle.sin()], dim=1)
    result = coupling_gap(z, 1, regression=MomentRegression(steps=1500))
    expected = 1.3**2 / 4 - 0.5 - math.log(1.3) + math.log(2)
    assert expected == pytest.approx(0.35328, abs=5e-6)
    assert float(result.gap) == pytest.approx(expected, abs=4 * float(result.standard_error))
    # The variance of a coordinate is 1.3^2 / 2, and that is all that whitening sees.
    variance = 1.3**2 / 2
    whitening = 0.5 * (variance - 1 - math.log(variance))
    assert float(result.whitening) == pytest.approx(whitening, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "scale", "count"), [(2, 1.0, 40_000), (6, 1.0, 20_000), (6, 0.6**0.5, 20_000)]
)
def test_student(dim, scale, count):
    z = scale * student(count, dim, 5)
    result = coupling_gap(z, 1)
    expected = student_gap(5, dim, scale)
    if dim == 2:
        assert expected == pytest.approx(0.1120, abs=0.001)
    if scale < 1:
        assert expected == pytest.approx(0.2123, abs=0.003)
    assert float(result.gap) == pytest.approx(expected, abs=4 * float(result.standard_error))
    variance = scale**2 * 5 / 3
    whitening = 0.5 * math.ceil(dim / 2) * (variance - 1 - math.log(variance))
    share = 4 * float(result.standard_error)  # fourth moments of t_5 are wild
    assert float(result.whitening) == pytest.approx(whitening, abs=share)
    if scale < 1:  # white already: a linear block has nothing to gain
        assert abs(float(result.whitening)) < 0.002
        assert float(result.rest) > 0.1


@pytest.mark.slow
def test_standard_normal_has_no_gap_where_the_training_rows_see_one():
    """On the rows of a fit the linear model alone gains parameters / 2N; cross-fitted, nothing."""
    count, dim, active = 2_000, 6, 3
    z = normal(count, dim, seed=8)
    result = coupling_gap(z, 2)
    assert abs(float(result.mean)) <= 4 * float(result.mean_standard_error)
    assert 0 <= float(result.gap) <= 4 * float(result.standard_error)
    for error in (result.standard_error, result.mean_standard_error):
        assert 0 < float(error) < 0.01
    assert (result.per_rotation_standard_error > 0).all()
    trained = []
    for seed in range(100):
        b, a = normal(count, dim, seed=300 + seed).split(active, dim=1)
        rows = Rows(b, a)
        fit = fit_moments(rows, rows, MomentRegression(steps=1), seeded_generator(0))
        trained.append(step_gains(fit.linear, *rows).mean())
    # Per active coordinate: intercept, weights and scale; standard error .0035 / sqrt(100).
    parameters = active * (1 + (dim - active) + 1)
    assert float(torch.stack(trained).mean()) == pytest.approx(
        parameters / (2 * count), abs=4 * 0.00035
    )


@pytest.mark.slow
def test_a_network_judged_on_its_training_rows_sees_a_gap_that_is_not_there():
    b, a = normal(1_000, 2, seed=4).split(1, dim=1)
    seen, fresh = Rows(b[:100], a[:100]), Rows(b[100:], a[100:])
    options = MomentRegression(steps=300)
    greedy = fit_moments(seen, seen, options, seeded_generator(0))
    honest = fit_moments(seen, fresh, options, seeded_generator(0))
    assert greedy.validation_gain > 0.01
    assert honest.validation_gain < 0.5 * greedy.validation_gain
    assert float(step_gains(greedy.moments, *fresh).mean()) < 0.002


@pytest.mark.slow
def test_nothing_is_made_worse_where_validation_sees_no_gain():
    b, a = normal(200, 1, seed=5), normal(200, 1, seed=6)
    # The rows of the fit ask for a scale above one, those that judge for one below.
    rows = Rows(b, 3 * a), Rows(b, 0.3 * a)
    fit = fit_moments(*rows, MomentRegression(steps=40), seeded_generator(0))
    assert fit.validation_gain == 0.0
    assert torch.equal(step_gains(fit.moments, b, a), torch.zeros(200).double())


@pytest.mark.slow
def test_result_is_a_function_of_the_generator_and_leaves_the_rest_alone():
    z = normal(400, 3, seed=7).float().requires_grad_()
    options = MomentRegression((8,), steps=20)
    before, state = z.detach().clone(), torch.get_rng_state()
    first = coupling_gap(z, 2, regression=options)
    again = coupling_gap(z, 2, regression=options, generator=default_generator())
    other = coupling_gap(z, 2, regression=options, generator=seeded_generator(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(z, before)
    assert z.grad is None
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first.rotations, other.rotations)
    assert {value.dtype for value in first[:-1]} == {torch.float32}
    assert not any(value.requires_grad for value in first)
    with torch.inference_mode():
        inference = coupling_gap(z.detach().clone(), 2, regression=options)
    assert torch.equal(inference.gap, first.gap)


@pytest.mark.slow
def test_number_of_active_coordinates_and_shapes():
    z = torch.tensor([2.0, 1.0, 1.0]).double() * normal(600, 3)
    options = MomentRegression((8,), steps=20)
    result = coupling_gap(z, 5, num_active=1, num_folds=3, regression=options)
    assert result.per_rotation.shape == (5,)
    assert result.rotations.shape == (5, 3, 3)
    assert result.chosen.shape == (3,)
    identity = torch.eye(3).double().expand(5, 3, 3)
    torch.testing.assert_close(result.rotations @ result.rotations.mT, identity)
    torch.testing.assert_close(result.rest, result.gap - result.whitening)


@pytest.mark.slow
def test_constant_and_discrete_coordinates_are_finite():
    rotation = random_rotation(4, seeded_generator(0))
    discrete = (normal(300, 4) > 0).double()
    flat = torch.cat([normal(300, 3), torch.zeros(300, 1).double()], dim=1)
    options = MomentRegression((8,), steps=40)
    for z in (discrete, discrete @ rotation, flat @ rotation):
        assert all(torch.isfinite(value).all() for value in coupling_gap(z, 2, regression=options))


@pytest.mark.slow
@pytest.mark.parametrize(("count", "dim"), [(1_000, 64), (400, 20)])
def test_mean_is_found_where_least_squares_drown_in_noise(count, dim):
    """Slopes of all given coordinates would lose more than there is to win."""
    z = normal(count, dim, seed=9) + 0.4
    result = coupling_gap(z, 2, regression=MomentRegression(steps=40))
    means = result.rotations @ torch.full((dim,), 0.4).double()
    expected = 0.5 * means[:, dim // 2 :].square().sum(1)
    errors = (result.per_rotation - expected) / result.per_rotation_standard_error
    assert errors.max() < 4  # a lower bound
    assert float(result.mean) > 0.2 * float(expected.mean())
    assert float(result.mean) > 4 * float(result.mean_standard_error)
    assert float(result.whitening) == pytest.approx(float(result.gap))


@pytest.mark.slow
def test_few_slopes_are_found_by_a_ridge():
    b, noise = normal(300, 100, seed=1), normal(300, 100, seed=2)
    a = 0.5 * b + noise * 0.75**0.5
    rows = Rows(b[:200], a[:200]), Rows(b[200:], a[200:])
    fit = fit_moments(*rows, MomentRegression((8,), 20), seeded_generator(0), margin=2.0)
    assert fit.validation_gain > 0
    assert fit.rejected is None
    assert fit.linear.weight.abs().max() > 0
    fresh = normal(5_000, 100, seed=5)
    answer = 0.5 * fresh + normal(5_000, 100, seed=6) * 0.75**0.5
    assert 0 < float(step_gains(fit.linear, fresh, answer).mean()) < -50 * math.log(0.75)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": None}, "hidden must be a sequence of positive integers"),
        ({"hidden": ()}, "hidden must be a sequence of positive integers"),
        ({"hidden": (8, 0)}, r"hidden\[1\] must be a positive integer"),
        ({"steps": 0}, "steps must be a positive integer"),
        ({"batch_size": 2.5}, "batch_size must be a positive integer"),
        ({"learning_rate": -1.0}, "learning_rate must be a positive number"),
        ({"learning_rate": math.inf}, "learning_rate must be a positive number"),
        ({"max_log_ratio": math.nan}, "max_log_ratio must be a positive number"),
        ({"max_log_ratio": "8"}, "max_log_ratio must be a positive number"),
        ({"weight_decay": -1e-3}, "weight_decay must be a number, finite and not negative"),
    ],
)
def test_options_of_regressions_are_checked(changes, message):
    with pytest.raises(OptionError, match=message):
        coupling_gap(torch.randn(300, 2), regression=MomentRegression(**changes))


def test_bad_input_is_named():
    with pytest.raises(DtypeError, match="needs float32 or float64.* got torch.float16"):
        coupling_gap(torch.randn(300, 2).half())
    with pytest.raises(ShapeError, match=r"z must have shape \(N, D\).* got \(300,\)"):
        coupling_gap(torch.randn(300))
    with pytest.raises(OptionError, match="regression must be a MomentRegression, got dict"):
        coupling_gap(torch.randn(300, 2), regression={"steps": 3})
    with pytest.raises(ShapeError, match="at least two dimensions"):
        coupling_gap(torch.randn(300, 1))
    with pytest.raises(ShapeError, match="Flatten images"):
        coupling_gap(torch.randn(300, 1, 4, 4))
    with pytest.raises(OptionError, match="at least 200 samples.* got 99"):
        coupling_gap(torch.randn(99, 2))
    with pytest.raises(NonFiniteError, match="z has 1 of 600"):
        coupling_gap(torch.cat([torch.randn(299, 2), torch.tensor([[0.0, math.nan]])]))
    with pytest.raises(OptionError, match="num_active must lie in 1 to 1, got 2"):
        coupling_gap(torch.randn(300, 2), num_active=2)
    with pytest.raises(OptionError, match="num_folds must be an integer of at least 2"):
        coupling_gap(torch.randn(300, 2), num_folds=1)
    with pytest.raises(OptionError, match="num_rotations must be a positive integer"):
        coupling_gap(torch.randn(300, 2), 0)

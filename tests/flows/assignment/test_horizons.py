"""When to stop: rounding errors, the chosen end and the chosen steps."""

from __future__ import annotations

import math

import pytest
import torch
from support.assignment_flows import HORIZONS, path_of
from support.assignment_oracles import DOUBLE, ExactField, ising

from normflows_injective.flows.assignment import (
    AssignmentField,
    AssignmentPath,
    FiniteHorizon,
    InfiniteHorizon,
    Simplices,
    Velocity,
    choose_horizon,
    rounding_error,
)
from normflows_injective.flows.integration import integrate, time_grid

# --- when to stop --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "end", "bound"),
    [
        (2, 2, 0.1587),
        (2, 4, 0.0228),
        (5, 4, 0.228),
        (20, 6, 0.280),
        (2, 10, 2.9e-7),
        (8, 15, 5.0e-8),
        (91, 15, 4.4e-6),
        (160, 15, 8.3e-6),
    ],
)
def test_rounding_errors_of_the_infinite_horizon(classes, end, bound):
    found = rounding_error(InfiniteHorizon(end=float(end)), 1, classes)
    assert found == pytest.approx(bound, rel=0.02)
    assert rounding_error(InfiniteHorizon(end=float(end)), 3, classes) == min(1, 3 * found)


@pytest.mark.parametrize(
    ("counts", "horizon"),
    [
        ((2,), InfiniteHorizon(end=2.0)),
        ((2,), InfiniteHorizon(end=4.0)),
        ((2,), FiniteHorizon(end=0.3)),
        ((5,), InfiniteHorizon(end=4.0)),
        ((3, 2, 4), FiniteHorizon(end=0.4)),
        ((3, 2), InfiniteHorizon(scale=2.0, end=1.5)),
    ],
)
def test_rounding_errors_by_simulation_of_the_channel(counts, horizon):
    num = 200_000
    path = path_of(counts, horizon)
    labels = torch.stack([torch.randint(c, (num,)) for c in counts], 1)
    end = torch.full((num,), horizon.end, dtype=DOUBLE)
    v = path.logits(labels, path.draw_start(num, end), end)
    share = float((path.simplices.round(v) != labels).any(1).double().mean())
    bound = rounding_error(horizon, len(counts), list(counts))
    error = math.sqrt(bound * (1 - bound) / num)  # at most .0009
    assert share < bound + 4 * error
    if counts == (2,):
        assert abs(share - bound) < 4 * error
    # The bound is a sum over other classes, so not far above.
    assert bound < 2 * share


@pytest.mark.parametrize("error", [1e-2, 1e-6])
@pytest.mark.parametrize("horizon", ["infinite", FiniteHorizon(smoothing=0.1)])
@pytest.mark.parametrize("counts", [(2,) * 9, (2, 7, 3)])
def test_the_chosen_end_is_the_earliest(counts, horizon, error):
    choice = choose_horizon(len(counts), list(counts), error, horizon)
    assert choice.rounding_error <= error
    assert choice.rounding_error == pytest.approx(error, rel=1e-3)
    assert choice.rounding_error == rounding_error(choice.horizon, len(counts), list(counts))
    if horizon != "infinite":
        assert choice.horizon.smoothing == 0.1


@pytest.mark.slow
@pytest.mark.parametrize("horizon", HORIZONS)
def test_the_chosen_steps_misplace_few_labels(horizon):
    law, num = ising(), 400
    path = AssignmentPath(Simplices(9, 2), choose_horizon(9, 2, 1e-2, horizon).horizon)
    net = ExactField(law, path.horizon, "velocity")
    field = AssignmentField(net, path, Velocity(), "scaled_logits")
    start = path.draw_start(num, law.probabilities)

    def labels(steps, solver):
        def rate(v, t):
            return field(v, v.new_full((len(v),), t))

        with torch.no_grad():
            end = integrate(rate, start, time_grid(steps, path.horizon.end), solver)
        return path.simplices.round(end)

    right = labels(24, "rk4")
    for solver in ("rk4", "midpoint"):
        steps = choose_horizon(9, 2, 1e-2, horizon, solver).steps
        share = float((labels(steps, solver) != right).any(1).double().mean())
        # A share of .01 has the standard error .005.
        assert share < 0.05
    assert choose_horizon(9, 2, 1e-2, horizon).steps < 10

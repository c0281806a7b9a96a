r"""When to stop, and in how many steps: the error of rounding to the nearest corner.

At the end of a path a variable is normal around the corner of its class, at a distance of
:math:`\frac{t \rho}{s} \sqrt{c / (2 (c - 1))}` deviations from the face to any other class. So it
is rounded to another class with a probability of at most

.. math:: (c - 1)\, \Phi\Big(-\frac{t \rho}{s} \sqrt{\frac{c}{2 (c - 1)}}\Big),

with equality for two classes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ...checks import check_choice, check_probability, checks_arguments, lookup
from ...errors import OptionError
from ..integration import SOLVERS
from .paths import HORIZONS, Horizon
from .simplices import class_counts

# (C, p): with step size h, in deviations of the noise, about C h^p of the labels differ from those
# of very small steps. Measured on a 3 x 3 Ising model, the worst of the fields in
# benchmarks/assignment/steps.py.
_ERROR_OF_STEPS = {"rk4": (0.05, 4), "midpoint": (0.2, 2), "euler": (0.6, 1)}


class HorizonChoice(NamedTuple):
    """A horizon for a number of variables and classes, with the number of steps that it needs.

    Attributes:
        horizon: :class:`InfiniteHorizon` or :class:`FiniteHorizon`, to build the model with.
        steps: Number of steps of the solver.
        rounding_error: Bound on the probability that any of the variables is rounded wrongly.

    Examples:
        >>> horizon, steps, error = choose_horizon(4, 3, error=1e-2)
        >>> steps, error <= 1e-2
        (5, True)
    """

    horizon: Horizon
    steps: int
    rounding_error: float


@checks_arguments
def rounding_error(
    horizon: Horizon, num_variables: int, num_classes: int | Sequence[int]
) -> float:
    """Bound on the probability that rounding at the end gives any variable a wrong class.

    Args:
        horizon: The horizon, with the time at which it ends.
        num_variables: Number of variables n.
        num_classes: Number of classes, one for all variables or one for each.

    Returns:
        The sum of the bounds of the variables, at most one.

    Raises:
        OptionError: If a number is out of range.

    References:
        Derived in ``horizon.py``.

    Examples:
        >>> from normflows_injective.flows.assignment import InfiniteHorizon
        >>> round(rounding_error(InfiniteHorizon(end=4.0), 1, 2), 4)
        0.0228
    """
    return min(1.0, _bound(horizon, Counter(class_counts(num_variables, num_classes))))


@checks_arguments
def choose_horizon(
    num_variables: int,
    num_classes: int | Sequence[int],
    error: float = 1e-3,
    horizon: str | Horizon = "infinite",
    solver: str = "rk4",
) -> HorizonChoice:
    """Choose the earliest end that keeps the rounding error, and a number of steps to get there.

    With these steps an exact field misplaces about as many labels as rounding does. A learned
    field seldom deserves more steps.

    Args:
        num_variables: Number of variables n.
        num_classes: Number of classes, one for all variables or one for each.
        error: Largest probability that any variable is rounded wrongly; the steps misplace about
            the same share of labels.
        horizon: ``"infinite"``, ``"finite"``, or a horizon, whose end alone is replaced.
        solver: ``"euler"``, ``"midpoint"`` or ``"rk4"``.

    Returns:
        :class:`HorizonChoice`.

    Raises:
        OptionError: If an option is unknown or out of range.

    References:
        Derived in ``horizon.py``.

    Examples:
        >>> choice = choose_horizon(196, 2, error=1e-3)
        >>> round(choice.horizon.end, 1), choice.rounding_error <= 1e-3
        (8.8, True)
    """
    check_probability(error, "error")
    check_choice(solver, SOLVERS, "solver")
    template = horizon_of(horizon)
    counts = Counter(class_counts(num_variables, num_classes))

    def error_at(end: float) -> float:
        return _bound(replace(template, end=end), counts)  # type: ignore[type-var]

    of_noise = error_at(_end(template, 1e-6))
    if of_noise <= error:
        raise OptionError(
            f"error must be less than that of pure noise, {of_noise:.3g}, got {error!r}."
        )

    # With time as t / (1 + t), which both horizons allow, the ends to search lie in (0, 1).
    early, late = 0.0, 1.0
    for _ in range(60):
        middle = (early + late) / 2
        is_early = error_at(_end(template, middle)) > error
        early, late = (middle, late) if is_early else (early, middle)
    chosen: Horizon = replace(template, end=_end(template, late))  # type: ignore[type-var]
    factor, order = _ERROR_OF_STEPS[solver]
    farthest = max(_distance(chosen, count) for count in counts)
    steps = max(1, math.ceil(farthest / (error / factor) ** (1 / order)))
    return HorizonChoice(chosen, steps, rounding_error(chosen, num_variables, num_classes))


def horizon_of(horizon: str | Horizon) -> Horizon:
    """Return the horizon of a name, or a horizon itself."""
    if isinstance(horizon, Horizon):
        return horizon
    is_choice = isinstance(horizon, HorizonChoice)
    advice = "Of what choose_horizon returns, pass .horizon." if is_choice else ""
    expected = "one of {}, an InfiniteHorizon or a FiniteHorizon"
    return lookup(horizon, HORIZONS, "horizon", expected, advice)()


def _end(horizon: Horizon, share: float) -> float:
    return share if horizon.contraction else share / (1 - share)


def _bound(horizon: Horizon, counts: Counter[int]) -> float:
    """Sum the bounds of the variables, which are counted by their number of classes."""
    return sum(
        num * (c - 1) * 0.5 * math.erfc(_distance(horizon, c) / math.sqrt(2))
        for c, num in counts.items()
    )


def _distance(horizon: Horizon, count: int) -> float:
    """Distance of another class at the end, in deviations of the noise."""
    speed = float(horizon.speeds(torch.tensor(float(count), dtype=torch.float64)))
    deviation = 1 - horizon.contraction * horizon.end
    return horizon.end * speed / deviation * math.sqrt(count / (2 * (count - 1)))

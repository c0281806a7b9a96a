r"""Fixed-step Runge-Kutta methods, and the log-density that a field carries along.

A density moved by :math:`\dot m = f(m, t)` changes by the integral of the divergence,

.. math:: \log p_T(m_T) = \log p_0(m_0) - \int_0^T \operatorname{div} f(m_t, t)\, dt,

which is integrated in the same steps. It is the log-det of the exact flow; that of the map of the
steps differs by as much as the steps err.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..checks import check_choice, check_count, describe, is_number
from ..errors import OptionError

Rate = Callable[[Tensor, float], Tensor]
Times = int | Sequence[float] | Tensor


def _euler(rate: Rate, y: Tensor, t: float, h: float) -> Tensor:
    return y + h * rate(y, t)


def _midpoint(rate: Rate, y: Tensor, t: float, h: float) -> Tensor:
    return y + h * rate(y + h / 2 * rate(y, t), t + h / 2)


def _rk4(rate: Rate, y: Tensor, t: float, h: float) -> Tensor:
    first = rate(y, t)
    second = rate(y + h / 2 * first, t + h / 2)
    third = rate(y + h / 2 * second, t + h / 2)
    fourth = rate(y + h * third, t + h)
    return y + h / 6 * (first + 2 * second + 2 * third + fourth)


SOLVERS: dict[str, Callable[[Rate, Tensor, float, float], Tensor]] = {
    "euler": _euler,
    "midpoint": _midpoint,
    "rk4": _rk4,
}

# Powers of the step's length with which the errors of a path fall.
ORDERS = {"euler": 1, "midpoint": 2, "rk4": 4}


def as_times(values: Any, name: str) -> list[float]:
    """Return a list, array or tensor of times as plain numbers, or raise OptionError."""
    # Lists of our own need no tensor, which a device or a graph under construction would catch.
    if isinstance(values, list) and all(map(_is_plain_time, values)):
        return values
    times: Any = None
    if not isinstance(values, str | bytes | dict | set):
        with suppress(TypeError, ValueError, RuntimeError):
            times = torch.as_tensor(values, dtype=torch.float64).tolist()
    if not (isinstance(times, list) and all(map(_is_plain_time, times))):
        kind = "an integer or a list of times" if name == "steps" else "a list of times"
        raise OptionError(f"{name} must be {kind}, got {describe(values)}. Give finite numbers.")
    return times


def _is_plain_time(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def time_grid(steps: Times, end: float) -> list[float]:
    """Return the times of a number of equal steps to the end, or check times from zero to it."""
    if is_number(steps) or isinstance(steps, bool):
        steps = check_count(steps, "steps")
        return [end * k / steps for k in range(steps + 1)]
    times = as_times(steps, "steps")
    rises = len(times) > 1 and all(a < b for a, b in pairwise(times))
    if not rises or times[0] != 0 or not math.isclose(times[-1], end, rel_tol=1e-6):
        raise OptionError(
            f"steps must be a number of steps, or times that increase from 0 to {end:g}, got "
            f"{len(times)} times {times[:3]} to {times[-1:]}."
        )
    return times


def integrate(
    rate: Rate, y: Tensor, times: Sequence[float], solver: str, progress: bool = False
) -> Tensor:
    """Carry a state (B, *) along a field through times, which may fall."""
    step = SOLVERS[solver]
    steps = tqdm(list(pairwise(times)), unit="step", disable=not progress)
    for begin, end in steps:
        y = step(rate, y, begin, end - begin)
    return y


def check_method(solver: str, divergence: str) -> None:
    """Raise OptionError unless solver and divergence are ones that a layer may have."""
    check_choice(solver, SOLVERS, "solver")
    check_choice(divergence, ("exact", "hutchinson"), "divergence")


def method_in_words(steps: int, solver: str, divergence: str, num_probes: int) -> str:
    """The options of a layer that is integrated, as shown by ``print(model)``."""
    probes = f", num_probes={num_probes}" if divergence == "hutchinson" else ""
    return f"steps={steps}, solver={solver!r}, divergence={divergence!r}{probes}"

"""How benchmarks take times."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import linear_regression

__all__ = ["exponent", "in_turn", "least_seconds", "processor_seconds"]

Call = Callable[[], object]


def processor_seconds(call: Call) -> float:
    """Processor time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def least_seconds(call: Call, fewest: int, enough: float, most: int = 10**9) -> float:
    """The least processor time of several calls, after one that is not counted.

    There are at least ``fewest`` calls and at most ``most``, and ``enough`` seconds in all.
    """
    call()
    seconds: list[float] = []
    while len(seconds) < fewest or (sum(seconds) < enough and len(seconds) < most):
        seconds.append(processor_seconds(call))
    return min(seconds)


def in_turn(
    calls: Mapping[str, Call],
    rounds: int,
    seed: int,
    seconds_of: Callable[[Call], float] = processor_seconds,
) -> dict[str, list[float]]:
    """Seconds of each call in every round, the calls of a round in random order."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(seed)
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            seconds[name].append(seconds_of(calls[name]))
    return seconds


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """The power of the size that fits times best, by least squares of logarithms; NaN of one."""
    if len(sizes) < 2:
        return math.nan
    return linear_regression(*([math.log(v) for v in values] for values in (sizes, times))).slope

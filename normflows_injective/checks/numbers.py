"""Numbers among the options: each check returns a plain Python number or raises OptionError.

Numbers of Python and numpy and tensors or arrays of no dimension are taken alike. Booleans are
refused, because ``True`` in place of a count is an argument that slipped.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch

from ..errors import OptionError
from .wording import named

# No tensor has an axis of this length; torch's own errors at larger ones name no argument.
LARGEST = 2**31 - 1


def is_number(value: object) -> bool:
    """Whether a value is one real number, of Python or numpy or a tensor without dimension."""
    return _real(value) is not None


def check_count(
    value: Any, name: str, least: int = 1, most: int | None = None, advice: str = ""
) -> int:
    """Return an integer of a range as a plain ``int``, or raise OptionError."""
    number = _integer(value)
    if number is not None and least <= number <= (LARGEST if most is None else most):
        return number
    if number is not None and number > LARGEST and most is None:
        most = LARGEST
    if most is not None:
        kind = f"an integer from {least} to {most}"
    else:
        kind = {-LARGEST: "an integer", 0: "a non-negative integer", 1: "a positive integer"}.get(
            least, f"an integer of at least {least}"
        )
    advice = advice or f"Give an integer, for instance {least}."
    raise OptionError(named(f"{name} must be {kind}", value, advice))


def check_number(value: Any, name: str, advice: str = "Give a number, for instance 1.0.") -> float:
    """Return a number that may be infinite, or raise OptionError."""
    return _number(value, name, "a number", advice, lambda number: not math.isnan(number))


def check_real(value: Any, name: str, advice: str = "Give a number, for instance 1.0.") -> float:
    """Return a finite number, or raise OptionError."""
    return _number(value, name, "a finite number", advice, math.isfinite)


def check_positive(
    value: Any, name: str, advice: str = "Give a finite number above zero, for instance 1.0."
) -> float:
    """Return a finite number above zero, or raise OptionError."""
    return _number(value, name, "a positive number", advice, lambda number: 0 < number < math.inf)


def check_not_negative(
    value: Any, name: str, advice: str = "Give a number, for instance 0.0."
) -> float:
    """Return a finite number of at least zero, or raise OptionError."""
    kind = "a number, finite and not negative"
    return _number(value, name, kind, advice, lambda number: 0 <= number < math.inf)


def check_probability(
    value: Any, name: str, advice: str = "Give a number strictly between, for instance 0.5."
) -> float:
    """Return a number strictly between zero and one, or raise OptionError."""
    return _number(value, name, "a number between 0 and 1", advice, lambda number: 0 < number < 1)


def check_interval(
    value: Any, name: str, advice: str = "Give e.g. (-1.0, 1.0)."
) -> tuple[float, float]:
    """Return two finite, increasing numbers, or raise OptionError."""
    ends = [_real(end) for end in value] if isinstance(value, tuple | list) else []
    finite = [end for end in ends if end is not None and math.isfinite(end)]
    if len(ends) != 2 or len(finite) != 2 or not finite[0] < finite[1]:
        message = f"{name} must be (low, high), finite numbers with low < high"
        raise OptionError(named(message, value, advice))
    return finite[0], finite[1]


def _number(
    value: Any, name: str, kind: str, advice: str, is_right: Callable[[float], bool]
) -> float:
    """Return a number of some kind, an ``int`` if it was an integer, or raise OptionError."""
    number = _real(value)
    if number is None or not is_right(number):
        raise OptionError(named(f"{name} must be {kind}", value, advice))
    return number


def _real(value: object) -> float | int | None:
    """Return a value as an int or a float, or None if it is no real number."""
    if type(value) in (float, int):
        return value  # type: ignore[return-value]
    value = plain_value(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _integer(value: object) -> Any:
    """Return a value as an int, or None if it is no integer."""
    value = plain_value(value)
    if isinstance(value, bool):
        return None
    # A SymInt is the size of a batch while a graph is exported.
    if isinstance(value, (int, torch.SymInt)):
        return value
    return int(value) if isinstance(value, numbers.Integral) else None


def plain_value(value: Any) -> Any:
    """Return the number in a 0-dimensional tensor, array or scalar, and any other value itself."""
    # The plain case first: a compiler that traces the check sees nothing else.
    if isinstance(value, (int, float)) or getattr(value, "shape", None) != ():
        return value
    try:
        return value.item()
    except (AttributeError, RuntimeError, NotImplementedError):  # On the meta device it has none.
        return value

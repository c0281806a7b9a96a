"""Numbers among the options: each check returns a plain Python number or raises OptionError.

Numbers of Python and numpy and tensors or arrays of no dimension are taken alike. Booleans are
refused, because ``True`` in place of a count is an argument that slipped.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch

from ..errors import OptionError
from .wording import named

__all__ = [
    "check_count",
    "check_interval",
    "check_not_negative",
    "check_number",
    "check_positive",
    "check_probability",
    "check_real",
    "is_number",
]


# No tensor has an axis of this length; torch's own errors at larger ones name no argument.
LARGEST = 2**31 - 1


def _plain(value: Any) -> Any:
    """The number in a 0-dimensional tensor, array or scalar of numpy; all else as it is."""
    # The plain case first: a compiler that traces the check sees nothing else.
    if isinstance(value, (int, float)) or getattr(value, "shape", None) != ():
        return value
    try:
        return value.item()
    except (AttributeError, RuntimeError, NotImplementedError):  # On the meta device it has none.
        return value


def _integer(value: object) -> Any:
    """The value as an int, or None if it is no integer."""
    value = _plain(value)
    if isinstance(value, bool):
        return None
    # A SymInt is the size of a batch while a graph is exported.
    if isinstance(value, (int, torch.SymInt)):
        return value
    return int(value) if isinstance(value, numbers.Integral) else None


def _real(value: object) -> float | int | None:
    """The value as an int or a float, or None if it is no real number."""
    if type(value) in (float, int):
        return value  # type: ignore[return-value]
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def is_number(value: object) -> bool:
    """Whether a value is one real number, of Python or numpy or a tensor without dimension.

    Args:
        value: Anything; a boolean is no number.

    Examples:
        >>> is_number(2.5), is_number(torch.tensor(3)), is_number(True), is_number("2")
        (True, True, False, False)
    """
    return _real(value) is not None


def check_count(
    value: Any, name: str, least: int = 1, most: int | None = None, advice: str = ""
) -> int:
    """The integer an option gives, or raise unless it lies in its range.

    Args:
        value: Candidate: an integer of Python or numpy, or a tensor of one integer.
        name: How the message calls it.
        least: The smallest value that is taken.
        most: The largest one, or None for no bound.
        advice: What the message tells to do, in place of a sentence that fits any count.

    Returns:
        A plain ``int``.

    Raises:
        OptionError: If it is no integer or outside its range.

    Examples:
        >>> check_count(torch.tensor(3), "num_samples")
        3
        >>> check_count(2.5, "num_samples")
        Traceback (most recent call last):
            ...
        normflows_injective.errors.OptionError: num_samples must be a positive integer, got 2.5. \
Give an integer, for instance 1.
    """
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


def check_real(value: Any, name: str, advice: str = "Give a number, for instance 1.0.") -> float:
    """The finite number an option gives.

    Args:
        value: Candidate: a real number of Python or numpy, or a tensor of one number.
        name: How the message calls it.
        advice: What the message tells to do.

    Returns:
        A plain ``float``, or ``int`` if it was an integer.

    Raises:
        OptionError: If it is no number, NaN or infinite.

    Examples:
        >>> check_real(-0.5, "shift")
        -0.5
    """
    number = _real(value)
    if number is None or not math.isfinite(number):
        raise OptionError(named(f"{name} must be a finite number", value, advice))
    return number


def check_number(value: Any, name: str, advice: str = "Give a number, for instance 1.0.") -> float:
    """The number an option gives, which may be infinite.

    Args:
        value: Candidate: a real number of Python or numpy, or a tensor of one number.
        name: How the message calls it.
        advice: What the message tells to do.

    Returns:
        A plain ``float``, or ``int`` if it was an integer.

    Raises:
        OptionError: If it is no number, or NaN.

    Examples:
        >>> check_number(math.inf, "p")
        inf
    """
    number = _real(value)
    if number is None or math.isnan(number):
        raise OptionError(named(f"{name} must be a number", value, advice))
    return number


def check_positive(
    value: Any, name: str, advice: str = "Give a finite number above zero, for instance 1.0."
) -> float:
    """The finite positive number an option gives.

    Args:
        value: Candidate: a real number of Python or numpy, or a tensor of one number.
        name: How the message calls it.
        advice: What the message tells to do.

    Returns:
        A plain ``float``, or ``int`` if it was an integer.

    Raises:
        OptionError: If it is no number, not positive, NaN or infinite.

    Examples:
        >>> check_positive(2, "bound")
        2
    """
    number = _real(value)
    if number is None or not 0 < number < math.inf:
        raise OptionError(named(f"{name} must be a positive number", value, advice))
    return number


def check_not_negative(
    value: Any, name: str, advice: str = "Give a number, for instance 0.0."
) -> float:
    """The finite number of at least zero that an option gives.

    Args:
        value: Candidate: a real number of Python or numpy, or a tensor of one number.
        name: How the message calls it.
        advice: What the message tells to do.

    Returns:
        A plain ``float``, or ``int`` if it was an integer.

    Raises:
        OptionError: If it is no number, negative, NaN or infinite.

    Examples:
        >>> check_not_negative(0, "weight_decay")
        0
    """
    number = _real(value)
    if number is None or not 0 <= number < math.inf:
        message = f"{name} must be a number, finite and not negative"
        raise OptionError(named(message, value, advice))
    return number


def check_interval(
    value: Any, name: str, advice: str = "Give e.g. (-1.0, 1.0)."
) -> tuple[float, float]:
    """The two finite, increasing numbers that an option gives.

    Args:
        value: Candidate: a tuple or list.
        name: How the message calls it.
        advice: What the message tells to do.

    Returns:
        A tuple of plain numbers.

    Raises:
        OptionError: If there are not two, or the second is not larger.

    Examples:
        >>> check_interval([-1, 2.5], "log_range")
        (-1, 2.5)
    """
    ends = [_real(end) for end in value] if isinstance(value, tuple | list) else []
    finite = [end for end in ends if end is not None and math.isfinite(end)]
    if len(ends) != 2 or len(finite) != 2 or not finite[0] < finite[1]:
        message = f"{name} must be (low, high), finite numbers with low < high"
        raise OptionError(named(message, value, advice))
    return finite[0], finite[1]


def check_probability(
    value: Any, name: str, advice: str = "Give a number strictly between, for instance 0.5."
) -> float:
    """The number strictly between zero and one that an option gives.

    Args:
        value: Candidate: a real number of Python or numpy, or a tensor of one number.
        name: How the message calls it.
        advice: What the message tells to do.

    Returns:
        A plain ``float``.

    Raises:
        OptionError: If it is no number, or not inside the interval.

    Examples:
        >>> check_probability(0.1, "error")
        0.1
    """
    number = _real(value)
    if number is None or not 0 < number < 1:
        raise OptionError(named(f"{name} must be a number between 0 and 1", value, advice))
    return number

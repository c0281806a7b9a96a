"""How a message of refusal calls what it got."""

from __future__ import annotations

from torch import Tensor

__all__ = ["describe", "named"]

_LONGEST = 60


def describe(value: object) -> str:
    """A short name of a value: its ``repr`` where that is one short line, else its type.

    Args:
        value: Anything.

    Examples:
        >>> describe(-1), describe("abc"), describe([0.0] * 99)
        ('-1', "'abc'", 'list')
    """
    if isinstance(value, Tensor) and value.dim():
        return f"a Tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    try:
        text = repr(value)
    except Exception:  # The repr of a stranger may fail, and must not hide the refusal.
        return type(value).__name__
    # The address in the default repr says nothing, and differs from run to run.
    plain = len(text) <= _LONGEST and "\n" not in text and " at 0x" not in text
    return text if plain else type(value).__name__


def named(message: str, value: object, advice: str) -> str:
    """The text "MESSAGE, got VALUE. ADVICE" of a refusal.

    Args:
        message: What was expected, as "dim must be a positive integer".
        value: What came.
        advice: What to do, a whole sentence.

    Examples:
        >>> named("dim must be a positive integer", 0, "Leave the layer out.")
        'dim must be a positive integer, got 0. Leave the layer out.'
    """
    return f"{message}, got {describe(value)}. {advice}".rstrip()

"""How a refusal calls what it got, and the line that a warning points at."""

from __future__ import annotations

import sys

from torch import Tensor

_LONGEST = 60
_LIBRARIES = ("normflows_injective", "torch")


def describe(value: object) -> str:
    """Return a short name of a value: its ``repr`` where that is one short line, else its type."""
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
    """Return the text "MESSAGE, got VALUE. ADVICE" of a refusal."""
    return f"{message}, got {describe(value)}. {advice}".rstrip()


def level_of_caller() -> int:
    """Return the stack level, for a warning of the calling function, of the user's own frame."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _is_of_library(frame.f_globals):
        frame, level = frame.f_back, level + 1
    return level


def _is_of_library(names: dict[str, object]) -> bool:
    return str(names.get("__name__", "")).partition(".")[0] in _LIBRARIES

"""Options other than single numbers: names, switches, shapes, functions, networks, lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import OptionError
from .numbers import check_count, is_number, plain_value
from .wording import describe, named

T = TypeVar("T")


def check_choice(value: object, choices: Iterable[str], name: str) -> str:
    """Return the name an option gives, or raise OptionError unless it is one of the choices."""
    return lookup(value, {choice: choice for choice in choices}, name)


def lookup(
    name: object, table: Mapping[str, T], what: str, expected: str = "one of {}", advice: str = ""
) -> T:
    """Return ``table[name]``, or raise OptionError that lists the choices of the option ``what``.

    Where the option may also be an object, ``expected`` says so: ``"one of {} or a function"``.
    """
    if not (isinstance(name, str) and name in table):
        message = f"{what} must be {expected.format(', '.join(table))}"
        raise OptionError(named(message, name, advice))
    return table[name]


def check_flag(value: object, name: str) -> bool:
    """Return a switch of Python, numpy or a tensor as a plain ``bool``, or raise OptionError."""
    plain = plain_value(value)
    if not isinstance(plain, bool):
        raise OptionError(
            named(f"{name} must be True or False", value, "Was another argument meant?")
        )
    return plain


def check_counts(
    values: Any, name: str, least: int = 1, empty: bool = False, example: str = "(64, 64)"
) -> tuple[int, ...]:
    """Return a sequence of integers as a tuple of plain ``int``, or raise OptionError."""
    kind = {0: "non-negative integers", 1: "positive integers"}.get(
        least, f"integers of at least {least}"
    )
    message = f"{name} must be a sequence of {kind}"
    if is_number(values):
        advice = f"Put the number into a tuple: {name}=({describe(values)},)."
        raise OptionError(named(message, values, advice))
    if isinstance(values, str | bytes | dict | set) or not _is_sequence(values):
        raise OptionError(named(message, values, f"Give for instance {name}={example}."))
    counts = tuple(check_count(n, f"{name}[{index}]", least) for index, n in enumerate(values))
    if not counts and not empty:
        raise OptionError(named(f"{message}, at least one", values, f"Give e.g. {example}."))
    return counts


def _is_sequence(values: object) -> bool:
    """Whether values have an order: a tuple, list, range, or array or tensor of one axis."""
    if isinstance(values, Tensor) or hasattr(values, "ndim"):
        return getattr(values, "ndim", 0) == 1
    return isinstance(values, Sequence)


def check_shape(
    value: Any, name: str, length: int | None = None, axes: str = "", advice: str = ""
) -> tuple[int, ...]:
    """Return a shape as a tuple of plain ``int``, or raise OptionError.

    One number n stands for the shape (n,) where ``length`` allows it; ``axes`` names the axes.
    """
    if is_number(value) and length in (None, 1):
        return (check_count(value, name),)
    if not isinstance(value, str | bytes | dict) and _is_sequence(value):
        entries = list(value)
        if entries and length in (None, len(entries)):
            return tuple(check_count(n, f"{name}[{index}]") for index, n in enumerate(entries))
    kind = "a tuple of positive integers" if length is None else _tuple_of(length)
    message = f"{name} must be {kind}" + (f", {axes}" if axes else "")
    raise OptionError(named(message, value, advice or "Give each axis one integer."))


def _tuple_of(length: int) -> str:
    return f"a tuple of {length} positive integers" if length > 1 else "a positive integer"


def check_callable(value: Any, name: str, advice: str) -> Callable[..., Any]:
    """Return a function, or raise OptionError; a class is refused, as its instance was meant."""
    if not callable(value) or isinstance(value, type):
        raise OptionError(named(f"{name} must be callable", value, advice))
    return value


def check_module(value: Any, name: str, advice: str) -> nn.Module:
    """Return a ``torch.nn.Module``, or raise OptionError."""
    if not isinstance(value, nn.Module):
        raise OptionError(f"{name} must be a torch.nn.Module, got {_kind(value)}. {advice}")
    return value


def check_modules(value: Any, name: str, advice: str = "Put the layers into a list.") -> list[Any]:
    """Return the modules of a list, tuple or container as a list, or raise OptionError."""
    if not isinstance(value, list | tuple | nn.ModuleList | nn.Sequential):
        raise OptionError(f"{name} must be a list of layers, got {_kind(value)}. {advice}")
    for index, layer in enumerate(value):
        if not isinstance(layer, nn.Module):
            message = f"{name} must hold layers that are torch.nn.Module"
            raise OptionError(f"{message}, got {_kind(layer)} at index {index}. {advice}")
    return list(value)


def _kind(value: object) -> str:
    """Return the type of an object that should have been a network, or the class itself."""
    return describe(value) if isinstance(value, type) else type(value).__name__

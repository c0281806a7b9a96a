"""Options that are no single number: names, switches, shapes, functions, networks, lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import OptionError
from .numbers import check_count, is_number
from .wording import describe, named

__all__ = [
    "check_callable",
    "check_choice",
    "check_counts",
    "check_flag",
    "check_module",
    "check_modules",
    "check_shape",
    "lookup",
]

T = TypeVar("T")


def check_choice(value: object, choices: Iterable[str], name: str) -> str:
    """Return the name an option gives, or raise OptionError unless it is one of the choices."""
    return lookup(value, {choice: choice for choice in choices}, name)


def lookup(
    name: object, table: Mapping[str, T], what: str, expected: str = "one of {}", advice: str = ""
) -> T:
    """Return ``table[name]``, or raise OptionError that calls the option ``what`` it belongs to.

    Where the option may also be an object, ``expected`` says so: ``"one of {} or a function"``.
    """
    if not (isinstance(name, str) and name in table):
        message = f"{what} must be {expected.format(', '.join(table))}"
        raise OptionError(named(message, name, advice))
    return table[name]


def check_flag(value: object, name: str) -> bool:
    """The switch an option gives.

    Args:
        value: Candidate: ``True`` or ``False``, also of numpy or in a tensor.
        name: How the message calls it.

    Raises:
        OptionError: If it is neither.

    Examples:
        >>> check_flag(True, "trainable")
        True
    """
    plain = value
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        plain = value.item()
    if not isinstance(plain, bool):
        raise OptionError(
            named(f"{name} must be True or False", value, "Was another argument meant?")
        )
    return plain


def check_counts(
    values: Any, name: str, least: int = 1, empty: bool = False, example: str = "(64, 64)"
) -> tuple[int, ...]:
    """The integers of an option that is a sequence of them, such as the widths of a network.

    Args:
        values: Candidate: a tuple, list or array of integers.
        name: How the message calls it.
        least: The smallest integer that is taken.
        empty: Whether none may be given.
        example: What the message shows as a sequence.

    Returns:
        A tuple of plain ``int``.

    Raises:
        OptionError: If it is one number, no sequence, empty, or holds another thing.

    Examples:
        >>> check_counts([64, 32], "hidden")
        (64, 32)
        >>> check_counts(64, "hidden")
        Traceback (most recent call last):
            ...
        normflows_injective.errors.OptionError: hidden must be a sequence of positive integers, \
got 64. Put the number into a tuple: hidden=(64,).
    """
    kind = {0: "non-negative integers", 1: "positive integers"}.get(
        least, f"integers of at least {least}"
    )
    message = f"{name} must be a sequence of {kind}"
    if is_number(values):
        advice = f"Put the number into a tuple: {name}=({describe(values)},)."
        raise OptionError(named(message, values, advice))
    if isinstance(values, str | bytes | dict | set) or not _is_sequence(values):
        raise OptionError(named(message, values, f"Give for instance {name}={example}."))
    found = tuple(
        check_count(value, f"{name}[{index}]", least) for index, value in enumerate(values)
    )
    if not found and not empty:
        raise OptionError(named(f"{message}, at least one", values, f"Give e.g. {example}."))
    return found


def _is_sequence(values: object) -> bool:
    """Whether it can be counted and read in order: a tuple, list, range, array, tensor (n,)."""
    if isinstance(values, Tensor) or hasattr(values, "ndim"):
        return getattr(values, "ndim", 0) == 1
    return isinstance(values, Sequence)


def check_shape(
    value: Any, name: str, length: int | None = None, axes: str = "", advice: str = ""
) -> tuple[int, ...]:
    """The shape an option gives: a tuple of positive integers, or one number for a vector.

    Args:
        value: Candidate; one number n stands for the shape (n,) where ``length`` allows it.
        name: How the message calls it.
        length: How many numbers it must hold, or None for any number of at least one.
        axes: The names of the axes, for the message.
        advice: What the message tells to do, in place of a sentence that fits any shape.

    Returns:
        A tuple of plain ``int``.

    Raises:
        OptionError: If it is no such shape.

    Examples:
        >>> check_shape(3, "shape"), check_shape((1, 28, 28), "shape")
        ((3,), (1, 28, 28))
        >>> check_shape((28, 28), "image_shape", 3, "(channels, height, width)")
        Traceback (most recent call last):
            ...
        normflows_injective.errors.OptionError: image_shape must be a tuple of 3 positive \
integers, (channels, height, width), got (28, 28). Give each axis one integer.
    """
    single = is_number(value) and length in (None, 1)
    found: tuple[int, ...] | None = (check_count(value, name),) if single else None
    if found is None and not isinstance(value, str | bytes | dict) and _is_sequence(value):
        entries = list(value)
        if entries and length in (None, len(entries)):
            found = tuple(
                check_count(entry, f"{name}[{index}]") for index, entry in enumerate(entries)
            )
    if found is None:
        kind = "a tuple of positive integers" if length is None else _tuple_of(length)
        message = f"{name} must be {kind}" + (f", {axes}" if axes else "")
        raise OptionError(named(message, value, advice or "Give each axis one integer."))
    return found


def _tuple_of(length: int) -> str:
    return f"a tuple of {length} positive integers" if length > 1 else "a positive integer"


def check_callable(value: Any, name: str, advice: str) -> Callable[..., Any]:
    """The function an option gives.

    Args:
        value: Candidate; a class is refused, because its instance was meant.
        name: How the message calls it.
        advice: What the message tells to do.

    Raises:
        OptionError: If it cannot be called.

    Examples:
        >>> check_callable(abs, "density", "Give a function of x (B, D).")
        <built-in function abs>
    """
    if not callable(value) or isinstance(value, type):
        raise OptionError(named(f"{name} must be callable", value, advice))
    return value


def check_module(value: Any, name: str, advice: str) -> nn.Module:
    """The network an option gives.

    Args:
        value: Candidate.
        name: How the message calls it.
        advice: What the message tells to do.

    Raises:
        OptionError: If it is no ``torch.nn.Module``.

    Examples:
        >>> check_module(nn.Linear(2, 3), "net", "Give a network.")
        Linear(in_features=2, out_features=3, bias=True)
    """
    if not isinstance(value, nn.Module):
        raise OptionError(f"{name} must be a torch.nn.Module, got {_kind(value)}. {advice}")
    return value


def check_modules(value: Any, name: str, advice: str = "Put the layers into a list.") -> list[Any]:
    """The layers or networks an option lists.

    Args:
        value: Candidate: a list, tuple or ``nn.ModuleList``.
        name: How the message calls it.
        advice: What the message tells to do.

    Raises:
        OptionError: If it is no list, or an entry is no ``torch.nn.Module``.

    Examples:
        >>> check_modules([nn.Linear(2, 3)], "flows")
        [Linear(in_features=2, out_features=3, bias=True)]
    """
    if not isinstance(value, list | tuple | nn.ModuleList | nn.Sequential):
        raise OptionError(f"{name} must be a list of layers, got {_kind(value)}. {advice}")
    for index, layer in enumerate(value):
        if not isinstance(layer, nn.Module):
            message = f"{name} must hold layers that are torch.nn.Module"
            raise OptionError(f"{message}, got {_kind(layer)} at index {index}. {advice}")
    return list(value)


def _kind(value: object) -> str:
    """The type of an object that should have been a network, or the class itself."""
    return describe(value) if isinstance(value, type) else type(value).__name__

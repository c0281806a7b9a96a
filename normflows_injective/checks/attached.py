"""The check of arguments that is attached to functions, so that their bodies hold mathematics.

The annotations say what is checked: ``int`` is a count, ``bool`` a switch, ``float`` a number,
``Tensor`` a dense real tensor, and numbers of numpy or in tensors become plain ones. The look at a
tensor costs a microsecond, and reads no value, so it never waits for a device. Nothing is checked
while a graph is compiled or exported. If torch then fails over a shape, a dtype or a device, its
error, which names no argument, becomes one that does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from inspect import CO_VARARGS, CO_VARKEYWORDS, Parameter, signature, unwrap
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .annotations import check_class, check_of, is_ours, text_of
from .explaining import explain, refuse_without_values
from .tensors import check_kind, check_level, check_mask, check_type

Function = TypeVar("Function", bound=Callable[..., Any])
Class = TypeVar("Class", bound=type)

_MISSING = object()
_OWNER = {"self", "cls"}
# Annotations of parameters that have none.
_TENSORS = {"context": "Tensor | None", "x": "Tensor", "z": "Tensor"}
# Checks of values that are tensors: these too explain an error of torch.
_OF_TENSORS = (check_level, check_mask)


class _Argument(NamedTuple):
    """A parameter: its name, its place, whether it may be None, and the check of its values."""

    name: str
    place: int
    optional: bool
    check: Any = None


# The arguments of a function that are tensors, and those that a check makes plain.
_Plan = tuple[list[_Argument], list[_Argument]]


def checks_arguments(function: Function) -> Function:
    """Return a function that refuses by name arguments that its annotations do not allow.

    Its parameters ``x``, ``z`` and ``context`` are taken for tensors also without an annotation.
    """
    # Without arguments there is nothing to check, and none can explain an error.
    if hasattr(function, "_checks_arguments") or set(names_of(function)) <= _OWNER:
        return function
    plans: list[_Plan] = []

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if not plans:  # At the first call, when all the names in annotations are known.
            plans.append(_plan_of(function))
        tensors, values = plans[0]
        count = len(args)
        for name, place, optional, _ in tensors:
            value = args[place] if place < count else kwargs.get(name, _MISSING)
            if value is None and optional:
                continue
            if isinstance(value, Tensor):
                if not _is_plain(value):
                    check_kind(value, name)
                    if value.is_meta:
                        refuse_without_values(value, name, args, kwargs)
            elif value is not _MISSING:
                check_type(value, name)
        if values:
            args, kwargs = _replaced(values, args, kwargs)
        try:
            return function(*args, **kwargs)
        except Exception as error:
            places = [*tensors, *(value for value in values if value.check in _OF_TENSORS)]
            explain(function, args, kwargs, [place[:2] for place in places], error)
            raise

    checked._checks_arguments = True  # type: ignore[attr-defined]
    return checked  # type: ignore[return-value]


def checks_arguments_of(kind: Class) -> Class:
    """Attach the check to the public methods of a class, and to its constructor if it is ours."""
    special = ("__call__", "__init__") if is_ours(kind) else ("__call__",)
    for name, member in list(vars(kind).items()):
        if name.startswith("_") and name not in special:
            continue
        if isinstance(member, staticmethod):
            setattr(kind, name, staticmethod(checks_arguments(member.__func__)))
        elif isinstance(member, classmethod):
            setattr(kind, name, classmethod(checks_arguments(member.__func__)))
        elif callable(member) and not isinstance(member, type):
            setattr(kind, name, checks_arguments(member))
    return kind


def looks_first(kind: type, names: Iterable[str], look: Callable[..., None]) -> None:
    """Let ``look(object, *arguments)`` come before the methods of a class that have the names.

    Arguments by keyword are handed over in the order of the method's parameters.
    """
    for name in names:
        if name in vars(kind):
            setattr(kind, name, _preceded(vars(kind)[name], look))


def _preceded(function: Callable[..., Any], look: Callable[..., None]) -> Callable[..., Any]:
    names = names_of(function)[1:]

    @wraps(function)
    def looked(owner: object, *args: Any, **kwargs: Any) -> Any:
        if kwargs and not args:
            first = {name: kwargs[name] for name in names if name in kwargs}
            kwargs = {**first, **kwargs}
        # Without its first argument the method itself says what is missing.
        if args or kwargs.keys() & names[:1]:
            look(owner, *args, **kwargs)
        return function(owner, *args, **kwargs)

    return looked


def names_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of all parameters of a function, in their order."""
    function = unwrap(function)
    if not isinstance(function, FunctionType):
        return tuple(signature(function).parameters)
    # The code object knows them at once; signature would be asked of every method at import.
    code = function.__code__
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & CO_VARARGS) + bool(code.co_flags & CO_VARKEYWORDS)
    return code.co_varnames[:count]


def _is_plain(value: Tensor) -> bool:
    """Whether a tensor has values, and is dense, real and floating point."""
    if torch._C._len_torch_function_stack():
        # Every property goes through all modes that watch the calls of a network.
        with torch._C.DisableTorchFunction():
            dense = value.layout is torch.strided and value.dtype.is_floating_point
            return dense and not value.is_meta
    dense = value.layout is torch.strided and value.dtype.is_floating_point
    return dense and not value.is_meta


def _plan_of(function: Callable[..., Any]) -> _Plan:
    tensors, values = [], []
    for place, (name, parameter) in enumerate(signature(function).parameters.items()):
        if parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
            continue
        if parameter.kind is Parameter.KEYWORD_ONLY:
            place = 2**31
        text = text_of(parameter.annotation) or _TENSORS.get(name, "")
        if name == "level" and text == "Tensor":
            values.append(_Argument(name, place, False, check_level))
        elif name == "mask" and text.startswith("Tensor"):
            values.append(_Argument(name, place, text != "Tensor", check_mask))
        elif text.removesuffix(" | None") in ("Tensor", "Table"):
            tensors.append(_Argument(name, place, text.endswith(" | None")))
        else:
            check, optional = check_of(parameter)
            check = check or check_class(parameter, getattr(function, "__globals__", {}))
            if check is not None:
                values.append(_Argument(name, place, optional, check))
    return tensors, values


def _replaced(
    values: list[_Argument], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments, each that has a check in its plain form."""
    count = len(args)
    for name, place, optional, check in values:
        value = args[place] if place < count else kwargs.get(name, _MISSING)
        if value is _MISSING or (optional and value is None):
            continue
        plain = check(value, name)
        if plain is value:
            continue
        if place < count:
            args = (*args[:place], plain, *args[place + 1 :])
        else:
            kwargs = {**kwargs, name: plain}
    return args, kwargs

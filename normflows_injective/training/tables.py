"""Arrays and data frames in place of tensors, for functions of whole tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

import numpy as np
from torch import nn

from ..checks.annotations import text_of
from .rows import example_of, in_kind, tensor_of

# A tensor, an array or a data frame of numbers.
Table = Any

Function = TypeVar("Function", bound=Callable[..., Any])


def takes_tables(function: Function) -> Function:
    """Return a function whose arguments that are annotated as tables arrive as tensors.

    With a model as the first argument arrays come in its dtype and on its device, else in
    float64. Labels stay whole numbers, and tensors stay as they are. A function with the argument
    ``names`` gets those of a data frame's columns.
    """
    names = tuple(signature(function).parameters)
    tables = {
        name
        for name, parameter in signature(function).parameters.items()
        if text_of(parameter.annotation).removesuffix(" | None") == "Table"
    }

    @wraps(function)
    def converted(*args: Any, **kwargs: Any) -> Any:
        model = args[0] if args else kwargs.get(names[0])
        given = dict(zip(names, args, strict=False)) | kwargs
        found = {name: _tensor(model, given[name], name) for name in tables & given.keys()}
        if "names" in names and given.get("names") is None:
            columns = getattr(given.get(names[0]), "columns", None)
            kwargs |= {} if columns is None else {"names": [*map(str, columns)]}
        args = (
            tuple(found.get(name, value) for name, value in zip(names, args, strict=False))
            + args[len(names) :]
        )
        return function(*args, **{name: found.get(name, kwargs[name]) for name in kwargs})

    return converted  # type: ignore[return-value]


def _tensor(model: Any, values: Any, name: str) -> Any:
    """The tensor of an array or a data frame; anything else as it is."""
    if not isinstance(values, np.ndarray) and not hasattr(values, "to_numpy"):
        return values
    tensor = tensor_of(values, name)
    if not isinstance(model, nn.Module):
        return tensor.double()
    like = example_of(model)
    return in_kind(tensor, like) if "context" in name else tensor.to(like)

"""The check of tensors that is attached to methods, so that their bodies hold mathematics alone.

Before the call every argument that is annotated as a tensor must be one, dense and real. That
costs a microsecond, looks at no value and so never waits for a device, and is left out while a
graph is compiled or exported. If torch then fails over a shape, a dtype or a device, its error,
which names no argument, becomes one that does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..errors import DeviceError, DtypeError, ShapeError
from .tensors import NOT_REAL, check_kind, check_type

__all__ = ["checks_tensors", "checks_tensors_of"]

Function = TypeVar("Function", bound=Callable[..., Any])
Class = TypeVar("Class", bound=type)

_MISSING = object()
# Subclasses are named errors already, or signals such as those of out-of-memory.
_PLAIN = (RuntimeError, IndexError, ValueError)
_SHAPE_WORDS = re.compile(
    r"shape|size|dimension|broadcast|expand|numel|elements|indices|index|channels|\dD|rank|axis",
    re.IGNORECASE,
)


class _Argument(NamedTuple):
    """A parameter that takes a tensor: its name, its place, whether None is taken."""

    name: str
    place: int
    optional: bool


def checks_tensors(function: Function) -> Function:
    """A function or method that refuses by name what is no dense tensor.

    Args:
        function: Parameters annotated ``Tensor`` or ``Tensor | None`` are looked at, and those
            called ``x``, ``z`` and ``context`` if they have no annotation.

    Returns:
        The function with the check in front, or the function itself if it takes no tensor.

    Examples:
        >>> @checks_tensors
        ... def norm(x: Tensor) -> Tensor:
        ...     return x.square().sum(1).sqrt()
        >>> norm(1.0)
        Traceback (most recent call last):
            ...
        normflows_injective.errors.DtypeError: x must be a torch.Tensor, got float. Convert it \
with torch.as_tensor.
    """
    arguments = _tensors_of(function)
    if not arguments or hasattr(function, "_checks_tensors"):
        return function

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        count = len(args)
        for name, place, optional in arguments:
            value = args[place] if place < count else kwargs.get(name, _MISSING)
            if isinstance(value, Tensor):
                if value.layout is not torch.strided or not value.dtype.is_floating_point:
                    check_kind(value, name)
            elif not (value is _MISSING or (value is None and optional)):
                check_type(value, name)
        try:
            return function(*args, **kwargs)
        except (RuntimeError, IndexError, ValueError) as error:
            if type(error) not in _PLAIN:
                raise
            given = {
                name: args[place] if place < count else kwargs.get(name)
                for name, place, _ in arguments
            }
            _explain(function, args, given, error)
            raise

    checked._checks_tensors = True  # type: ignore[attr-defined]
    return checked  # type: ignore[return-value]


def checks_tensors_of(kind: Class) -> Class:
    """Attach the check to the public methods that a class defines.

    Args:
        kind: A class; it is changed. For a decorator, or for ``__init_subclass__`` of a base.

    Examples:
        >>> @checks_tensors_of
        ... class Twice:
        ...     def forward(self, z: Tensor) -> Tensor:
        ...         return 2 * z
        >>> Twice().forward(torch.ones(1))
        tensor([2.])
    """
    for name, member in list(vars(kind).items()):
        public = not name.startswith("_") or name == "__call__"
        if public and callable(member) and not isinstance(member, type):
            setattr(kind, name, checks_tensors(member))
    return kind


def _tensors_of(function: Callable[..., Any]) -> list[_Argument]:
    found = []
    for place, (name, parameter) in enumerate(signature(function).parameters.items()):
        if parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
            continue
        kind = parameter.annotation
        if kind is Parameter.empty:
            kind = {"context": "Tensor | None", "x": "Tensor", "z": "Tensor"}.get(name, "")
        text = kind.__name__ if isinstance(kind, type) else str(kind).replace("torch.", "")
        if text in ("Tensor", "Tensor | None"):
            by_name = parameter.kind is Parameter.KEYWORD_ONLY
            found.append(_Argument(name, 2**31 if by_name else place, text != "Tensor"))
    return found


def _explain(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    given: dict[str, Any],
    error: Exception,
) -> None:
    """Raise a named error in place of torch's, if one of the tensors explains it."""
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    like = _reference(args, tensors)
    for name, value in tensors.items():
        if like is None or name in NOT_REAL:
            continue
        if value.device != like.device:
            raise DeviceError(
                f"{name} must be on {like.device}, where the parameters are, got {value.device}. "
                f"Move it with {name}.to({str(like.device)!r})."
            ) from error
        if value.dtype != like.dtype and not torch.is_autocast_enabled(value.device.type):
            raise DtypeError(
                f"{name} must have the dtype {like.dtype} of the parameters, got {value.dtype}. "
                f"Convert it with {name}.to({like.dtype})."
            ) from error
    if tensors and _SHAPE_WORDS.search(str(error)):
        shapes = ", ".join(f"{name} of shape {tuple(v.shape)}" for name, v in tensors.items())
        place = function.__qualname__
        known = _known_shapes(args)
        raise ShapeError(
            f"{place} cannot take {shapes}{known}. Compare the shapes with its documentation. "
            f"The cause: {error}"
        ) from error


def _reference(args: tuple[Any, ...], tensors: dict[str, Tensor]) -> Tensor | None:
    """A tensor whose dtype and device the others should have."""
    owner = args[0] if args else None
    held = chain(owner.parameters(), owner.buffers()) if isinstance(owner, nn.Module) else ()
    return next((t for t in chain(held, tensors.values()) if t.is_floating_point()), None)


def _known_shapes(args: tuple[Any, ...]) -> str:
    """The event shapes that a layer was built for, if it knows them."""
    owner = args[0] if args else None
    names = ("latent_shape", "data_shape", "input_shape", "shape")
    known = {name: getattr(owner, name, None) for name in names}
    texts = [f"{name}={tuple(shape)}" for name, shape in known.items() if isinstance(shape, tuple)]
    return f"; it was built with {', '.join(texts)}" if texts else ""

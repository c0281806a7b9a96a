"""Named errors in place of errors of torch and Python, where the arguments explain them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from inspect import signature
from itertools import chain
from traceback import walk_tb
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import (
    DeviceError,
    DtypeError,
    OptionError,
    ShapeError,
    UnsupportedLayerError,
    UnsupportedModelError,
)
from .annotations import is_ours
from .tensors import NOT_REAL
from .wording import describe

_SHAPE_WORDS = re.compile(
    r"shape|size|class values|dimension|broadcast|expand|numel|elements|indices|index|channels|"
    r"\dD|rank|axis",
    re.IGNORECASE,
)
# The text of torch, the named error, and its advice after the name of the function.
_DERIVATIVES = (
    (
        re.compile("transformed by a functorch transform"),
        UnsupportedModelError,
        "takes derivatives that cannot be taken inside torch.func.grad, vjp or vmap. Call "
        "backward() or torch.autograd.grad on its result.",
    ),
    (
        re.compile("Inference tensors cannot be saved"),
        UnsupportedModelError,
        "needs gradients, but parameters or arguments were made under torch.inference_mode. Build "
        "the model and its data outside of it.",
    ),
    (
        re.compile(r"derivative for \S+ is not implemented"),
        UnsupportedLayerError,
        "needs a derivative of a layer that this torch does not have. Replace the layer, or take "
        "a newer torch.",
    ),
)
# Subclasses are named errors already, or signals such as that of exhausted memory.
_OF_SHAPES = (RuntimeError, IndexError, ValueError)
_OF_TYPES = (TypeError, AttributeError)
_TYPE_WORDS = re.compile(r"to unpack|non-Tensor")
_DTYPE_WORDS = re.compile(r"same dtype|not implemented for '")
_LIBRARIES = ("normflows_injective", "torch", "normflows")


def explain(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    places: Iterable[tuple[str, int]],
    error: Exception,
) -> None:
    """Raise a named error if an argument explains one that names none, or else return."""
    values = {n: args[p] if p < len(args) else kwargs.get(n) for n, p in places}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    if isinstance(error, RuntimeError) and not is_ours(type(error)):
        _explain_tensors(args, tensors, error)
        _explain_values({**_named(function, args, kwargs), **tensors}, error)
        _explain_dtypes(function, tensors, error)
    if type(error) in _OF_SHAPES and not _is_of_types(error):
        _explain_derivatives(function, error)
        if tensors and _SHAPE_WORDS.search(str(error)):
            shapes = ", ".join(f"{name} of shape {tuple(v.shape)}" for name, v in tensors.items())
            raise ShapeError(
                f"{function.__qualname__} cannot take {shapes}{_known_shapes(args)}. Compare the "
                f"shapes with its documentation. The cause: {error}"
            ) from error
    elif _is_of_types(error) and _is_from_libraries(error.__traceback__):
        _explain_parts(function, args, kwargs, error)


def _explain_derivatives(function: Callable[..., Any], error: Exception) -> None:
    """Raise if torch has no derivative of a layer, or cannot record one here."""
    for text, kind, advice in _DERIVATIVES:
        if text.search(str(error)):
            raise kind(f"{function.__qualname__} {advice} The cause: {error}") from error


def _is_of_types(error: Exception) -> bool:
    """Whether Python or a vmap met a value of another type, or a tuple of another length."""
    of_values = type(error) is ValueError and _TYPE_WORDS.search(str(error)) is not None
    return of_values or type(error) in _OF_TYPES


def refuse_without_values(
    value: Tensor, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise DeviceError if a tensor is on the meta device while others of a call are not.

    Some operations of torch would read memory at random instead of failing.
    """
    others = (other for other in (*args, *kwargs.values()) if isinstance(other, Tensor))
    for other in chain(_held(args), others):
        if not other.is_meta:
            raise DeviceError(_elsewhere(name, value, other.device))


def _elsewhere(name: str, value: Tensor, device: torch.device) -> str:
    return (
        f"{name} must be on {device}, where the parameters and other arguments are, got "
        f"{value.device}. Move it with {name}.to({str(device)!r})."
    )


def _explain_dtypes(
    function: Callable[..., Any], tensors: dict[str, Tensor], error: Exception
) -> None:
    """Raise if torch complains about a dtype."""
    if tensors and _DTYPE_WORDS.search(str(error)):
        dtypes = ", ".join(f"{name} of {value.dtype}" for name, value in tensors.items())
        raise DtypeError(
            f"{function.__qualname__} cannot take {dtypes}. Convert tensors and networks to one "
            f"dtype, float32 or float64. The cause: {error}"
        ) from error


def _explain_values(arguments: dict[str, Any], error: Exception) -> None:
    """Raise if a tensor has no values, and they were needed."""
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_meta:
            raise DeviceError(
                f"{name} must have values to be looked at, got a tensor on the meta device. Move "
                "the module and its arguments to a device."
            ) from error


def _explain_tensors(args: tuple[Any, ...], tensors: dict[str, Tensor], error: Exception) -> None:
    """Raise if a tensor differs from the parameters in device or dtype."""
    held = [*_held(args), *tensors.values()]
    like = next((tensor for tensor in held if tensor.is_floating_point()), None)
    for name, value in tensors.items():
        device = held[0].device
        if value.device != device:
            raise DeviceError(_elsewhere(name, value, device)) from error
        free = name in NOT_REAL or _is_autocast(value.device.type)
        if like is not None and value.dtype != like.dtype and not free:
            raise DtypeError(
                f"{name} must have the dtype {like.dtype} of the parameters, got {value.dtype}. "
                f"Convert it with {name}.to({like.dtype})."
            ) from error


def _explain_parts(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> None:
    """Raise if functions or networks are among the arguments: one of them broke its contract."""
    parts = _named(function, args, kwargs)
    if not parts:
        return
    shown = ", ".join(f"{name}={describe(value)}" for name, value in parts.items())
    raise OptionError(
        f"{function.__qualname__} cannot work with {shown}. Compare the arguments, and what "
        f"functions and networks among them return, with its documentation. The cause: {error}"
    ) from error


def _named(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return all arguments by name but the owner, and none if Python refuses the call itself."""
    try:
        bound = signature(function).bind(*args, **kwargs).arguments
    except TypeError:
        return {}
    return {name: value for name, value in bound.items() if name not in ("self", "cls")}


def _is_from_libraries(place: TracebackType | None) -> bool:
    """Whether an error came from our code or torch's, and not from a function of the user."""
    modules = (str(frame.f_globals.get("__name__", "")) for frame, _ in walk_tb(place))
    return all(module.partition(".")[0] in _LIBRARIES for module in modules)


def _is_autocast(device_type: str) -> bool:
    try:
        return torch.is_autocast_enabled(device_type)
    except RuntimeError:  # The meta device has no autocast.
        return False


def _held(args: tuple[Any, ...]) -> Iterable[Tensor]:
    """Return the tensors of a module, whose dtype and device the arguments should have."""
    owner: Any = args[0] if args else None
    # A constructor may fail before the module is one.
    is_module = isinstance(owner, nn.Module) and "_parameters" in vars(owner)
    return chain(owner.parameters(), owner.buffers()) if is_module else ()


def _known_shapes(args: tuple[Any, ...]) -> str:
    """Return the event shapes that a layer was built for, as text, if it knows them."""
    owner = args[0] if args else None
    names = ("latent_shape", "data_shape", "input_shape", "shape")
    known = {name: getattr(owner, name, None) for name in names}
    texts = [f"{name}={tuple(shape)}" for name, shape in known.items() if isinstance(shape, tuple)]
    return f"; it was built with {', '.join(texts)}" if texts else ""

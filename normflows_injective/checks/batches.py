"""Checks of the shapes and values of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch._C import _functorch

from ..errors import DtypeError, NonFiniteError, OptionError, ShapeError
from .tensors import check_dense, check_kind, check_type
from .wording import named

_DIVERGED = (
    "The data are finite, so the model has diverged, or they lie outside the domain of a layer. "
    "Lower the learning rate, clip gradients, raise beta; this call changed no parameter."
)
_BAD_DATA = "Clean or drop these samples before the step; no parameter was changed."


def is_readable(*tensors: Tensor) -> bool:
    """Whether Python may look at the values of tensors, as every check of values does.

    There are no values on torch's meta device, while a call is compiled or exported (a program has
    no branch that raises), and where a vmap maps over a tensor. Inside a vmap over tangents the
    point itself is not mapped, and its values can be read.
    """
    # torch.export sets the same flag as torch.compile.
    return not (torch.compiler.is_compiling() or any(map(_has_no_values, tensors)))


def _has_no_values(tensor: Tensor) -> bool:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return tensor.is_meta


def check_finite(tensor: Tensor, name: str, advice: str = _BAD_DATA) -> None:
    """Raise NonFiniteError if a tensor holds NaN or infinity, with the count and first index."""
    if not is_readable(tensor):
        return
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return
    bad = (~finite).nonzero()
    raise NonFiniteError(
        f"{name} has {len(bad)} of {tensor.numel()} values NaN or infinite, the first at index "
        f"{bad[0].tolist()}. {advice}"
    )


def check_loss(loss: Tensor, terms: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteError if a mean loss is not finite, naming the term (B,) that made it so."""
    if not is_readable(loss) or bool(torch.isfinite(loss)):
        return
    for name, term in terms.items():
        check_finite(term, f"the training term {name}", _DIVERGED)
    raise NonFiniteError("The mean of the loss overflowed although every term is finite.")


def check_batch(tensor: Tensor, name: str, dtype: torch.dtype | None = None) -> None:
    """Raise unless a tensor is a non-empty, finite batch of floats, of a dtype if one is given."""
    check_type(tensor, name)
    check_kind(tensor, name)
    check_rows(tensor, name)
    if dtype is not None and tensor.dtype != dtype:
        raise DtypeError(
            f"{name} must have the model's dtype {dtype}, got {tensor.dtype}. Convert the data "
            f"with {name}.to({dtype}) or the model with model.to({tensor.dtype})."
        )
    check_finite(tensor, name)


def as_floating(values: object, name: str, like: Tensor | None = None) -> Tensor:
    """Return a copy of numbers as a tensor without a graph, integers in torch's default dtype.

    The copy takes dtype and device of ``like``, or keeps those of a tensor.
    """
    try:
        tensor = torch.as_tensor(values).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        message = f"{name} must be a tensor or a list of numbers"
        raise OptionError(named(message, values, f"torch said: {error}")) from error
    check_dense(tensor, name)
    if tensor.dtype == torch.bool:
        raise OptionError(f"{name} must hold numbers, got booleans. Convert them with .float().")
    check_finite(tensor, name, "Give finite numbers.")
    if like is not None:
        # Numbers of Python go to the dtype at once, so that no digit is lost on the way.
        if isinstance(values, Tensor):
            return tensor.to(like)
        return torch.as_tensor(values, dtype=like.dtype, device=like.device).clone()
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def numbers_of(values: object, name: str) -> Tensor:
    """Return numbers as a tensor of floats: a tensor of floats as it is, with its graph.

    Arrays, columns of data frames, lists and numbers are copied; integers come in torch's default
    dtype, arrays of floats in their own.
    """
    if isinstance(values, Tensor):
        check_dense(values, name)
        if values.dtype.is_floating_point:
            check_finite(values, name, "Give finite numbers.")
            return values
    elif hasattr(values, "to_numpy"):
        values = values.to_numpy()
    if isinstance(values, str | bytes):
        advice = "Convert texts with float()."
        raise OptionError(named(f"{name} must be a tensor or a list of numbers", values, advice))
    # torch warns of arrays that cannot be written to.
    return as_floating(values.copy() if isinstance(values, np.ndarray) else values, name)


def check_rows(tensor: Tensor, name: str) -> None:
    """Raise ShapeError unless a batch has a row, an event dimension and an element."""
    if tensor.dim() < 2:
        raise ShapeError(
            f"{name} must be a batch of shape (B, ...) with at least one event dimension, got "
            f"shape {tuple(tensor.shape)}. Add one with {name}.unsqueeze(0) or "
            f"{name}.unsqueeze(-1)."
        )
    if tensor.numel() == 0:
        raise ShapeError(
            f"{name} is an empty batch of shape {tuple(tensor.shape)}. Skip it, or let the loader "
            "drop it."
        )


def check_event_shape(tensor: Tensor, shape: Sequence[int] | None, name: str) -> None:
    """Raise ShapeError unless a batch has the event shape, if that is known."""
    check_type(tensor, name)
    if shape is None or tuple(tensor.shape[1:]) == tuple(shape):
        return
    expected = ", ".join(["B", *map(str, shape)]) if shape else "B,"
    raise ShapeError(f"{name} must have shape ({expected}), got {tuple(tensor.shape)}.")


def check_same_rows(**tensors: Tensor) -> None:
    """Raise ShapeError unless batches have as many rows as the first: none is broadcast."""
    first = next(iter(tensors))
    rows = tensors[first].shape[:1]
    for name, tensor in tensors.items():
        if not rows or tensor.shape[:1] != rows:
            many = f", {rows[0]} as {first} has" if rows else ""
            raise ShapeError(
                f"{name} must have one row for every sample{many}, got shape "
                f"{tuple(tensor.shape)}. Repeat a row that all samples share."
            )

"""Refusals of what is no dense tensor of the right kind of numbers, whatever its shape."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ContextError, DtypeError
from .numbers import is_number

__all__ = ["NOT_REAL", "check_kind", "check_type"]

# Arguments that may hold integers or booleans; all others are real numbers.
NOT_REAL = ("labels", "mask", "context", "counts", "pixels", "y")
# Arguments for which a number may stand.
_NUMBERS = ("level",)


def check_type(value: object, name: str) -> None:
    """Raise unless a value is a tensor.

    Args:
        value: What came.
        name: The argument.

    Raises:
        DtypeError: If it is none; ContextError for a context.

    Examples:
        >>> check_type([1.0], "x")
        Traceback (most recent call last):
            ...
        normflows_injective.errors.DtypeError: x must be a torch.Tensor, got list. A loader of a \
TensorDataset gives lists: unpack them, 'for (x,) in loader'; convert arrays with torch.as_tensor.
    """
    if isinstance(value, Tensor) or (name in _NUMBERS and is_number(value)):
        return
    advice = "Convert it with torch.as_tensor."
    if isinstance(value, list | tuple) and name != "context":
        advice = (
            "A loader of a TensorDataset gives lists: unpack them, 'for (x,) in loader'; convert "
            "arrays with torch.as_tensor."
        )
    kind = ContextError if name == "context" else DtypeError
    raise kind(f"{name} must be a torch.Tensor, got {type(value).__name__}. {advice}")


def check_kind(value: Tensor, name: str) -> None:
    """Raise if a tensor is sparse, complex, or of no floating dtype where that is meant.

    Args:
        value: What came.
        name: The argument.

    Raises:
        DtypeError: If it is one.

    Examples:
        >>> check_kind(torch.zeros(2, 2).to_sparse(), "x")
        Traceback (most recent call last):
            ...
        normflows_injective.errors.DtypeError: x must be a dense tensor, got a sparse one of \
layout torch.sparse_coo. Convert it with x.to_dense().
    """
    if value.layout is not torch.strided:
        raise DtypeError(
            f"{name} must be a dense tensor, got a sparse one of layout {value.layout}. Convert "
            f"it with {name}.to_dense()."
        )
    if value.dtype.is_complex:
        raise DtypeError(
            f"{name} must be real, got {value.dtype}. Stack its parts with torch.view_as_real."
        )
    if not value.dtype.is_floating_point and name not in NOT_REAL:
        raise DtypeError(
            f"{name} must be real floating point, got {value.dtype}. Convert integers with "
            f"{name}.float(); pixels also want scaling and a little noise (dequantisation)."
        )

"""Refusals of what is no dense tensor of the right kind of numbers, whatever its shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ContextError, DtypeError
from .numbers import check_positive

__all__ = ["NOT_REAL", "check_dense", "check_kind", "check_level", "check_mask", "check_type"]

# Arguments that may hold integers or booleans; all others are real numbers.
NOT_REAL = ("labels", "mask", "context", "counts", "pixels", "y")


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
    if isinstance(value, Tensor):
        return
    advice = "Convert it with torch.as_tensor."
    if name == "mask":
        kind = type(value).__name__
        raise DtypeError(
            f"mask must be a tensor of booleans, true where observed, got {kind}. {advice}"
        )
    if isinstance(value, list | tuple) and name in ("x", "z"):
        advice = (
            "A loader of a TensorDataset gives lists: unpack them, 'for (x,) in loader'; convert "
            "arrays with torch.as_tensor."
        )
    error = ContextError if name == "context" else DtypeError
    raise error(f"{name} must be a torch.Tensor, got {type(value).__name__}. {advice}")


def check_dense(value: Tensor, name: str) -> None:
    """Raise if a tensor is sparse or complex.

    Args:
        value: What came.
        name: The argument.

    Raises:
        DtypeError: If it is one.

    Examples:
        >>> check_dense(torch.zeros(2, 2).to_sparse(), "x")
        Traceback (most recent call last):
            ...
        normflows_injective.errors.DtypeError: x must be a dense tensor, got a sparse one of \
layout torch.sparse_coo. Convert it with x.to_dense().
    """
    if value.is_nested:
        raise DtypeError(
            f"{name} must be a dense tensor, got a nested one. Stack rows of one length, or fill "
            f"them up with {name}.to_padded_tensor(0.0)."
        )
    if value.layout is not torch.strided:
        raise DtypeError(
            f"{name} must be a dense tensor, got a sparse one of layout {value.layout}. Convert "
            f"it with {name}.to_dense()."
        )
    if value.dtype.is_complex:
        raise DtypeError(
            f"{name} must be real, got {value.dtype}. Stack its parts with torch.view_as_real."
        )


def check_kind(value: Tensor, name: str) -> None:
    """Raise if a tensor is sparse, complex, or of no floating dtype where that is meant.

    Args:
        value: What came.
        name: The argument.

    Raises:
        DtypeError: If it is one.

    Examples:
        >>> check_kind(torch.zeros(2, 2), "x")
    """
    check_dense(value, name)
    if not value.dtype.is_floating_point and name not in NOT_REAL:
        raise DtypeError(
            f"{name} must be real floating point, got {value.dtype}. Convert integers with "
            f"{name}.float(); pixels also want scaling and a little noise (dequantisation)."
        )


def check_mask(value: Any, name: str) -> Tensor:
    """A mask of what is observed, which is no tensor of numbers.

    Args:
        value: What came.
        name: The argument.

    Raises:
        DtypeError: If it is no dense tensor of booleans.

    Examples:
        >>> check_mask(torch.tensor([True]), "mask")
        tensor([True])
    """
    check_type(value, name)
    check_dense(value, name)
    if value.dtype != torch.bool:
        raise DtypeError(
            f"{name} must be a tensor of booleans, true where observed, got {value.dtype}. "
            f"Convert it with {name}.bool()."
        )
    mask: Tensor = value
    return mask


def check_level(value: object, name: str) -> Tensor:
    """The level of a surface as a tensor: one that is given, or a positive number.

    Args:
        value: A tensor, whose values are not looked at, or a number.
        name: The argument.

    Raises:
        OptionError: If it is neither.

    Examples:
        >>> check_level(2.0, "level")
        tensor(2.)
    """
    if isinstance(value, Tensor):
        check_kind(value, name)
        return value
    return torch.as_tensor(check_positive(value, name), dtype=torch.get_default_dtype())

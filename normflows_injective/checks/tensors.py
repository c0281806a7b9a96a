"""Refusals of values that are no dense tensors of the right kind of numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ContextError, DtypeError
from .numbers import check_positive

# Arguments that may hold integers or booleans; all others hold real numbers.
NOT_REAL = ("labels", "mask", "context", "counts", "pixels", "y")
_BOOLEANS = "a tensor of booleans, true where observed"


def check_type(value: object, name: str) -> None:
    """Raise DtypeError unless a value is a tensor, and ContextError if it should be a context."""
    if isinstance(value, Tensor):
        return
    what = _BOOLEANS if name == "mask" else "a torch.Tensor"
    advice = "Convert it with torch.as_tensor."
    if isinstance(value, list | tuple) and name in ("x", "z"):
        advice = (
            "A loader of a TensorDataset gives lists: unpack them, 'for (x,) in loader'; convert "
            "arrays with torch.as_tensor."
        )
    error = ContextError if name == "context" else DtypeError
    raise error(f"{name} must be {what}, got {type(value).__name__}. {advice}")


def check_dense(value: Tensor, name: str) -> None:
    """Raise DtypeError if a tensor is nested, sparse or complex."""
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
    """Raise DtypeError if a tensor is not dense, or not real floating point where it must be."""
    check_dense(value, name)
    if not value.dtype.is_floating_point and name not in NOT_REAL:
        raise DtypeError(
            f"{name} must be real floating point, got {value.dtype}. Convert integers with "
            f"{name}.float(); pixels also want scaling and a little noise (dequantisation)."
        )


def check_mask(value: Any, name: str) -> Tensor:
    """Return a mask of what is observed, or raise DtypeError unless it is a tensor of booleans."""
    check_type(value, name)
    check_dense(value, name)
    if value.dtype != torch.bool:
        raise DtypeError(
            f"{name} must be {_BOOLEANS}, got {value.dtype}. Convert it with {name}.bool()."
        )
    mask: Tensor = value
    return mask


def check_level(value: object, name: str) -> Tensor:
    """Return the level of a surface, a tensor or a positive number, as a tensor."""
    if isinstance(value, Tensor):
        check_kind(value, name)
        return value
    return torch.as_tensor(check_positive(value, name), dtype=torch.get_default_dtype())

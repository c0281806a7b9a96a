"""Checks of what a caller hands in, each raising a named error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import DtypeError, NonFiniteError, ShapeError

__all__ = ["check_batch", "check_event_shape", "check_finite"]


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise if a tensor holds NaN or infinity, naming it, the count and the first index.

    Args:
        tensor: Any tensor; integer tensors pass.
        name: How the message calls it.

    Raises:
        NonFiniteError: If any element is NaN or infinite.

    Examples:
        >>> check_finite(torch.tensor([1.0, float("nan")]), "x")
        Traceback (most recent call last):
            ...
        normflows_injective.errors.NonFiniteError: x has 1 of 2 values NaN or infinite, the first \
at index [1]. Clean or drop these samples before the step; no parameter was changed.
    """
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return
    bad = (~finite).nonzero()
    raise NonFiniteError(
        f"{name} has {len(bad)} of {tensor.numel()} values NaN or infinite, the first at index "
        f"{bad[0].tolist()}. Clean or drop these samples before the step; no parameter was "
        "changed."
    )


def check_batch(tensor: Tensor, name: str, dtype: torch.dtype | None = None) -> None:
    """Raise unless a tensor is a non-empty, finite, floating-point batch.

    Args:
        tensor: Candidate of shape :math:`(B, *)` with at least one event dimension.
        name: How the message calls it.
        dtype: The dtype the model computes in, or None to accept any floating one.

    Raises:
        ShapeError: If it has no batch or event dimension, or the batch is empty.
        DtypeError: If it is not a floating tensor of the expected dtype.
        NonFiniteError: If it holds NaN or infinity.

    Examples:
        >>> check_batch(torch.zeros(4, 2), "x", torch.float32)
        >>> check_batch(torch.zeros(4), "x")
        Traceback (most recent call last):
            ...
        normflows_injective.errors.ShapeError: x must be a batch of shape (B, ...) with at least \
one event dimension, got shape (4,). Add one with x.unsqueeze(0) or x.unsqueeze(-1).
    """
    if not isinstance(tensor, Tensor):
        raise DtypeError(
            f"{name} must be a torch.Tensor, got {type(tensor).__name__}. "
            "Convert it with torch.as_tensor."
        )
    if tensor.dim() < 2:
        raise ShapeError(
            f"{name} must be a batch of shape (B, ...) with at least one event dimension, got "
            f"shape {tuple(tensor.shape)}. Add one with {name}.unsqueeze(0) or "
            f"{name}.unsqueeze(-1)."
        )
    if tensor.numel() == 0:
        raise ShapeError(
            f"{name} is an empty batch of shape {tuple(tensor.shape)}: it has no mean to train or "
            "report. Skip it, or let the loader drop it."
        )
    if not tensor.is_floating_point():
        raise DtypeError(
            f"{name} must be floating point, got {tensor.dtype}. Convert it with {name}.float(); "
            "integer data such as pixels also need dequantisation."
        )
    if dtype is not None and tensor.dtype != dtype:
        raise DtypeError(
            f"{name} must have the model's dtype {dtype}, got {tensor.dtype}. Convert the data "
            f"with {name}.to({dtype}) or the model with model.to({tensor.dtype})."
        )
    check_finite(tensor, name)


def check_event_shape(tensor: Tensor, shape: Sequence[int] | None, name: str) -> None:
    """Raise unless the event part of a batch has the expected shape.

    Args:
        tensor: Batch of shape :math:`(B, *)`.
        shape: Expected event shape, or None if it is not known.
        name: How the message calls it.

    Raises:
        ShapeError: If the shapes differ.

    Examples:
        >>> check_event_shape(torch.zeros(4, 3), (2,), "x")
        Traceback (most recent call last):
            ...
        normflows_injective.errors.ShapeError: x must have shape (B, 2), got (4, 3).
    """
    if shape is None or tuple(tensor.shape[1:]) == tuple(shape):
        return
    expected = ", ".join(["B", *map(str, shape)])
    raise ShapeError(f"{name} must have shape ({expected}), got {tuple(tensor.shape)}.")

"""The dtype in which matrices are factored."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_factored", "factored_dtype"]

WITHOUT_FLOAT64 = frozenset({"mps"})
"""Kinds of devices that have no float64."""


def factored_dtype(device: torch.device) -> torch.dtype:
    """The dtype to factor matrices in: float64 where the device has it, else float32.

    Args:
        device: Where the matrices are.

    Returns:
        The dtype.

    Examples:
        >>> factored_dtype(torch.device("cpu"))
        torch.float64
    """
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def as_factored(tensor: Tensor) -> Tensor:
    """A tensor in the dtype to factor matrices in on its device.

    Args:
        tensor: Any tensor.

    Returns:
        The tensor, in float64 where the device has it, else in float32.

    Examples:
        >>> as_factored(torch.ones(1)).dtype
        torch.float64
    """
    return tensor.to(factored_dtype(tensor.device))

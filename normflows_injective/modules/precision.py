"""The dtype in which matrices are factored."""

from __future__ import annotations

import torch
from torch import Tensor

# Kinds of devices.
WITHOUT_FLOAT64 = frozenset({"mps"})


def factored_dtype(device: torch.device) -> torch.dtype:
    """The dtype to factor matrices in: float64 where the device has it, else float32."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def as_factored(tensor: Tensor) -> Tensor:
    """A tensor in the dtype to factor matrices in on its device."""
    return tensor.to(factored_dtype(tensor.device))

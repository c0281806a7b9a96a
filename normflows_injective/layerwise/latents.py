"""The check of latents from which blocks and gaps are estimated."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_batch, check_finite
from ..errors import DtypeError, OptionError, ShapeError

__all__ = ["check_latents"]


def check_latents(z: Tensor, least: int, name: str) -> None:
    """Raise unless z (N, D) is a finite matrix of enough rows and at least two columns."""
    if isinstance(z, Tensor) and z.dim() != 2:
        raise ShapeError(
            f"z must have shape (N, D), a row of D coordinates for each of N samples, got "
            f"{tuple(z.shape)}. Flatten images first; a single coordinate is not enough."
        )
    check_batch(z, "z")
    if z.dtype not in (torch.float32, torch.float64):
        raise DtypeError(
            f"{name} needs float32 or float64, in which regressions can be solved, got {z.dtype}. "
            "Convert with z.float()."
        )
    if z.shape[1] < 2:
        raise ShapeError(
            f"{name} needs at least two dimensions, one that is given and one that is moved, got "
            "D = 1. In one dimension a monotone spline does what couplings cannot."
        )
    if len(z) < least:
        raise OptionError(
            f"{name} needs at least {least} samples, so that each part can judge another, got "
            f"{len(z)}. Draw more."
        )
    advice = "Standardise the columns: of numbers as large, no variance can be taken."
    check_finite(z.square().sum(0), "the sum of squares of z over the samples", advice)

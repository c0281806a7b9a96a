"""Calls of base distributions of normflows, whose signatures and dtypes differ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_event_shape
from ..errors import ShapeError
from .context import context_arguments


def sample_base(
    q0: Any, num_samples: int, context: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Draw n samples (n, *) and their log-densities (n,) from a base, in the dtype of the flows.

    Some bases of normflows compute in float64 whatever the model does.
    """
    z, log_p = q0(num_samples, **context_arguments(q0, context))
    if z.shape[0] != num_samples or log_p.shape != (num_samples,):
        raise ShapeError(
            f"The base {type(q0).__name__} must return {num_samples} samples and log-densities of "
            f"shape ({num_samples},), got {tuple(z.shape)} and {tuple(log_p.shape)}."
        )
    return z.to(dtype), log_p.to(dtype)


def base_log_prob(q0: Any, z: Tensor, context: Tensor | None) -> Tensor:
    """Log-densities (B,) of base variables (B, *), in their dtype."""
    check_event_shape(z, getattr(q0, "shape", None), "the encoded batch, by the base's shape,")
    log_p: Tensor = q0.log_prob(z, **context_arguments(q0, context, "log_prob"))
    if log_p.shape != (z.shape[0],):
        raise ShapeError(
            f"The base {type(q0).__name__} must give log-densities of shape ({len(z)},) for "
            f"latents of shape {tuple(z.shape)}, got {tuple(log_p.shape)}. "
            "Is it of the latent shape?"
        )
    return log_p.to(z.dtype)

"""Calls of the host's base distributions, whose signatures and dtypes differ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_event_shape
from ..errors import ShapeError
from .context import with_context

__all__ = ["base_log_prob", "sample_base"]


def sample_base(
    q0: Any, num_samples: int, context: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Draw from a base distribution, in the dtype of the flows that follow.

    Args:
        q0: Base distribution; some of the host's compute in float64 whatever the model does.
        num_samples: Number of samples n.
        context: Context with n rows, or None.
        dtype: Dtype of the result.

    Returns:
        Samples (n, *) and their log-density (n,) in nats.

    Raises:
        ShapeError: If the base does not return n samples with n log-densities.

    Examples:
        >>> import normflows as nf
        >>> z, log_p = sample_base(nf.distributions.DiagGaussian(2), 3, None, torch.float32)
        >>> z.shape, log_p.shape
        (torch.Size([3, 2]), torch.Size([3]))
    """
    z, log_p = q0(num_samples, **with_context(q0, context))
    if z.shape[0] != num_samples or log_p.shape != (num_samples,):
        raise ShapeError(
            f"The base {type(q0).__name__} must return {num_samples} samples and log-densities of "
            f"shape ({num_samples},), got {tuple(z.shape)} and {tuple(log_p.shape)}."
        )
    return z.to(dtype), log_p.to(dtype)


def base_log_prob(q0: Any, z: Tensor, context: Tensor | None) -> Tensor:
    """Log-density of a base distribution, in the dtype of its argument.

    Args:
        q0: Base distribution.
        z: Base variables (B, *).
        context: Context with B rows, or None.

    Returns:
        Log-density (B,) in nats.

    Raises:
        ShapeError: If the base has another shape, which some bases would silently broadcast.

    Examples:
        >>> import normflows as nf
        >>> q0 = nf.distributions.DiagGaussian(1, trainable=False)
        >>> base_log_prob(q0, torch.zeros(1, 1), None)
        tensor([-0.9189])
    """
    check_event_shape(z, getattr(q0, "shape", None), "the encoded batch, by the base's shape,")
    log_p: Tensor = q0.log_prob(z, **with_context(q0, context, "log_prob"))
    if log_p.shape != (z.shape[0],):
        raise ShapeError(
            f"The base {type(q0).__name__} must give log-densities of shape ({len(z)},) for "
            f"latents of shape {tuple(z.shape)}, got {tuple(log_p.shape)}. "
            "Is it of the latent shape?"
        )
    return log_p.to(z.dtype)

"""Functions of torch written with others, where its own derivatives of derivatives are wrong.

Layer and instance normalisation treat their statistics as constants in the third derivative, and
``cdist`` has no second one. Batch normalisation with fixed statistics, an affine map, shares the
node of the graph with instance normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .normalisation import affine, per_channel
from .transforms import Function

__all__ = ["WRITTEN_OUT", "batch_norm", "cdist", "group_norm", "instance_norm", "layer_norm"]


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """Distances between rows; arguments as in torch, of which the mode is not used.

    Args:
        x1: Points of shape (*, P, M).
        x2: Points of shape (*, R, M).
        p: Order of the norm.
        compute_mode: Not used.

    Returns:
        Distances of shape (*, P, R).

    Examples:
        >>> cdist(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([[5.]])
    """
    differences = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    return torch.linalg.vector_norm(differences, p, dim=-1)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Group normalisation; arguments as in torch.

    Args:
        x: Tensor of shape (B, C, *).
        num_groups: Number of groups of channels.
        weight: Scale of shape (C,), or None.
        bias: Shift of shape (C,), or None.
        eps: Added to the variances.

    Returns:
        Tensor of the shape of ``x``.

    Examples:
        >>> group_norm(torch.tensor([[1.0, 3.0]]), 1, eps=0.0)
        tensor([[-1.,  1.]])
    """
    rows = x.reshape(x.shape[0], num_groups, -1)
    normalised = _normalise(rows, (2,), eps).view_as(x)
    return affine(normalised, per_channel(weight, x), per_channel(bias, x))


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """Layer normalisation; arguments as in torch.

    Args:
        x: Tensor of shape (*, normalized_shape).
        normalized_shape: Trailing dimensions to normalise over.
        weight: Scale of that shape, or None.
        bias: Shift of that shape, or None.
        eps: Added to the variances.
        cudnn_enable: Not used.

    Returns:
        Tensor of the shape of ``x``.

    Examples:
        >>> layer_norm(torch.tensor([[1.0, 3.0]]), (2,), eps=0.0)
        tensor([[-1.,  1.]])
    """
    return affine(_normalise(x, tuple(range(-len(normalized_shape), 0)), eps), weight, bias)


def instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Instance normalisation; arguments as in torch.

    Args:
        x: Tensor of shape (B, C, *).
        running_mean: Mean (C,) that torch updates or uses, or None.
        running_var: Variance (C,) that torch updates or uses, or None.
        weight: Scale of shape (C,), or None.
        bias: Shift of shape (C,), or None.
        use_input_stats: Whether each instance is normalised by its own statistics.
        momentum: Of the update.
        eps: Added to the variances.

    Returns:
        Tensor of the shape of ``x``.

    Examples:
        >>> instance_norm(torch.tensor([[[1.0, 3.0]]]), eps=0.0)
        tensor([[[-1.,  1.]]])
    """
    if running_mean is not None or not use_input_stats:
        return F.instance_norm(
            x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    return group_norm(x, x.shape[1], weight, bias, eps)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation; arguments as in torch.

    Args:
        x: Tensor of shape (B, C, *).
        running_mean: Mean (C,) that torch updates or uses, or None.
        running_var: Variance (C,) that torch updates or uses, or None.
        weight: Scale of shape (C,), or None.
        bias: Shift of shape (C,), or None.
        training: Whether statistics are those of the batch.
        momentum: Of the update.
        eps: Added to the variances.

    Returns:
        Tensor of the shape of ``x``.

    Examples:
        >>> batch_norm(torch.ones(1, 1), torch.zeros(1), torch.ones(1), eps=0.0)
        tensor([[1.]])
    """
    if training or running_mean is None or running_var is None:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    return affine(x, per_channel(scale, x), per_channel(shift, x))


WRITTEN_OUT: dict[Function, Function] = {
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.layer_norm: layer_norm,
    torch.cdist: cdist,
    torch.layer_norm: layer_norm,
}
"""Functions to replace wherever a network calls them, with arguments as in torch."""


def _normalise(x: Tensor, dim: tuple[int, ...], eps: float) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # as torch's own does there
    variance, mean = torch.var_mean(x, dim=dim, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + eps)

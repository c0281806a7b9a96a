"""Functions of torch written with others, where its own derivatives of derivatives are wrong.

Layer and instance normalisation treat their statistics as constants in the third derivative, and
``cdist`` has no second one. Batch normalisation with fixed statistics, an affine map, shares the
node of the graph with instance normalisation. All take the arguments of torch's own functions.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import normalisation
from .normalisation import per_channel, scaled_and_shifted
from .transforms import Function


def _normalise(rows: Tensor, eps: float) -> Tensor:
    if torch.is_autocast_enabled(rows.device.type):
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))  # as torch's own does there
    variance, mean = torch.var_mean(rows, dim=1, correction=0, keepdim=True)
    return (rows - mean) * torch.rsqrt(variance + eps)


group_norm = partial(normalisation.group_norm, normalise=_normalise)
layer_norm = partial(normalisation.layer_norm, normalise=_normalise)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if running_mean is not None or not use_input_stats:
        return F.instance_norm(
            x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    return group_norm(x, x.shape[1], weight, bias, eps)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    return scaled_and_shifted(x, per_channel(scale, x), per_channel(shift, x))


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    differences = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    return torch.linalg.vector_norm(differences, p, dim=-1)


# Functions to replace wherever a network calls them.
WRITTEN_OUT: dict[Function, Function] = {
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: layer_norm,
    torch.cdist: _cdist,
    torch.layer_norm: layer_norm,
}

"""Rounding errors of a model's log-densities, by its copy in another precision."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from ..models.parts import model_dtype
from ..modules.copying import replicate
from ..modules.precision import factored_dtype

Module = TypeVar("Module", bound=nn.Module)


def other_precision(model: nn.Module, device: torch.device) -> torch.dtype | None:
    """The precision to compare a model with: float64, or float32 for a model in float64.

    It is None where the device has no other one.
    """
    own = model_dtype(model.q0, model.flows)  # type: ignore[arg-type]
    other = torch.float32 if own == torch.float64 else factored_dtype(device)
    return None if other == own else other


def in_precision(model: Module, dtype: torch.dtype) -> Module:
    """A copy of a model in evaluation mode whose parameters and buffers are of another dtype."""

    def cast(module: nn.Module, tensor: Tensor) -> Tensor:
        value = tensor.detach()
        value = value.to(dtype) if value.is_floating_point() else value.clone()
        return nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value

    copy: Module = replicate([model], cast, training=False)[id(model)]
    return copy


def rounding_error(value: Tensor, other: Tensor) -> Tensor:
    r"""Rounding errors (B,) of values, from the same ones in another precision.

    .. math:: \lvert \ell - \ell' \rvert \min(1, \epsilon / \epsilon')

    Against float64 it is the error that was made. Errors of first order are proportional to the
    unit roundoff :math:`\epsilon`, so that for values in float64 those of float32 tell the size.
    """
    own, others = (torch.finfo(v.dtype).eps for v in (value, other))
    difference = (value.double() - other.double()).abs() * min(1.0, own / others)
    # Where both are the same infinity, nothing was lost.
    return difference.masked_fill(value.double() == other.double(), 0.0).to(value.dtype)

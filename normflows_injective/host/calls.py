"""Calls of layers of normflows, one by one and in rows whose log-dets add."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import normflows as nf
import torch
from torch import Tensor, nn

from ..errors import ShapeError
from .context import context_arguments
from .first_data import awaits_first_data

Flows = Sequence[nf.flows.Flow] | nn.ModuleList


class OneWayLayerError(NotImplementedError):
    """A layer that lacks the direction in which it was called."""

    def __init__(self, layer: nf.flows.Flow, reason: str) -> None:
        super().__init__(reason)
        self.layer = layer


def summed_forward(
    flows: Flows, z: Tensor, context: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Send latents (B, *) through bijective flows, with the sum (B,) of their log-dets.

    The sums of normflows are float32 even in double models, and not every flow returns a (B,)
    tensor.
    """
    z, log_det = z.clone(), z.new_zeros(z.shape[0])
    for flow in flows:
        z, flow_log_det = call_layer(flow, "forward", z, context)
        log_det = log_det + _one_each(flow_log_det, log_det, flow)
    return z, log_det


def summed_inverse(
    flows: Flows,
    z: Tensor,
    context: Tensor | None = None,
    method_of: Callable[[nf.flows.Flow], str] = lambda flow: "inverse",
) -> tuple[Tensor, Tensor]:
    """Send latents (B, *) back through bijective flows, with the sum (B,) of their log-dets.

    ``method_of`` names the method of a layer that does it.
    """
    z, log_det = z.clone(), z.new_zeros(z.shape[0])
    for flow in reversed(list(flows)):
        z, flow_log_det = call_layer(flow, method_of(flow), z, context)
        log_det = log_det + _one_each(flow_log_det, log_det, flow)
    return z, log_det


def call_layer(flow: nf.flows.Flow, method: str, value: Tensor, context: Tensor | None) -> Any:
    """Image of a batch under one direction of a layer, with the log-det."""
    if type(flow) is nf.flows.ActNorm and _is_initialised(flow):
        # Its own methods read its flag at every call, which waits for a GPU, and then do this.
        return getattr(nf.flows.AffineConstFlow, method)(flow, value)
    options = context_arguments(flow, context, method)
    try:
        # The call of the module itself, for the sake of its hooks.
        return (flow if method == "forward" else getattr(flow, method))(value, **options)
    except NotImplementedError as error:
        raise OneWayLayerError(flow, str(error)) from error


def _is_initialised(flow: nf.flows.Flow) -> bool:
    hooked = flow._forward_hooks or flow._forward_pre_hooks
    return not (hooked or torch.compiler.is_compiling() or awaits_first_data(flow))


def _one_each(flow_log_det: Any, log_det: Tensor, flow: nf.flows.Flow) -> Tensor:
    """A flow's log-det, which may be a number, as a tensor of shape () or (B,)."""
    # Not by as_tensor alone: a tracer would take a tensor that passes it for a constant.
    is_tensor = isinstance(flow_log_det, Tensor)
    value = (flow_log_det if is_tensor else torch.as_tensor(flow_log_det)).to(log_det)
    if value.dim() > 0 and value.shape != log_det.shape:
        raise ShapeError(
            f"{type(flow).__name__} must return a log_det of shape {tuple(log_det.shape)}, one "
            f"per sample, got {tuple(value.shape)}."
        )
    return value

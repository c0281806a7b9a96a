"""Layers of normflows as one map, with the log-det that belongs to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import normflows as nf
import torch
from torch import Tensor, nn

from ..checks import describe
from ..errors import OptionError, ShapeError, UnsupportedModelError
from ..host.calls import OneWayLayerError
from ..host.copies import on_trial
from ..host.first_data import refuse_single_sample
from ..host.first_meeting import meet_first_data
from ..host.refusals import refuse_stochastic
from ..modules.random_numbers import OwnRandomNumbers
from ..volume.reconstruction import squared_error
from .free_form import FreeFormInjection
from .shapes import Reshape
from .stack import Stack, split
from .stacking import check_composite
from .surfaces.surface import is_closed_form


class LayerStack(nn.Module):
    """A stack as a module that meets first data, and knows the shapes of its ends.

    Layers without an inverse are allowed: they can draw, but not score given values.
    """

    def __init__(self, flows: nf.flows.Flow | Iterable[nf.flows.Flow]) -> None:
        super().__init__()
        self._shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.flows = nn.ModuleList(_listed(flows))
        for flow in self.flows:
            refuse_stochastic(flow)
        self.num_latent = len(self.parts.latent_block)
        if self.raises_dimension:
            check_composite(self.composite)

    @property
    def parts(self) -> Stack:
        """The layers as a stack."""
        return split(self.flows)

    @property
    def composite(self) -> Sequence[nf.flows.Flow]:
        """The layers from the first injection on."""
        return self.parts.composite

    @property
    def raises_dimension(self) -> bool:
        """Whether there is an injection."""
        return self.num_latent < len(self.flows)

    @property
    def is_learned(self) -> bool:
        """Whether the manifold is one that only an encoder knows."""
        modules = (module for flow in self.composite for module in flow.modules())
        return any(isinstance(module, FreeFormInjection) for module in modules)

    @property
    def is_closed_form(self) -> bool:
        """Whether log-volumes need no Jacobian."""
        return not self.raises_dimension or is_closed_form(self.composite)

    def push(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Send latents (B, *) to the data, with the log-volume (B,) in nats."""
        refuse_single_sample(self.modules(), z)
        return self.after_samples(z, context).parts.push(z, context)

    def pull(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Send data (B, *) to the latents, with the log-volume (B,) that push gives there."""
        refuse_single_sample(self.modules(), x)
        return self.after_data(x, context)._pull(x, context)

    def project(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Send data (B, *) to the points of the image that their coordinates lead to."""
        return self.after_data(x, context).parts.project(x, context)

    def after_samples(self, z: Tensor, context: Tensor | None) -> LayerStack:
        """As after_data, for latents (B, *) that were drawn."""

        def first(stack: LayerStack) -> Tensor:
            x, log_volume = stack.parts.push(z, context)
            return x.flatten(1).sum(1) + log_volume

        return meet_first_data(self, first, on_samples=True)

    def after_data(self, x: Tensor, context: Tensor | None) -> LayerStack:
        """The layers, having met data (B, *) if they had yet to, or a copy if that went wrong."""

        def first(stack: LayerStack) -> Tensor:
            z, log_volume = stack._pull(x, context)
            return squared_error(x, stack.parts.decode_base(z, context)) + log_volume

        return meet_first_data(self, first)

    def shape_of_data(self, shape: Iterable[int], event_dim: int) -> torch.Size:
        """Shape (*batch, *event') of data for latents (*batch, *event)."""
        batch, event = _split_shape(shape, event_dim)
        return torch.Size((*batch, *self._data_shape(event)))

    def shape_of_latents(self, shape: Iterable[int], event_dim: int) -> torch.Size:
        """Shape (*batch, *event) of latents for data (*batch, *event')."""
        batch, event = _split_shape(shape, event_dim)
        if self.raises_dimension:
            latent = self._latent_shape
            data = self._data_shape(latent)
            if data != event:
                raise ShapeError(f"The layers lead to events of shape {data}, got {event}.")
            return torch.Size((*batch, *latent))
        if not self._reshapes:
            return torch.Size((*batch, *event))
        return torch.Size((*batch, *self._tried(LayerStack.pull, event)))

    def _data_shape(self, event: tuple[int, ...]) -> tuple[int, ...]:
        if not self.raises_dimension and not self._reshapes:
            return event
        # Distributions ask at every call; layers do not change their shapes.
        if event not in self._shapes:
            self._shapes[event] = self._tried(LayerStack.push, event)
        return self._shapes[event]

    @cached_property
    def _latent_shape(self) -> tuple[int, ...]:
        first = self.composite[0]
        declared = getattr(first, "latent_shape", None)
        if declared is None:
            raise ShapeError(
                f"{type(first).__name__} does not declare its latent_shape, so the shape of its "
                "latents is not known. Set the attribute latent_shape."
            )
        return self._tried(LayerStack._pull_latents, tuple(declared))

    def _tried(self, method: Callable[..., Any], event: tuple[int, ...]) -> tuple[int, ...]:
        """Event shape that a method makes of another, found out by a copy of the layers."""
        with torch.no_grad(), OwnRandomNumbers():
            value, _ = method(on_trial([self])[0], self._probe(event), None)
        return tuple(value.shape[1:])

    @cached_property
    def _reshapes(self) -> bool:
        changing = (Reshape, nf.flows.Squeeze)
        return any(isinstance(module, changing) for module in self.modules())

    def _probe(self, event: tuple[int, ...]) -> Tensor:
        like = next(self.parameters(), torch.empty(0))
        return torch.randn(2, *event, dtype=like.dtype, device=like.device)

    def _pull(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        with _naming_one_way_layers():
            return self.parts.pull(x, context)

    def _pull_latents(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        with _naming_one_way_layers():
            return self.parts.to_base(z, z.new_zeros(z.shape[0]), context)


@contextmanager
def _naming_one_way_layers() -> Iterator[None]:
    try:
        yield
    except OneWayLayerError as error:
        raise UnsupportedModelError(
            f"{type(error.layer).__name__} has no inverse, so only values that were just drawn "
            "through it have a density: it serves in a guide, not as a likelihood or prior of "
            "given values. Use an invertible layer such as nf.flows.AffineCouplingBlock."
        ) from error


def flatten_events(
    function: Callable[..., tuple[Tensor, Tensor]], value: Tensor, event_dim: int
) -> tuple[Tensor, Tensor]:
    """Apply a map of batches (B, *event), without a context, to a tensor of any batch shape.

    The map gives (B, *event') and (B,), and the results have shapes (*batch, *event') and
    (*batch).
    """
    if value.dim() < event_dim:
        raise ShapeError(
            f"Values need at least {event_dim} dimensions, got shape {tuple(value.shape)}. Add "
            "those of an event, or lower event_dim."
        )
    batch_shape = value.shape[: value.dim() - event_dim]
    event_shape = value.shape[value.dim() - event_dim :]
    mapped, log_det = function(value.reshape(-1, *event_shape), None)
    return mapped.view(*batch_shape, *mapped.shape[1:]), log_det.view(batch_shape)


def _split_shape(shape: Iterable[int], event_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape = tuple(shape)
    if len(shape) < event_dim:
        raise ShapeError(f"Values need at least {event_dim} dimensions, got shape {shape}.")
    return shape[: len(shape) - event_dim], shape[len(shape) - event_dim :]


def _listed(flows: Any) -> Sequence[nf.flows.Flow]:
    listed = [flows] if isinstance(flows, nf.flows.Flow) else flows
    if not isinstance(listed, Iterable) or isinstance(listed, str | bytes | Tensor):
        raise OptionError(
            f"flows must be a layer of normflows or a list of them, got {describe(flows)}. "
            "A whole model goes into FlowDistribution."
        )
    listed = list(listed)
    wrong = [type(flow).__name__ for flow in listed if not isinstance(flow, nf.flows.Flow)]
    if wrong or not listed:
        raise OptionError(
            "flows must hold layers of normflows or nfi.flows, at least one, got "
            f"{', '.join(wrong) or 'none'}."
        )
    # The container of normflows adds log-dets in float32.
    while any(type(flow) is nf.flows.Composite for flow in listed):
        parts = [f._flows if type(f) is nf.flows.Composite else [f] for f in listed]
        listed = [flow for part in parts for flow in part]
    return listed

r"""A stack of layers, split at its first injection.

After an injection log-dets do not add: for :math:`G = a \circ g` the volume is
:math:`\tfrac12 \log\det(g'^\top a'^\top a' g')`, and a uniform scaling :math:`a(x) = c x` adds
:math:`d \log c` to it, not :math:`D \log c`. So everything from the first injection to the data is
differentiated as one map.

The last layers of that map may be units, :class:`Standardise`. A training term looks at the inner
stack, without them, in standardised coordinates; densities are those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import normflows as nf
from torch import Tensor, nn

from ..host.calls import Flows, call_layer, summed_forward, summed_inverse
from ..volume.log_volumes import DecodedVolume, decode_and_log_volume
from .injection import Injection
from .layer import LayerWithLoss
from .standardise.layer import Standardise
from .surfaces.surface import SurfaceMap, is_closed_form

# Layers that can be called without their log-det.
_WITHOUT_LOG_DET = (Injection, SurfaceMap, LayerWithLoss)


def joint_decode(flows: Flows, z: Tensor, context: Tensor | None = None) -> Tensor:
    """Send latents (B, *) through flows from the first to the last, without log-dets."""
    for flow in flows:
        if isinstance(flow, _WITHOUT_LOG_DET):
            z = flow.decode(z, context=context)
        else:
            z, _ = call_layer(flow, "forward", z, context)
    return z


def joint_encode(flows: Flows, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Send data (B, *) through flows from the last to the first, without log-dets."""
    for flow in reversed(list(flows)):
        if isinstance(flow, _WITHOUT_LOG_DET):
            x = flow.encode(x, context=context)
        else:
            x, _ = call_layer(flow, "inverse", x, context)
    return x


def joint_decode_and_log_volume(
    flows: Flows, z: Tensor, context: Tensor | None = None
) -> DecodedVolume:
    """Send latents through flows, with the joint log-volume (B,) of the whole map.

    It is a sum for charts of known surfaces, and else by the Jacobian of the whole map.
    """
    if is_closed_form(flows):
        return DecodedVolume(*summed_forward(flows, z, context))
    if len(flows) == 1 and isinstance(flows[0], Injection):
        return flows[0].decode_and_log_volume(z, context=context)
    return decode_and_log_volume(partial(joint_decode, flows), z, context=context)


def joint_encode_and_log_volume(
    flows: Flows, x: Tensor, context: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Send data through flows to latents (B, *), with the joint log-volume (B,) there."""
    if is_closed_form(flows):
        z, log_det = summed_inverse(flows, x, context)
        return z, -log_det
    z = joint_encode(flows, x, context)
    return z, joint_decode_and_log_volume(flows, z, context)[1]


def training_inverse(
    flows: Flows, x: Tensor, context: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Send coordinates (B, *) back through a latent block, with the sum (B,) of its log-dets.

    Layers with a loss of their own give minus that loss in place of a log-det.
    """
    return summed_inverse(flows, x, context, _training_method)


def _training_method(flow: nf.flows.Flow) -> str:
    return "training_inverse" if isinstance(flow, LayerWithLoss) else "inverse"


class Passes(NamedTuple):
    """Encoding :math:`F`, decoding :math:`G`, and :math:`G` with its log-volume (B,) in nats."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    decode_and_log_volume: Callable[[Tensor], DecodedVolume]


class Projection(NamedTuple):
    """Base variables (B, *), reconstructions (B, *), and log-volumes (B,) of the whole map."""

    z: Tensor
    x: Tensor
    log_volume: Tensor


class Stack(NamedTuple):
    """Layers before the first injection, whose log-dets add, and the composite from it on.

    Methods copy their argument, because some layers of normflows shift it in place.
    """

    latent_block: Sequence[nf.flows.Flow]
    composite: Sequence[nf.flows.Flow]

    @property
    def inner(self) -> Stack:
        """The layers without the units that stand last."""
        return Stack(self.latent_block, without_units(self.composite)[0])

    def standardise(self, x: Tensor) -> Tensor:
        """Data (B, *) in the coordinates of the inner stack, the same tensor without units."""
        return joint_encode(without_units(self.composite)[1], x)

    @property
    def all(self) -> Sequence[nf.flows.Flow]:
        """Every layer, from latent to data."""
        return [*self.latent_block, *self.composite]

    def encode(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Send data (B, *) to the coordinates (B, *) from which the composite leads."""
        return joint_encode(self.composite, x.clone(), context)

    def decode(self, z: Tensor, context: Tensor | None) -> Tensor:
        """Send coordinates (B, *) to the data (B, *)."""
        return joint_decode(self.composite, z.clone(), context)

    def decode_base(self, z: Tensor, context: Tensor | None) -> Tensor:
        """Send base variables (B, *) to the data (B, *)."""
        return joint_decode(self.all, z.clone(), context)

    def encode_to_base(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Send data (B, *) to base variables (B, *)."""
        return joint_encode(self.all, x.clone(), context)

    def project(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Send data (B, *) to the points of the manifold that their coordinates lead to."""
        return joint_decode(self.composite, self.encode(x, context), context)

    def push(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Send base variables (B, *) to the data, with the log-volume (B,) of the whole map."""
        z, log_det = summed_forward(self.latent_block, z, context)
        if not self.composite:
            return z, log_det
        x, log_volume = joint_decode_and_log_volume(self.composite, z, context)
        return x, log_det + log_volume

    def pull(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Send data (B, *) to base variables, with the log-volume (B,) that push gives there."""
        log_volume = x.new_zeros(x.shape[0])
        if self.composite:
            x, log_volume = joint_encode_and_log_volume(self.composite, x.clone(), context)
        return self.to_base(x, log_volume, context)

    def project_with_log_volume(self, x: Tensor, context: Tensor | None) -> Projection:
        """Project data (B, *), with base variables and the log-volume there."""
        z = self.encode(x, context)
        reconstruction, log_volume = joint_decode_and_log_volume(self.composite, z, context)
        z, log_volume = self.to_base(z, log_volume, context)
        return Projection(z, reconstruction, log_volume)

    def to_base(
        self, z: Tensor, log_volume: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Send coordinates on through the latent block, and extend their log-volumes (B,)."""
        z, log_det = summed_inverse(self.latent_block, z, context)
        return z, log_volume - log_det


def split(flows: Iterable[nf.flows.Flow]) -> Stack:
    """Layers as a stack, whose composite is empty if there is no injection."""
    layers = list(flows)
    first = next((i for i, flow in enumerate(layers) if isinstance(flow, Injection)), len(layers))
    return Stack(layers[:first], layers[first:])


def without_units(
    composite: Sequence[nf.flows.Flow] | nn.ModuleList,
) -> tuple[Sequence[nf.flows.Flow], Sequence[nf.flows.Flow]]:
    """A composite without the layers of units that stand last, and these layers."""
    layers = list(composite)
    end = len(layers)
    while end and isinstance(layers[end - 1], Standardise):
        end -= 1
    return layers[:end], layers[end:]

r"""One map from an injection to the data, with one log-volume.

Behind an injection log-dets do not add: for :math:`G = a \circ g` the volume is
:math:`\tfrac12 \log\det(g'^\top a'^\top a' g')`, and a uniform scaling :math:`a(x) = c x` adds
:math:`d \log c` to it, not :math:`D \log c`. So everything from the first injection to the data is
differentiated as one map.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..host.calls import Flows, call_layer, summed_forward, summed_inverse
from ..volume.log_volumes import DecodedVolume, decode_and_log_volume
from .injection import Injection
from .surfaces.surface import SurfaceMap, is_exact

__all__ = [
    "joint_decode",
    "joint_decode_and_log_volume",
    "joint_encode",
    "joint_encode_and_log_volume",
]


def joint_decode(flows: Flows, z: Tensor, context: Tensor | None = None) -> Tensor:
    """Send latents (B, *) through flows from the first to the last, without log-dets."""
    for flow in flows:
        if isinstance(flow, (Injection, SurfaceMap)):
            z = flow.decode(z, context=context)
        else:
            z, _ = call_layer(flow, "forward", z, context)
    return z


def joint_encode(flows: Flows, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Send data (B, *) through flows from the last to the first, without log-dets."""
    for flow in reversed(list(flows)):
        if isinstance(flow, (Injection, SurfaceMap)):
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
    if is_exact(flows):
        return DecodedVolume(*summed_forward(flows, z, context))
    if len(flows) == 1 and isinstance(flows[0], Injection):
        return flows[0].decode_and_log_volume(z, context=context)
    return decode_and_log_volume(partial(joint_decode, flows), z, context=context)


def joint_encode_and_log_volume(
    flows: Flows, x: Tensor, context: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Send data through flows to latents (B, *), with the joint log-volume (B,) there."""
    if is_exact(flows):
        z, log_det = summed_inverse(flows, x, context)
        return z, -log_det
    z = joint_encode(flows, x, context)
    return z, joint_decode_and_log_volume(flows, z, context).log_volume

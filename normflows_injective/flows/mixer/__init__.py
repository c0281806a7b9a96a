"""MixerFlow: images as tables of patches, mixed within and across them."""

from .builder import mixer_flow
from .mixing import ChannelMixing, Mixing, PatchMixing
from .patches import Patchify
from .pixels import bits_per_dim, dequantise
from .shift import PatchShift

__all__ = [
    "ChannelMixing",
    "Mixing",
    "PatchMixing",
    "PatchShift",
    "Patchify",
    "bits_per_dim",
    "dequantise",
    "mixer_flow",
]


def __dir__() -> list[str]:
    """The public names, for completion."""
    return list(__all__)

"""Layers that keep volumes, and two that lift the limits of flows made of them."""

from .couplings import GINCoupling, NICECoupling
from .global_scale import GlobalScale
from .radial_flow import RadialFlow1D
from .rotation import Rotation, random_rotation

__all__ = [
    "GINCoupling",
    "GlobalScale",
    "NICECoupling",
    "RadialFlow1D",
    "Rotation",
    "random_rotation",
]


def __dir__() -> list[str]:
    """The public names, for completion."""
    return list(__all__)

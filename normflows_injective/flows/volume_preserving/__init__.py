"""Layers that keep volumes, and the two that repair what such flows cannot do."""

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

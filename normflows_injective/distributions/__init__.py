"""Base distributions."""

from normflows.distributions import DiagGaussian

from .pullback import Pullback
from .spherical import AngularCentralGaussian, UniformSphere
from .uniform_on_surface import UniformOnSurface
from .von_mises_fisher import VonMisesFisher

__all__ = [
    "AngularCentralGaussian",
    "DiagGaussian",
    "Pullback",
    "UniformOnSurface",
    "UniformSphere",
    "VonMisesFisher",
]


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)

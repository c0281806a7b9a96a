"""Base distributions."""

from normflows.distributions import DiagGaussian

from .product import ProductLaw
from .pullback import Pullback
from .spherical import AngularCentralGaussian, UniformSphere
from .uniform_on_surface import UniformOnSurface
from .uniform_torus import UniformTorus
from .von_mises_fisher import VonMisesFisher

__all__ = [
    "AngularCentralGaussian",
    "DiagGaussian",
    "ProductLaw",
    "Pullback",
    "UniformOnSurface",
    "UniformSphere",
    "UniformTorus",
    "VonMisesFisher",
]


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)

"""Base distributions."""

from normflows.distributions import DiagGaussian

from .power_spherical import PowerSpherical
from .product import ProductLaw
from .pullback import Pullback
from .spherical import AngularCentralGaussian, UniformSphere
from .torus import UniformTorus
from .uniform_on_surface import UniformOnSurface
from .von_mises import VonMises
from .von_mises_fisher import VonMisesFisher
from .wrapped_normal import WrappedNormal

__all__ = [
    "AngularCentralGaussian",
    "DiagGaussian",
    "PowerSpherical",
    "ProductLaw",
    "Pullback",
    "UniformOnSurface",
    "UniformSphere",
    "UniformTorus",
    "VonMises",
    "VonMisesFisher",
    "WrappedNormal",
]


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)

"""Base distributions."""

from normflows.distributions import DiagGaussian

from .isotropic_rotation import IsotropicGaussianRotation
from .matrix_fisher import MatrixFisher
from .power_spherical import PowerSpherical
from .product import ProductLaw
from .pullback import Pullback
from .spherical import AngularCentralGaussian, UniformSphere
from .torus import UniformTorus
from .uniform_on_surface import UniformOnSurface
from .uniform_rotation import UniformRotation
from .von_mises import VonMises
from .von_mises_fisher import VonMisesFisher
from .wrapped_normal import WrappedNormal

__all__ = [
    "AngularCentralGaussian",
    "DiagGaussian",
    "IsotropicGaussianRotation",
    "MatrixFisher",
    "PowerSpherical",
    "ProductLaw",
    "Pullback",
    "UniformOnSurface",
    "UniformRotation",
    "UniformSphere",
    "UniformTorus",
    "VonMises",
    "VonMisesFisher",
    "WrappedNormal",
]


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)

"""Base distributions."""

from normflows.distributions import DiagGaussian

from .isotropic_rotation import IsotropicGaussianRotation
from .matrix_fisher import MatrixFisher
from .pullback import Pullback
from .spherical import AngularCentralGaussian, UniformSphere
from .uniform_on_surface import UniformOnSurface
from .uniform_rotation import UniformRotation
from .von_mises_fisher import VonMisesFisher

__all__ = [
    "AngularCentralGaussian",
    "DiagGaussian",
    "IsotropicGaussianRotation",
    "MatrixFisher",
    "Pullback",
    "UniformOnSurface",
    "UniformRotation",
    "UniformSphere",
    "VonMisesFisher",
]


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)

"""Layers of vectors: couplings, autoregressive layers, normalisation and linear maps."""

from .act_norm import ActNorm
from .autoregressive import Autoregressive
from .circular import MobiusMixture
from .coupling import Coupling, NetworkCoupling
from .linear import Householder, LULinear, Permutation
from .transforms import Additive, Affine, CentredAffine, ElementTransform, Spline

__all__ = [
    "ActNorm",
    "Additive",
    "Affine",
    "Autoregressive",
    "CentredAffine",
    "Coupling",
    "ElementTransform",
    "Householder",
    "LULinear",
    "MobiusMixture",
    "NetworkCoupling",
    "Permutation",
    "Spline",
]


def __dir__() -> list[str]:
    """The public names, for completion."""
    return list(__all__)

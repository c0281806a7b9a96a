"""Couplings, autoregressive layers and what stands between them, for vectors."""

from .act_norm import ActNorm
from .autoregressive import Autoregressive
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
    "NetworkCoupling",
    "Permutation",
    "Spline",
]

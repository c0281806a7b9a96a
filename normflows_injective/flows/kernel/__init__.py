"""Couplings whose conditioners are kernel expansions at auxiliary points."""

from .builders import ferumal_glow, ferumal_realnvp
from .coupling import KernelCoupling, rkhs_penalty
from .expansion import KernelExpansion

__all__ = [
    "KernelCoupling",
    "KernelExpansion",
    "ferumal_glow",
    "ferumal_realnvp",
    "rkhs_penalty",
]


def __dir__() -> list[str]:
    """The public names, for completion."""
    return list(__all__)

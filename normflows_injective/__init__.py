"""Injective normalizing flows for data on a manifold, as components of normflows.

Imported as ``import normflows_injective as nfi``.
"""

from . import diagnostics, distributions, errors, flows, nets, volume
from ._version import __version__
from .assignment import AssignmentFlow
from .core import InjectiveNormalizingFlow
from .exact_likelihood import ExactLikelihood
from .likelihoods import LossTerms, SurrogateLikelihood, SurrogateTerms
from .losses import ForwardKLD
from .registration import register

__all__ = [
    "AssignmentFlow",
    "ExactLikelihood",
    "ForwardKLD",
    "InjectiveNormalizingFlow",
    "LossTerms",
    "SurrogateLikelihood",
    "SurrogateTerms",
    "__version__",
    "diagnostics",
    "distributions",
    "errors",
    "flows",
    "nets",
    "register",
    "volume",
]

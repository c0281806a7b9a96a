"""Injective normalizing flows for data on a manifold, as components of normflows.

Imported as ``import normflows_injective as nfi``. Components for Pyro are in ``nfi.pyro``, which
is loaded when it is first asked for.
"""

from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from types import ModuleType as _ModuleType

from . import diagnostics, distributions, errors, flows, nets, points, training, volume
from ._version import __version__
from .diagnostics.scores import score
from .models.assignment import AssignmentFlow
from .models.assignment_likelihood import DiscreteLogProb
from .models.exact_likelihood import ExactLikelihood
from .models.injective import InjectiveNormalizingFlow
from .models.loss_module import ForwardKLD
from .models.loss_terms import LossTerms, SurrogateTerms
from .models.surrogate_likelihood import SurrogateLikelihood
from .models.training_term import TrainingTerm
from .registration import register
from .training.builder import injective_flow

__all__ = [
    "AssignmentFlow",
    "DiscreteLogProb",
    "ExactLikelihood",
    "ForwardKLD",
    "InjectiveNormalizingFlow",
    "LossTerms",
    "SurrogateLikelihood",
    "SurrogateTerms",
    "TrainingTerm",
    "__version__",
    "diagnostics",
    "distributions",
    "errors",
    "flows",
    "injective_flow",
    "nets",
    "points",
    "register",
    "score",
    "training",
    "volume",
]


def __getattr__(name: str) -> _ModuleType:
    """The components for Pyro and for tests, which importing this package does not load."""
    if name in ("pyro", "testing"):
        return _import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The names that editors complete: public ones, with ``pyro`` where it is installed."""
    return sorted({*__all__, "testing"} | ({"pyro"} if _find_spec("pyro") else set()))

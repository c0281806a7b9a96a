"""Training that needs no tuning, and its state in files."""

from .averages import AveragedWeights
from .builder import injective_flow
from .fitting import fit
from .result import Check, PhaseResult, TrainingResult
from .state import load_state, save_state

__all__ = [
    "AveragedWeights",
    "Check",
    "PhaseResult",
    "TrainingResult",
    "fit",
    "injective_flow",
    "load_state",
    "save_state",
]


def __dir__() -> list[str]:
    """The public names, for completion."""
    return list(__all__)

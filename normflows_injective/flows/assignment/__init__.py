"""Generative assignment flows: joint distributions of discrete variables, by flows of logits."""

from .field import AssignmentField
from .horizon import HorizonChoice, choose_horizon, rounding_error
from .layer import AssignmentLayer
from .lift import SimplexLift
from .parametrisation import Classifier, Velocity
from .paths import AssignmentPath, FiniteHorizon, Horizon, InfiniteHorizon
from .simplices import Simplices

__all__ = [
    "AssignmentField",
    "AssignmentLayer",
    "AssignmentPath",
    "Classifier",
    "FiniteHorizon",
    "Horizon",
    "HorizonChoice",
    "InfiniteHorizon",
    "SimplexLift",
    "Simplices",
    "Velocity",
    "choose_horizon",
    "rounding_error",
]


def __dir__() -> list[str]:
    return sorted(__all__)

"""Measurements on trained models."""

from ..layerwise.regression import MomentRegression
from ..layerwise.trainer import LayerwiseTrainer
from .distances import frechet_distance
from .floors import volume_preserving_floor, volume_preserving_floor_on_box
from .gaps import CouplingGap, coupling_gap
from .injectivity import InjectivityReport, injectivity_report

__all__ = [
    "CouplingGap",
    "InjectivityReport",
    "LayerwiseTrainer",
    "MomentRegression",
    "coupling_gap",
    "frechet_distance",
    "injectivity_report",
    "volume_preserving_floor",
    "volume_preserving_floor_on_box",
]

"""Measurements on trained models."""

from .conditional_moments import MomentRegression
from .coupling_gap import CouplingGap, coupling_gap
from .distances import frechet_distance
from .injectivity import InjectivityReport, injectivity_report
from .layerwise import LayerwiseTrainer
from .volume_preserving_floor import volume_preserving_floor, volume_preserving_floor_on_box

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

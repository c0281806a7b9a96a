"""Measurements on data and trained models, and flows built from such measurements."""

from ..layerwise.block import MomentBlock
from ..layerwise.regression import MomentRegression
from ..layerwise.trainer import LayerwiseFit, LayerwiseHistory, LayerwiseTrainer
from .columns import ColumnReport, column_report
from .dimension.report import LatentDimReport
from .dimension.suggestion import suggest_latent_dim
from .distances import frechet_distance
from .floors import VolumePreservingFloor, volume_preserving_floor, volume_preserving_floor_on_box
from .gaps import CouplingGap, coupling_gap
from .gradient_agreement import GradientBias, SurrogateBias
from .injectivity import InjectivityReport, injectivity_report
from .verdict import Finding

__all__ = [
    "ColumnReport",
    "CouplingGap",
    "Finding",
    "GradientBias",
    "InjectivityReport",
    "LatentDimReport",
    "LayerwiseFit",
    "LayerwiseHistory",
    "LayerwiseTrainer",
    "MomentBlock",
    "MomentRegression",
    "SurrogateBias",
    "VolumePreservingFloor",
    "column_report",
    "coupling_gap",
    "frechet_distance",
    "injectivity_report",
    "suggest_latent_dim",
    "volume_preserving_floor",
    "volume_preserving_floor_on_box",
]


def __dir__() -> list[str]:
    """The public names, for completion."""
    return list(__all__)

"""Measurements on trained models."""

from .distances import frechet_distance
from .injectivity import InjectivityReport, injectivity_report

__all__ = ["InjectivityReport", "frechet_distance", "injectivity_report"]

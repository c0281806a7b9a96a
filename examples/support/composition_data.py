"""Compositions of three parts, from a file of Aitchison's data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .composition_baselines import Array
from .files import find

__all__ = ["Table", "log_depth", "read_tables"]


class Table(NamedTuple):
    """Compositions (N, 3) and covariates (N, C)."""

    title: str
    names: tuple[str, str, str]
    parts: Array
    covariates: Array


def read_tables(folder: Path | None) -> list[Table]:
    """ArcticLake, SkyeAFM, and ArcticLake with the logarithm of the depth, in metres."""
    path = find(folder, "compositions_aitchison.npz")
    with np.load(path, allow_pickle=False) as arrays:
        lake, lavas = (arrays[name].astype(np.float64) for name in ("ArcticLake", "SkyeAFM"))
    soil, oxides = ("sand", "silt", "clay"), ("alkali", "iron", "magnesium")
    sediments, lavas = lake[:, :3], lavas / lavas.sum(1, keepdims=True)
    sediments = sediments / sediments.sum(1, keepdims=True)
    return [
        Table("ArcticLake", soil, sediments, np.zeros((len(lake), 0))),
        Table("SkyeAFM", oxides, lavas, np.zeros((len(lavas), 0))),
        Table("ArcticLake given depth", soil, sediments, log_depth(lake[:, 3:])),
    ]


def log_depth(depth: Array) -> Array:
    """The covariate of depths, of order one over the table's 10 to 104 m."""
    return (np.log(depth) - math.log(40.0)) / 0.7

"""The figure of ``compositions.py``: compositions in a triangle, and regions of most density."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .composition_baselines import Array, Fit
from .composition_data import Table, log_depth

__all__ = ["draw"]

DEPTHS = {12.0: "#e66101", 30.0: "#1b9e77", 90.0: "#5e3c99"}
_HEIGHT = math.sqrt(3) / 2


def draw(tables: list[Table], fits: dict[str, Fit], file: Path, number: int) -> float:
    """One row for each table, one column for each model; returns the worst error of a mass."""
    figure, axes = plt.subplots(
        len(tables), len(fits), figsize=(13, 9.6), layout="constrained", squeeze=False
    )
    grid, worst = lattice(number), 0.0
    for row, table in zip(axes, tables, strict=True):
        for axis, (name, fit) in zip(row, fits.items(), strict=True):
            torch.manual_seed(0)
            log_density = fit(table.parts, table.covariates)
            corners(axis, table.names)
            for covariate, masses, colour, filled in _layers(table):
                at = np.full((len(grid), table.covariates.shape[1]), covariate)
                mass = regions(axis, grid, log_density(grid, at), masses, colour, filled)
                worst = max(worst, abs(mass - 1))
            scatter(axis, table.parts, s=11, linewidths=0, **_colours(table))
            axis.set_title(name if table is tables[0] else "", fontsize=12)
        row[0].text(-0.16, 0.4, table.title, rotation=90, va="center", fontsize=12)
    lines = [Line2D([], [], color=c, label=f"{d:g} m: 90 % region") for d, c in DEPTHS.items()]
    axes[-1, -1].legend(handles=lines, loc="upper right", fontsize=8, frameon=False)
    figure.suptitle(
        "Above: smallest regions with 50 %, 90 % and 99 % of the fitted mass. "
        "Below: 90 % regions at three depths, data coloured by depth.",
        fontsize=11,
    )
    figure.savefig(file, dpi=90)
    plt.close(figure)
    return worst


def _layers(table: Table) -> Iterable[tuple[float, tuple[float, ...], str, bool]]:
    if table.covariates.shape[1] == 0:
        return [(0.0, (0.99, 0.9, 0.5), "#1f4e9c", True)]
    return [
        (float(log_depth(np.array(depth))), (0.9,), colour, False)
        for depth, colour in DEPTHS.items()
    ]


def _colours(table: Table) -> dict[str, object]:
    if table.covariates.shape[1] == 0:
        return {"color": "k"}
    places = [float(log_depth(np.array(depth))) for depth in DEPTHS]
    nearest = np.abs(table.covariates - places).argmin(1)
    return {"color": [list(DEPTHS.values())[k] for k in nearest]}


def lattice(number: int) -> Array:
    """Inner points (N, 3) of the simplex, each the centre of a cell of the same area."""
    i, j = np.meshgrid(np.arange(number), np.arange(number), indexing="ij")
    upward = np.stack([i, j], axis=-1)[i + j < number] + 1 / 3
    downward = np.stack([i, j], axis=-1)[i + j < number - 1] + 2 / 3
    first = np.concatenate([upward, downward]) / number
    return np.concatenate([first, 1 - first.sum(1, keepdims=True)], axis=1)


def plane(parts: Array) -> tuple[Array, Array]:
    """Places in the plane: the first part is all on top, the second left, the third right."""
    return parts[:, 2] + 0.5 * parts[:, 0], _HEIGHT * parts[:, 0]


def corners(axis: Axes, names: Sequence[str]) -> None:
    """Draw the triangle, lines at quarters of each part, and the names at the corners."""
    axis.plot([0, 1, 0.5, 0], [0, 0, _HEIGHT, 0], color="0.3", lw=1)
    for share in (0.25, 0.5, 0.75):
        for k in range(3):
            ends = np.zeros((2, 3))
            ends[:, k] = share
            ends[0, k - 1], ends[1, k - 2] = 1 - share, 1 - share
            axis.plot(*plane(ends), color="0.88", lw=0.7, zorder=0)
    places = ((0.5, _HEIGHT + 0.02, "center", "bottom"), (0, -0.03, "center", "top"))
    for name, (x, y, ha, va) in zip(names, (*places, (1, -0.03, "center", "top")), strict=True):
        axis.text(x, y, name, ha=ha, va=va, fontsize=9)
    axis.set(aspect="equal", xlim=(-0.06, 1.06), ylim=(-0.1, _HEIGHT + 0.1))
    axis.set_axis_off()


def scatter(axis: Axes, parts: Array, **style: object) -> None:
    """Draw compositions (N, 3)."""
    axis.scatter(*plane(parts), zorder=3, **style)


def regions(
    axis: Axes,
    points: Array,
    log_density: Array,
    masses: Sequence[float],
    color: str,
    filled: bool,
) -> float:
    """Draw the smallest regions that hold given shares of the mass, descending.

    Returns the mass of the whole triangle by the lattice, which is one for a density.
    """
    weights = np.exp(log_density) / (2 * len(points))  # the triangle's Lebesgue area is 1/2
    order = np.argsort(-log_density)
    cumulative = weights[order].cumsum()
    limits = [log_density[order[np.searchsorted(cumulative, m * cumulative[-1])]] for m in masses]
    x, y = plane(points)
    if filled:
        for limit, alpha in zip(limits, (0.18, 0.25, 0.4), strict=False):
            top = max(log_density.max(), limit) + 1
            axis.tricontourf(x, y, log_density, [limit, top], colors=[color], alpha=alpha)
    else:
        axis.tricontour(x, y, log_density, limits, colors=[color], linewidths=1.4)
    return float(cumulative[-1])

"""Ternary plots: compositions of three parts in a triangle, and the regions of most density."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

__all__ = ["corners", "lattice", "regions", "scatter"]

Array = NDArray[np.float64]
_HEIGHT = math.sqrt(3) / 2


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
    """Draw the smallest regions that hold given shares of the mass.

    Args:
        axis: Where to draw.
        points: A :func:`lattice`.
        log_density: Log-densities (N,) there.
        masses: Shares, descending.
        color: Of lines and filling.
        filled: Whether to fill, the stronger the more density, or to draw outlines only.

    Returns:
        The mass of the whole triangle by the lattice, which is one for a density.
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

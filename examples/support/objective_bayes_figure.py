"""The figure of ``objective_bayes.py``: ambient posteriors beside the one on the level sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from .level_sets import Array

__all__ = ["PENALTIES", "Band", "Conditioned", "draw"]

PENALTIES: dict[str, Callable[[Array], Array]] = {
    "s": lambda s: s,
    "sqrt(1 + s)": lambda s: np.sqrt(1 + s),
    "(1 + s)^4": lambda s: (1 + s) ** 4,
}
LABELS = dict(zip(PENALTIES, ("$s$", r"$\sqrt{1 + s}$", "$(1 + s)^4$"), strict=True))
COLOURS = dict(zip(PENALTIES, ("#1f77b4", "#d95f02", "#1b9e77"), strict=True))
MARKERS = dict(zip(PENALTIES, "os^", strict=True))
LEVEL_COLOUR = "0.35"
# Coefficients that are drawn.
SHOWN = (2, 3)


class Band(NamedTuple):
    """Posterior means and quantiles (N, D) at places (N,)."""

    places: Array
    mean: Array
    low: Array
    high: Array


class Conditioned(NamedTuple):
    """Means (D,) with standard errors of an ambient posterior's chains near a level."""

    name: str
    level: float
    mean: Array
    error: Array


def draw(
    ambient: dict[str, Band],
    on_levels: Band,
    estimates: dict[str, Array],
    path: Array,
    conditioned: list[Conditioned],
    file: Path,
) -> None:
    """Draw the ambient posteriors against lambda, left, and the posterior on level sets, right.

    Penalised estimates (L, D) of every prior are those at the same lambdas, ``path`` holds points
    (N, D) of the lasso path.
    """
    figure = plt.figure(figsize=(12, 7.5), layout="constrained")
    axes = figure.subplots(len(SHOWN), 2, sharey="row", sharex="col")
    norms = np.abs(path).sum(1)
    for (left, right), k in zip(axes, SHOWN, strict=True):
        for name, band in ambient.items():
            colour = COLOURS[name]
            left.fill_between(
                band.places, band.low[:, k], band.high[:, k], color=colour, alpha=0.15, lw=0
            )
            left.plot(band.places, band.mean[:, k], color=colour, lw=2, label=LABELS[name])
            left.plot(band.places, estimates[name][:, k], color=colour, ls="--", lw=1.2)
            chosen = estimates[name][::6]
            right.plot(
                np.abs(chosen).sum(1),
                chosen[:, k],
                MARKERS[name],
                color=colour,
                mfc="none",
                ms=6,
                label=f"penalised estimates, h = {LABELS[name]}",
            )
        right.fill_between(
            on_levels.places,
            on_levels.low[:, k],
            on_levels.high[:, k],
            color=LEVEL_COLOUR,
            alpha=0.2,
            lw=0,
            label="posterior given t: 90 % band",
        )
        right.plot(
            on_levels.places,
            on_levels.mean[:, k],
            color=LEVEL_COLOUR,
            lw=2,
            label="posterior given t: mean",
        )
        right.plot(norms, path[:, k], "k--", lw=1, label="lasso path")
        for one in conditioned:
            aside = 0.25 * (list(PENALTIES).index(one.name) - 1)
            right.errorbar(
                one.level + aside,
                one.mean[k],
                2 * one.error[k],
                fmt=MARKERS[one.name],
                color=COLOURS[one.name],
                ms=7,
                capsize=3,
            )
        for axis in (left, right):
            axis.axhline(0, color="0.85", lw=0.8, zorder=0)
        left.set_ylabel(rf"$\beta_{k + 1}$", fontsize=13)
    axes[0, 0].set(xscale="log", title="In the space of coefficients: three posteriors")
    axes[0, 1].set(title="On the level set: one posterior")
    axes[-1, 0].set_xlabel(r"$\lambda$ of the prior $\exp(-h(\lambda \|\beta\|_1))$")
    axes[-1, 1].set_xlabel(r"$t = \|\beta\|_1$")
    axes[0, 0].legend(title="h(s); dashed: penalised estimate", frameon=False)
    axes[0, 1].legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(file, dpi=100)
    plt.close(figure)

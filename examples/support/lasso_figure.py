"""The figure of ``lasso_path.py``: posteriors by level beside lasso and ridge, and evidence."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from sklearn.linear_model import lars_path

from .level_set_oracles import Reference
from .level_sets import Array

__all__ = ["PosteriorPath", "draw"]

MEANINGS = {
    "bp": "blood pressure",
    "s1": "s1, total cholesterol",
    "s2": "s2, LDL",
    "s3": "s3, HDL",
    "s4": "s4, cholesterol / HDL",
    "s5": "s5, log triglycerides",
    "s6": "s6, blood sugar",
}
FLOW, LASSO, RIDGE = "#1f4e9c", "#c8102e", "0.4"


class PosteriorPath(NamedTuple):
    """Moments (T, D) and log-evidence (T,) by the flow at levels (T,)."""

    levels: Array
    mean: Array
    low: Array
    high: Array
    log_evidence: Array
    standard_error: Array


def draw(
    path: PosteriorPath,
    references: dict[float, Reference],
    x: Array,
    y: Array,
    names: list[str],
    chosen: float,
    file: Path,
) -> None:
    """One panel for each coefficient against the level, and the evidence below."""
    lasso = lars_path(x, y, method="lasso")[2]  # its corners; it is linear between them
    scales = np.logspace(-2, 6, 300)
    ridge = np.stack(
        [np.linalg.solve(x.T @ x + s * np.eye(x.shape[1]), x.T @ y) for s in scales], axis=1
    )
    figure = plt.figure(figsize=(12, 9), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(2.0, 1.1))
    axes = upper.subplots(2, 5, sharex=True)
    for k, axis in enumerate(axes.flat):
        axis.axhline(0, color="0.8", linewidth=0.8)
        axis.fill_between(
            path.levels,
            path.low[:, k],
            path.high[:, k],
            color=FLOW,
            alpha=0.22,
            linewidth=0,
            label="flow: 90 % credible band",
        )
        axis.plot(path.levels, path.mean[:, k], color=FLOW, label="flow: posterior mean")
        for points, colour, style, label in (
            (lasso, LASSO, "--", "lasso (points)"),
            (ridge, RIDGE, ":", "ridge (points)"),
        ):
            norms = np.abs(points).sum(0)
            axis.plot(norms, points[k], style, color=colour, linewidth=1.4, label=label)
        axis.set_title(MEANINGS.get(names[k], names[k]), fontsize=11)
        axis.set_xlim(0, path.levels[-1])
        axis.margins(y=0.12)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    upper.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    upper.supxlabel(r"level $t = \|\beta\|_1$", fontsize=11)
    upper.supylabel("standardised coefficient", fontsize=11)
    _draw_evidence(lower.subplots(), path, references, chosen)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _draw_evidence(
    axis: Axes, path: PosteriorPath, references: dict[float, Reference], chosen: float
) -> None:
    best = int(path.log_evidence.argmax())
    top = path.log_evidence[best]
    relative = path.log_evidence - top
    axis.plot(path.levels, relative, color=FLOW, label="flow, importance sampling")
    error = 2 * path.standard_error
    axis.fill_between(path.levels, relative - error, relative + error, color=FLOW, alpha=0.3)
    for level, reference in references.items():
        axis.errorbar(
            level,
            reference.log_evidence - top,
            2 * reference.standard_error,
            fmt="o",
            color="k",
            ms=5,
            label="independent estimates" if level == min(references) else None,
        )
    for level, colour, align, aside, text in (
        (path.levels[best], FLOW, "left", 6, "most evidence"),
        (chosen, LASSO, "right", -30, "lasso by cross-validation"),
    ):
        axis.axvline(level, color=colour, linewidth=1, linestyle="--")
        axis.annotate(
            f"{text}\nt = {level:.2f}",
            (level, -11.5 if align == "left" else -1.5),
            xytext=(aside, 0),
            textcoords="offset points",
            ha=align,
            color=colour,
        )
    axis.set(xlim=(0, path.levels[-1]), ylim=(-14, 1), xlabel=r"level $t$")
    axis.set_ylabel(r"$\log Z(t) - \max \log Z$, nats")
    axis.legend(loc="upper right", frameon=False)

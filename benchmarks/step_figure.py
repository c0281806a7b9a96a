"""The figure of `step_cost.py`'s results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from step_cells import PACKAGE, PACKAGE_COMPILED, PUBLISHED, Cell, Measured
from step_models import MODELS

matplotlib.use("Agg")

import matplotlib.pyplot as plt

__all__ = ["figure"]

_LINES = {PUBLISHED: ("C3", "s"), PACKAGE: ("C0", "o"), PACKAGE_COMPILED: ("C2", "^")}


def figure(measured: Measured, path: Path) -> None:
    """Draw the ratios against the number of probes, one panel for each model."""
    names = list(dict.fromkeys(cell.model for cell in measured.cells))
    probes = sorted({cell.n_probes for cell in measured.cells})
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    drawn = plt.figure(figsize=(3.2 * columns, 2.9 * rows + 0.4), layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axis, name in zip(axes, names, strict=False):
        _panel(axis, [cell for cell in measured.cells if cell.model == name])
        axis.set_title(MODELS[name].title.replace("`", ""), fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xlim(probes[0] / 1.3, probes[-1] * 1.3)
        axis.set_xticks(probes, [str(n) for n in probes])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("probes K")
        axis.grid(alpha=0.3)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    drawn.supylabel("step, in steps of the autoencoder", fontsize=10)
    shown: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    drawn.legend(
        shown.values(), shown.keys(), loc="outside upper center", ncols=len(shown), fontsize=9
    )
    drawn.savefig(path, dpi=110)
    plt.close(drawn)


def _panel(axis: Any, cells: list[Cell]) -> None:
    for variant, (colour, marker) in _LINES.items():
        points = [(cell, r) for cell in cells if (r := cell.ratio(variant)) is not None]
        if not points:
            continue
        quartiles = [cell.quartiles(variant) for cell, _ in points]
        ratios = [ratio for _, ratio in points]
        # The ratio of the medians need not lie between the quartiles of the ratios.
        below = [max(0.0, r - first) for r, (first, _) in zip(ratios, quartiles, strict=True)]
        above = [max(0.0, third - r) for r, (_, third) in zip(ratios, quartiles, strict=True)]
        axis.errorbar(
            [cell.n_probes for cell, _ in points],
            ratios,
            (below, above),
            color=colour,
            marker=marker,
            markersize=5,
            capsize=2,
            label=variant,
        )
    axis.plot(
        [cell.n_probes for cell in cells],
        [cell.floor() for cell in cells],
        "k--",
        marker="_",
        label="floor of the multiply-adds",
    )
    axis.axhline(1, color="grey", linewidth=0.8)

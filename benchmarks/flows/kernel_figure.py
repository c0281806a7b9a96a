"""The figure of `kernel_couplings.py`'s results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
from kernel_methods import METHODS
from kernel_page import scores
from kernel_tables import TABLES
from records import Record

matplotlib.use("Agg")

import matplotlib.pyplot as plt

__all__ = ["figure"]

SIZES = {True: ("400 rows", "C0", "o"), False: ("70 % of the rows", "C3", "s")}
REFERENCES = {"gaussian": ("Gaussian, 400 rows", ":"), "density": ("kernel density", "--")}


def figure(records: Sequence[Record], path: Path) -> None:
    """Draw test log-likelihoods of all methods, one panel for each table."""
    drawn = plt.figure(figsize=(10.0, 6.4), layout="constrained")
    panels = drawn.subplots(2, 2, sharey=True).flatten()
    for axis, table in zip(panels, TABLES, strict=True):
        _panel(axis, records, table)
    handles = {
        label: handle
        for axis in panels
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    drawn.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, fontsize=9)
    drawn.supxlabel(
        "test log-likelihood in nats, mean and standard error over seeds (◂: further left)",
        fontsize=10,
    )
    drawn.savefig(path, dpi=110)
    plt.close(drawn)


def _panel(axis: Any, records: Sequence[Record], table: str) -> None:
    found = {
        (few, name): [run["test"] for run in scores(records, few, table, name).values()]
        for few in SIZES
        for name in (*METHODS, *REFERENCES)
    }
    means = {key: mean(values) for key, values in found.items() if values}
    if not means:
        return
    # ReLU networks that extrapolate badly would leave no room for the others.
    shown = [value for (_, name), value in means.items() if not name.startswith("relu")]
    left = min(shown) - 0.1 * (max(means.values()) - min(shown))
    for few, (label, colour, marker) in SIZES.items():
        offset = 0.15 if few else -0.15
        for row, name in enumerate(reversed(METHODS)):
            if (few, name) not in means:
                continue
            value, values = means[few, name], found[few, name]
            error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
            if value < left:
                axis.plot(left, row + offset, "<", color=colour, markersize=6, clip_on=False)
                continue
            axis.errorbar(
                value, row + offset, xerr=error, fmt=marker, color=colour, capsize=2, label=label
            )
    for name, (label, style) in REFERENCES.items():
        if (True, name) in means:
            axis.axvline(means[True, name], color="0.4", linestyle=style, label=label)
    axis.set_xlim(left=left)
    axis.set_yticks(range(len(METHODS)), [METHODS[name].title for name in reversed(METHODS)])
    axis.tick_params(labelsize=8)
    axis.set_title(table, fontsize=10)
    axis.grid(alpha=0.3)

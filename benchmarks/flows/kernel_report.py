"""The tables and the figure of `kernel_couplings.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.shared.figures import new_figure, save
from benchmarks.shared.records import Record
from benchmarks.shared.tables import table, with_error

from .kernel_data import TABLES
from .kernel_methods import METHODS

__all__ = ["SELECTION_SEED", "draw_figure", "tables"]

# A split of its own, for the learning rates alone.
SELECTION_SEED = 100
MATCHED = ("tanh", "tanh_decay", "relu")
TITLES = {name: method.title for name, method in METHODS.items()} | {
    "gaussian": "Gaussian, full covariance",
    "density": "kernel density, tuned width",
}
SIZES = {True: ("400 rows", "C0", "o"), False: ("70 % of the rows", "C3", "s")}
REFERENCES = {"gaussian": ("Gaussian, 400 rows", ":"), "density": ("kernel density", "--")}


def scores(records: Sequence[Record], few: bool, data: str, method: str) -> dict[int, Record]:
    """Runs of a cell by their seeds, without those that chose the learning rate."""
    cell = (few, data, method)
    return {
        record["seed"]: record
        for record in records
        if (record.get("few"), record.get("table"), record.get("method")) == cell
        and record["seed"] != SELECTION_SEED
    }


def tables(records: Sequence[Record]) -> dict[str, str]:
    """All tables by their titles, in the order of the page."""
    return {
        "400 rows": _likelihoods(records, few=True, field="test"),
        "Kernels minus the best matched network": _differences(records),
        "Without early stopping": _likelihoods(records, few=True, field="at_the_end"),
        "Parameters, milliseconds for an epoch, ratio to the RBF kernel": _costs(records),
        "Learning rate / best step": _rates(records),
        "Medians": _likelihoods(records, few=True, field="median"),
        "70 % of the rows": _likelihoods(records, few=False, field="test"),
    }


def _likelihoods(records: Sequence[Record], few: bool, field: str) -> str:
    rows = []
    for name, title in TITLES.items():
        cells = [
            [run[field] for run in scores(records, few, data, name).values() if field in run]
            for data in TABLES
        ]
        if any(cells):
            entries = [with_error(values, 2) if values else "–" for values in cells]
            rows.append([title, *entries])
    return table(["", *TABLES], rows)


def _differences(records: Sequence[Record]) -> str:
    """Every kernel minus the best of the matched networks, the best by its mean over seeds."""
    rows = []
    for name in ("rbf", "matern32"):
        entries = []
        for data in TABLES:
            own = scores(records, True, data, name)
            others = {other: scores(records, True, data, other) for other in MATCHED}
            others = {other: runs for other, runs in others.items() if set(runs) >= set(own)}
            if not own or not others:
                entries.append("–")
                continue
            best = max(others, key=lambda other: mean(others[other][s]["test"] for s in own))
            gains = [own[seed]["test"] - others[best][seed]["test"] for seed in own]
            entries.append(f"{with_error(gains, 2)} ({best})")
        rows.append([TITLES[name], *entries])
    return table(["", *TABLES], rows)


def _costs(records: Sequence[Record]) -> str:
    timed = {record["timing"]: record for record in records if "timing" in record}
    rows = []
    for name, method in METHODS.items():
        entries = []
        for data in TABLES:
            runs = scores(records, True, data, name)
            if not runs or data not in timed:
                entries.append("–")
                continue
            first, seconds = next(iter(runs.values())), timed[data][name]
            # 400 rows make two batches.
            ratio = seconds / timed[data]["rbf"]
            entries.append(f"{first['parameters']}, {2e3 * seconds:.0f} ms, {ratio:.2f}")
        rows.append([method.title, *entries])
    return table(["", *TABLES], rows)


def _rates(records: Sequence[Record]) -> str:
    rows = []
    for name, method in METHODS.items():
        cells = [list(scores(records, True, data, name).values()) for data in TABLES]
        entries = [
            f"{runs[0]['rate']:g} / {mean(run['best_step'] for run in runs):.0f}" if runs else "–"
            for runs in cells
        ]
        rows.append([method.title, *entries])
    return table(["", *TABLES], rows)


def draw_figure(records: Sequence[Record], path: Path) -> None:
    """Draw test log-likelihoods of all methods, one panel for each table."""
    figure = new_figure(10.0, 6.4)
    panels = figure.subplots(2, 2, sharey=True).flatten()
    for axis, data in zip(panels, TABLES, strict=True):
        _panel(axis, records, data)
    handles = {
        label: handle
        for axis in panels
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=4, fontsize=9
    )
    figure.supxlabel(
        "test log-likelihood in nats, mean and standard error over seeds (◂: further left)",
        fontsize=10,
    )
    save(figure, path)


def _panel(axis: Any, records: Sequence[Record], data: str) -> None:
    values_of = {
        (few, name): [run["test"] for run in scores(records, few, data, name).values()]
        for few in SIZES
        for name in (*METHODS, *REFERENCES)
    }
    means = {key: mean(values) for key, values in values_of.items() if values}
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
            value, values = means[few, name], values_of[few, name]
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
    axis.set_title(data, fontsize=10)
    axis.grid(alpha=0.3)

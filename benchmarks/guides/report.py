"""The tables and the figure of the benchmark of guides."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.shared.figures import new_figure, save
from benchmarks.shared.records import Record
from benchmarks.shared.tables import table

from .fits import GUIDES
from .samplers import CALIBRATED, MODES, SPHERE
from .targets import Target

__all__ = ["draw_figure", "tables"]

Records = dict[str, Record]


class Row(NamedTuple):
    """The runs of one guide on one target."""

    guide: str
    gaps: list[float]
    rate: float
    milliseconds: float

    @property
    def mean(self) -> float:
        """Mean gap."""
        return sum(self.gaps) / len(self.gaps)

    @property
    def error(self) -> float:
        """Standard error of the mean; zero for one run."""
        number = len(self.gaps)
        if number < 2 or not math.isfinite(self.mean):
            return 0.0
        squares = sum((gap - self.mean) ** 2 for gap in self.gaps)
        return math.sqrt(squares / (number - 1) / number)


def _rows(records: Records, key: str) -> list[Row]:
    rows = []
    for guide in GUIDES[key]:
        start = f"fit|{key}|{guide}|"
        runs = [record for name, record in records.items() if name.startswith(start)]
        if not runs:
            continue
        times = sorted(1000 * run.get("per_step", math.nan) for run in runs)
        gaps = [run["gap"] for run in runs]
        rows.append(Row(guide, gaps, runs[0]["rate"], times[0]))
    return rows


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3f}"


def _fits(records: Records, key: str) -> str:
    rows = []
    for row in _rows(records, key):
        several = len(row.gaps) > 1
        rows.append(
            (
                f"`{row.guide}`" if "." in row.guide or "Auto" in row.guide else row.guide,
                str(len(row.gaps)),
                _number(row.mean),
                _number(row.error) if several else "-",
                _number(min(row.gaps)),
                _number(max(row.gaps)),
                f"{row.rate:g}",
                f"{row.milliseconds:.1f}",
            )
        )
    head = ("guide", "seeds", "gap", "standard error", "least", "greatest", "rate", "ms per step")
    return table(head, rows)


def _sphere(records: Records) -> str:
    runs = {
        (name, mode): records.get(f"sphere|{name}|{mode}") for name in SPHERE for mode in MODES
    }
    rows = [
        (
            name,
            mode,
            f"{run['mean']:.4f} ± {run['error']:.4f}",
            f"{run['sd']:.4f}",
            f"{run['effective']:.0f}",
            f"{run['z_mean']:+.1f}",
            f"{run['z_square']:+.1f}",
            f"{run['divergences']:.0f}",
            f"{run['seconds']:.0f}",
        )
        for (name, mode), run in runs.items()
        if run is not None
    ]
    head = ("site", "mode at", "mean", "sd", "effective draws", "errors off, first moment")
    return table((*head, "second", "divergences", "seconds"), rows, 2)


def _calibration(records: Records) -> str:
    runs = {name: records.get(f"calibration|{name}") for name in CALIBRATED}
    rows = [
        (
            name,
            ", ".join(f"{p:.2f}" for p in run["p"]),
            f"{run['correlation']:.3f}",
            f"{run['acceptance']:.2f}",
            f"{run['seconds']:.0f}",
        )
        for name, run in runs.items()
        if run is not None
    ]
    head = ("site", "p of the ranks, by coordinate", "correlation of successive draws")
    return table((*head, "acceptance", "seconds"), rows)


def tables(records: Records, targets: dict[str, Target]) -> dict[str, str]:
    """All tables by their titles."""
    titles = {
        key: f"{target.title}: log Z = {target.log_evidence:.4f}, {target.steps} steps"
        for key, target in targets.items()
    }
    return {
        **{title: _fits(records, key) for key, title in titles.items()},
        "NUTS on the sphere": _sphere(records),
        "Simulation-based calibration, K = 3": _calibration(records),
    }


def draw_figure(records: Records, targets: dict[str, Target], path: Path) -> None:
    """Draw the gaps of all guides, one panel for each target."""
    panels = {key: _rows(records, key) for key in targets}
    panels = {key: rows for key, rows in panels.items() if rows}
    height = 0.9 * len(panels) + 0.24 * sum(len(rows) for rows in panels.values())
    ratios = [len(rows) + 1 for rows in panels.values()]
    figure = new_figure(8, height)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for axis, (key, rows) in zip(axes, panels.items(), strict=True):
        _panel(axis, rows)
        axis.set_title(targets[key].title, fontsize=10, loc="left")
    axes[-1].set_xlabel("log Z - ELBO, nats")
    save(figure, path)


def _panel(axis: Any, rows: list[Row]) -> None:
    for height, row in enumerate(reversed(rows)):
        ours = row.guide.startswith(("nfp", "same", "star"))
        colour = "C0" if ours else "C3"
        # Sampling may take a gap of nearly zero below it.
        shown = [max(gap, 1e-3) for gap in row.gaps]
        axis.plot(shown, [height] * len(shown), ".", color=colour, alpha=0.4, markersize=5)
        axis.plot(max(row.mean, 1e-3), height, "|", color=colour, markersize=13, mew=2)
    axis.set_yticks(range(len(rows)), [row.guide for row in reversed(rows)], fontsize=8)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_xscale("log")
    least, greatest = axis.get_xlim()
    subs = (1, 2, 5) if greatest < 1000 * least else (1,)
    axis.xaxis.set_major_locator(LogLocator(subs=subs))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3, axis="x")

"""The page of the comparison of guides on standard posteriors."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

from benchmarks.shared.figures import beside, new_figure, save
from benchmarks.shared.records import Record
from benchmarks.shared.tables import report, table

from .posteriors import POSTERIORS
from .rivals import FIRST, OURS, RATES, RIVALS

__all__ = ["page"]

_NOTHING = "–"


class Cell(NamedTuple):
    """The runs of a guide on a posterior, at one rate and under one budget, over seeds."""

    runs: list[Record]

    @property
    def bounds(self) -> list[float]:
        """ELBO of every run, minus infinity where one failed."""
        return [run["elbo"] for run in self.runs]

    @property
    def failures(self) -> int:
        """Number of runs without a finite bound."""
        return sum(not math.isfinite(bound) for bound in self.bounds)

    def middle(self, field: str) -> float:
        """Median of a number over the runs that did not fail."""
        return median([run[field] for run in self.runs if field in run] or [math.nan])

    @property
    def text(self) -> str:
        """The median bound, with the number of failed runs if there are any."""
        if not self.runs:
            return _NOTHING
        bound = median(self.bounds)
        failed = f" ({self.failures} of {len(self.runs)} failed)" if self.failures else ""
        return (f"{bound:.3f}" if math.isfinite(bound) else "diverged") + failed


class Runs:
    """All runs of a file."""

    def __init__(self, records: dict[str, Record]) -> None:
        self.records = records

    def cell(self, posterior: str, guide: str, rate: float, budget: str) -> Cell:
        """Runs of all seeds."""
        start = f"{posterior}|{guide}|{rate}|{budget}|"
        return Cell([run for key, run in self.records.items() if key.startswith(start)])

    def at_equal_time(self, posterior: str, guide: str, rate: float) -> Cell:
        """Runs that took the time of the first guide, whose own are those at equal steps."""
        budget = "steps" if guide == FIRST else "time"
        return self.cell(posterior, guide, rate, budget)

    def best(self, posterior: str, guide: str) -> Cell:
        """The rate with the better median at equal time."""
        cells = [self.at_equal_time(posterior, guide, rate) for rate in RATES]
        return max(cells, key=lambda cell: median(cell.bounds or [-math.inf]))


def page(records: dict[str, Record], path: Path | None) -> None:
    """Print the tables; write them into the page, and draw its figure."""
    runs = Runs(records)
    shown = [
        name for name in POSTERIORS if any(key.startswith(f"{name}|") for key in runs.records)
    ]
    tables = {"Summary": _summary(runs, shown)}
    for name in shown:
        tables[POSTERIORS[name]().title] = _table(runs, name)
    tables["One particle"] = _one_particle(runs, shown)
    report(tables, path)
    if path is not None:
        _draw(runs, shown, beside(path))


def _table(runs: Runs, posterior: str) -> str:
    rows = []
    for guide in [*OURS, *RIVALS]:
        steps = [runs.cell(posterior, guide, rate, "steps") for rate in RATES]
        timed = [runs.at_equal_time(posterior, guide, rate) for rate in RATES]
        best = runs.best(posterior, guide)
        if not steps[0].runs and not best.runs:
            continue
        milliseconds = [
            1000 * run["seconds"] / run["steps"]
            for cell in steps + timed
            for run in cell.runs
            if run.get("steps")
        ]
        rows.append(
            (
                f"`{guide}`",
                *(cell.text for cell in steps),
                *(cell.text for cell in timed),
                _number(best.middle("pareto_k"), 2),
                _number(best.middle("mean_error"), 3),
                _number(best.middle("deviation_error"), 3),
                _number(best.middle("steps"), 0),
                _number(median(milliseconds or [math.nan]), 1),
            )
        )
    head = (
        "guide",
        "steps, 0.01",
        "steps, 0.03",
        "time, 0.01",
        "time, 0.03",
        "k",
        "error of means",
    )
    return table((*head, "of deviations", "steps in the time", "ms"), rows)


def _summary(runs: Runs, shown: list[str]) -> str:
    rows = []
    for posterior in shown:
        ours = runs.best(posterior, FIRST)
        rivals = {guide: runs.best(posterior, guide) for guide in RIVALS}
        rivals = {guide: cell for guide, cell in rivals.items() if cell.runs}
        if not ours.runs or not rivals:
            continue
        name, best = max(rivals.items(), key=lambda rival: median(rival[1].bounds))
        rows.append(
            (
                POSTERIORS[posterior]().title,
                str(len(ours.runs)),
                ours.text,
                f"`{name}`",
                best.text,
                _difference(ours.bounds, best.bounds),
            )
        )
    head = ("posterior", "seeds", f"`{FIRST}`", "best of the others", "its bound", "difference")
    return table(head, rows)


def _difference(ours: list[float], theirs: list[float]) -> str:
    """Difference of the means of runs that did not fail, with its standard error."""
    sides = [[bound for bound in side if math.isfinite(bound)] for side in (ours, theirs)]
    if not all(sides):
        return _NOTHING
    gain = mean(sides[0]) - mean(sides[1])
    if min(map(len, sides)) < 2:
        return f"{gain:+.3f}"
    error = math.sqrt(sum(stdev(side) ** 2 / len(side) for side in sides))
    return f"{gain:+.3f} ± {error:.3f}"


def _one_particle(runs: Runs, shown: list[str]) -> str:
    budget, rows = "one particle", []
    shown = [name for name in shown if any(runs.cell(name, FIRST, r, budget).runs for r in RATES)]
    for guide in [*OURS, *RIVALS]:
        cells: list[Any] = []
        for posterior in shown:
            both = [runs.cell(posterior, guide, rate, budget) for rate in RATES]
            cells.append(max(both, key=lambda cell: median(cell.bounds or [-math.inf])).text)
        if any(cell != _NOTHING for cell in cells):
            rows.append((f"`{guide}`", *cells))
    return table(("guide", *(POSTERIORS[name]().title for name in shown)), rows)


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else _NOTHING


def _draw(runs: Runs, shown: list[str], path: Path) -> None:
    """Nats below the best guide at equal time, by guide, one panel for each posterior."""
    figure = new_figure(2.6 * len(shown) + 2.2, 4.2)
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    guides = [
        guide
        for guide in reversed([*OURS, *RIVALS])
        if any(runs.best(posterior, guide).runs for posterior in shown)
    ]
    for axis, posterior in zip(axes, shown, strict=True):
        bounds = {guide: runs.best(posterior, guide).bounds for guide in guides}
        top = max(median(values) for values in bounds.values() if values)
        for height, guide in enumerate(guides):
            colour = "C0" if guide in OURS else "C3"
            behind = [max(top - bound, 0.01) for bound in bounds[guide] if math.isfinite(bound)]
            axis.plot(behind, [height] * len(behind), ".", color=colour, alpha=0.5)
            if behind:
                axis.plot(median(behind), height, "|", color=colour, markersize=13, mew=2)
        axis.set_xscale("log")
        axis.set_title(POSTERIORS[posterior]().title, fontsize=9)
        axis.grid(alpha=0.3, axis="x")
    axes[0].set_yticks(range(len(guides)), guides, fontsize=8)
    figure.supxlabel("nats below the best median at equal time (0.01 and less at the left edge)")
    figure.suptitle("Ours blue, others red; dots are seeds, bars medians", fontsize=10)
    save(figure, path)

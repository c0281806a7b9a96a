"""Tables and figure of the comparison at equal processor time, of all runs in a folder.

    python -m benchmarks.equal_time.report out/equal_time [--page docs/results/equal_time.md]

A page that does not exist is written whole, without a word about the results; on one that does,
the tables are replaced in order.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from benchmarks.shared.figures import beside, new_figure, save
from benchmarks.shared.records import Record, read
from benchmarks.shared.tables import report, table, with_error, wrapped

from .methods import METHODS
from .scores import MATCHING_STEPS, SHIFT

__all__ = ["Cells", "draw_figure", "read_folder", "tables"]

REFERENCE = "plan_f8"
# Heading and decimals of the scores.
SCORES = {
    "reconstruction": ("reconstruction", 4),
    "c2st_projected": ("c2st-proj", 3),
    "c2st_data": ("c2st", 3),
    "sliced_data": ("sliced", 3),
    "energy_data": ("energy", 4),
    "nll": ("NLL", 2),
    "tube": ("tube", 2),
}
KINDS = {"permuted": "permuted", "shifted": "shifted cell", "others": "others"}
DETECTORS = {"error": "error", "nll": "NLL", "tube": "tube"}
NOTHING = "–"


class Cells(NamedTuple):
    """Runs under one condition.

    Attributes:
        rows: Number of rows, or "all".
        seconds: The budget.
        records: Runs of all sets, methods and seeds.
    """

    rows: str
    seconds: float
    records: list[Record]

    @property
    def title(self) -> str:
        """The condition in words."""
        return f"{self.seconds:g} s, {self.rows} rows"

    def sets(self) -> list[str]:
        """Names of the sets, in the order of the runs."""
        return list(dict.fromkeys(record["set"] for record in self.records))

    def methods(self) -> list[str]:
        """Names of the methods that have runs, in the order of the tables."""
        return [name for name in METHODS if any(r["method"] == name for r in self.records)]

    def by_seed(self, set_name: str, method: str) -> dict[int, Record]:
        """Runs of one set and method by their seeds."""
        runs = [r for r in self.records if (r["set"], r["method"]) == (set_name, method)]
        return {run["seed"]: run for run in sorted(runs, key=lambda run: run["seed"])}


def read_folder(folder: Path) -> list[Cells]:
    """All runs of a folder by their conditions."""
    records = [run for file in sorted(folder.glob("*.jsonl")) for run in read(file).values()]
    if not records:
        raise SystemExit(
            f"There are no runs in {folder}: do some by benchmarks.equal_time.tables."
        )
    conditions = sorted({(run["rows"], run["seconds"]) for run in records}, reverse=True)
    return [
        Cells(*condition, [r for r in records if (r["rows"], r["seconds"]) == condition])
        for condition in conditions
    ]


def tables(all_cells: Sequence[Cells]) -> dict[str, str]:
    """All tables by their titles."""
    result = {}
    for cells in all_cells:
        title = METHODS[REFERENCE].title
        result[f"{cells.title}: reconstruction over that of {title}, in pairs"] = _compared(
            cells, "reconstruction", 3, lambda ours, theirs: ours / theirs
        )
        for score in ("c2st_projected", "tube"):
            heading, digits = SCORES[score]
            result[f"{cells.title}: {heading} minus that of {title}, in pairs"] = _compared(
                cells, score, digits, lambda ours, theirs: ours - theirs
            )
        for name in cells.sets():
            result[f"{cells.title}: {name}, {_shape(cells, name)}"] = _scores(cells, name)
        for kind, words in KINDS.items():
            if any(f"auroc_{kind}_error" in run for run in cells.records):
                result[f"{cells.title}: detection, {words}"] = _detection(cells, kind)
        first = cells.sets()[0]
        result[f"{cells.title}: costs, {first}"] = _costs(cells, first)
    return result


def _shape(cells: Cells, name: str) -> str:
    run = next(run for run in cells.records if run["set"] == name)
    return f"{run['dim']} to {run['latent_dim']}"


def _by_method(
    cells: Cells, name: str, head: Sequence[str], entries: Callable[[list[Record]], list[str]]
) -> str:
    """A row for each method that has runs."""
    rows = []
    for method in cells.methods():
        runs = list(cells.by_seed(name, method).values())
        if runs:
            rows.append([METHODS[method].title, str(len(runs)), *entries(runs)])
    return table(["method", "seeds", *head], rows)


def _scores(cells: Cells, name: str) -> str:
    def entries(runs: list[Record]) -> list[str]:
        return [_entry(runs, score, digits) for score, (_, digits) in SCORES.items()]

    return _by_method(cells, name, [head for head, _ in SCORES.values()], entries)


def _detection(cells: Cells, kind: str) -> str:
    """Areas under the ROC curves, by all detectors, of every set that has this kind."""
    names = [
        name
        for name in cells.sets()
        if any(f"auroc_{kind}_error" in run for run in cells.records if run["set"] == name)
    ]

    def entry(name: str, method: str) -> str:
        runs = list(cells.by_seed(name, method).values())
        areas = [_plain(runs, f"auroc_{kind}_{detector}", 3) for detector in DETECTORS]
        return " / ".join(areas) if runs else NOTHING

    rows = [
        [METHODS[method].title, *(entry(name, method) for name in names)]
        for method in cells.methods()
    ]
    return table([f"by {' / '.join(DETECTORS.values())}", *names], rows)


def _costs(cells: Cells, name: str) -> str:
    head = (
        "processor s",
        "steps",
        "ms a step",
        "weights of",
        "s for 10,000 samples",
        f"at {MATCHING_STEPS[1]} steps",
        "log-densities/s",
    )

    def entries(runs: list[Record]) -> list[str]:
        phases: dict[str, list[Record]] = {}
        for phase in (phase for run in runs for phase in run["phases"]):
            phases.setdefault(phase["name"], []).append(phase)
        steps = [_plain(phase, "steps", 0) for phase in phases.values()]
        times = [_plain(phase, "step_seconds", 2, 1e3) for phase in phases.values()]
        chosen = [_plain(phase, "chosen_at", 2) for phase in phases.values()]
        return [
            f"{mean(run['train_seconds'] for run in runs):.1f}",
            *(" + ".join(parts) or NOTHING for parts in (steps, times, chosen)),
            _plain(runs, "sample_seconds", 3),
            _plain(runs, f"sample_seconds_{MATCHING_STEPS[1]}", 3),
            _plain(runs, "density_rows_per_second", 0),
        ]

    return _by_method(cells, name, head, entries)


def _compared(
    cells: Cells, score: str, digits: int, compare: Callable[[float, float], float]
) -> str:
    """A score beside the reference's of the same seed, whose initial weights are the same."""
    rows = []
    for method in cells.methods():
        if method == REFERENCE:
            continue
        entries = []
        for name in cells.sets():
            reference = cells.by_seed(name, REFERENCE)
            pairs = [
                compare(run[score], reference[seed][score])
                for seed, run in cells.by_seed(name, method).items()
                if seed in reference
            ]
            entries.append(with_error(pairs, digits) if pairs else NOTHING)
        rows.append([METHODS[method].title, *entries])
    return table(["method", *cells.sets()], rows)


def _entry(runs: Sequence[Record], score: str, digits: int) -> str:
    values = [run[score] for run in runs if score in run]
    return with_error(values, digits) if values else NOTHING


def _plain(runs: Sequence[Record], score: str, digits: int, unit: float = 1.0) -> str:
    """The mean without an error, of the runs that have the score."""
    values = [unit * run[score] for run in runs if not math.isnan(run.get(score, math.nan))]
    return f"{mean(values):.{digits}f}" if values else NOTHING


def draw_figure(all_cells: Sequence[Cells], path: Path) -> None:
    """Draw c2st-proj by method, a row of panels for each condition and a panel for each set."""
    most = max(len(cells.sets()) for cells in all_cells)
    methods = [name for name in METHODS if any(name in c.methods() for c in all_cells)]
    figure = new_figure(2.0 + 2.2 * most, 3.4 * len(all_cells))
    panels = figure.subplots(len(all_cells), most, sharey=True, squeeze=False)
    for row, cells in zip(panels, all_cells, strict=True):
        for axes in row[len(cells.sets()) :]:
            axes.set_visible(False)
        for axes, name in zip(row, cells.sets(), strict=False):
            _panel(axes, cells, name, methods)
    figure.supxlabel("c2st-proj, mean and standard error over seeds; 0.5 is best", fontsize=10)
    save(figure, path)


def _panel(axes: Any, cells: Cells, name: str, methods: Sequence[str]) -> None:
    for place, method in enumerate(methods):
        values = [run["c2st_projected"] for run in cells.by_seed(name, method).values()]
        if values:
            error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
            axes.errorbar(mean(values), place, xerr=error, fmt="o", color="C0", capsize=2)
    axes.set_yticks(range(len(methods)), [METHODS[method].title for method in methods])
    axes.tick_params(labelsize=7)
    axes.locator_params(axis="x", nbins=4)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set_title(f"{name}\n{cells.title}", fontsize=8)
    axes.grid(alpha=0.3)


CONDITIONS = (
    "Every run has the same processor time on one thread, its held-out scores and the encoding of "
    "the rows included, building, reading and scoring excluded. Batches have 256 rows, gradients "
    "are clipped at norm 1, the optimiser is Adam. Encoder and decoder are perceptrons 256-256 "
    "with SiLU, or `conv_autoencoder` for images; those of one seed start from the same weights "
    "in all methods and see the batches in the same order. Entries are means over seeds ± their "
    "standard errors. Scores are of test rows, choices of validation rows. Two runs at a time "
    "went on two cores."
)
NOTES = (
    "*rows*: the splits are fixed, units those of all training and validation rows. power_26days "
    "holds out whole hours, because minutes beside each other are nearly equal. A number of rows "
    "means random training rows by the seed, a fifth of them for choices.",
    "*usual training*: one cycle at peak rate 1e-3 (torch's `OneCycleLR`, by time), last weights. "
    "The recipe of 0.1 has its warm-up by estimated steps, beta 20 and four spline couplings. "
    "Splines learn whitened codes, matching learns codes of unit deviations.",
    "*careful training*: a rise of 5 % and a cosine to zero, peak rate 1e-3 or 8e-3 for the "
    "autoencoder and 3e-3 for the density, averaged weights, chosen 25 times a phase by a "
    "held-out score. A phase without a better one for a quarter of its time ends, and leaves the "
    "rest to the next.",
    "*nfi.training.fit*: `injective_flow` and `fit` with their defaults, whose networks have the "
    "same widths and start as principal components. *start of the others*: `fit` and the same "
    "latent density, with the networks and initial weights of the other methods.",
    "*reconstruction*: squared error summed over dimensions.",
    "*c2st-proj*, *c2st*: accuracy of gradient boosting, in five folds, between samples and the "
    "reconstructions of test rows, or the test rows themselves; 0.5 is best. The VAE's samples "
    "are decoder means in the first, and have its noise in the second.",
    "*sliced*, *energy*: sliced 2-Wasserstein distance by 500 directions and energy distance "
    "between samples and test rows. That of equal laws is above zero for the first.",
    "*NLL*: minus the exact log-density of the reconstructions against the manifold's measure, in "
    "nats of the standardised units.",
    "*tube*: (D - d)/2 log(reconstruction / (D - d)) + NLL, the negative log-likelihood of a "
    "Gaussian tube of the best width around the manifold, without its constant (D - d)/2 log(2 pi "
    "e). It means nothing where the manifold is thinner than the tube along some direction, as "
    "after a collapse: where NLL and reconstruction part from those of the others.",
    "*detection*: areas under the ROC curve by squared error, NLL, and squared error over twice "
    "the variance of the tube (of validation rows) plus NLL. *permuted*: each column of the test "
    f"rows in an order of its own; *shifted cell*: one cell of each row moved by {SHIFT:g} "
    "deviations of its column; *others*: the background of higgs_small, or the other set of "
    "images.",
    "*costs*: parts with a plus are the phases; *weights of* is the share of the phase at which "
    f"its weights were chosen. Matching laws sample by Heun's method in {MATCHING_STEPS[0]} steps "
    "and give densities by eight Runge-Kutta steps with the exact trace.",
)


def _new_page(all_tables: dict[str, str]) -> str:
    """A page with the conditions and the tables."""
    words = "\n".join(wrapped(f"* {text}").replace("\n", "\n  ") for text in NOTES)
    parts = [f"## {title}\n\n{text}" for title, text in all_tables.items()]
    head = "# Injective flows and their competitors at equal processor time"
    return "\n\n".join([head, wrapped(CONDITIONS), words, *parts]) + "\n"


def main() -> None:
    """Print the tables, and write page and figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder of the runs")
    parser.add_argument("--page", type=Path, help="page whose tables to write, and its figure")
    options = parser.parse_args()
    all_cells = read_folder(options.folder)
    all_tables = tables(all_cells)
    if options.page is not None and not options.page.is_file():
        options.page.write_text(_new_page(all_tables))
    report(all_tables, options.page)
    if options.page is not None:
        draw_figure(all_cells, beside(options.page))


if __name__ == "__main__":
    main()

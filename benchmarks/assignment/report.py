"""The tables and the figure of the benchmark of assignment flows on known laws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

from benchmarks.shared.figures import new_figure, save
from benchmarks.shared.records import Record
from benchmarks.shared.tables import table, with_error
from benchmarks.shared.timing import exponent

from .methods import COMBINATIONS, DEFAULT
from .steps import CONSTANTS

__all__ = ["GRIDS", "draw_figure", "tables"]

Records = dict[str, Record]
GRIDS = (4, 16, 64)
ISING_ROWS = (
    ("true samples", "true"),
    (f"{DEFAULT} (default)", DEFAULT),
    ("the same, leaving variables out", "leave-one-out"),
    ("finite, velocity, weights (predecessor)", "finite, velocity, weights"),
    ("the same, sampled to .99", "finite, velocity, weights, to .99"),
    ("infinite, velocity, weights, Gamma(1, .25) (as published)", "as published"),
    ("linear, classifier", "linear, classifier"),
    ("linear, velocity", "linear, velocity"),
    ("independent marginals", "independent"),
)
GRID_ROWS = (*ISING_ROWS[:2], ISING_ROWS[3], *ISING_ROWS[5:])
BARS = (
    ("true samples", "true"),
    ("infinite, classifier, posterior (default)", "infinite, classifier, posterior"),
    ("the same, leaving variables out", "leave-one-out"),
    ("finite, velocity, weights (predecessor)", "finite, velocity, weights"),
    ("infinite, velocity, weights (as published)", "as published"),
    ("linear, classifier", "linear, classifier"),
    ("linear, velocity", "linear, velocity"),
)
LINES = (
    ("default", "infinite, classifier, posterior", "o-"),
    ("predecessor", "finite, velocity, weights", "s-"),
    ("as published", "as published", "^-"),
    ("linear, velocity", "linear, velocity", "d-"),
    ("linear, classifier", "linear, classifier", "v-"),
    ("true samples", "true", "k:"),
    ("independent marginals", "independent", "k--"),
)


def tables(records: Records) -> dict[str, str]:
    """All tables by their titles, in the order of the page."""
    return {title: build(records) for title, build in TABLES.items()}


def runs_of(records: Records, law: str, method: str) -> list[Record]:
    """Runs of a method on a law, one for each seed, or the single run of a reference."""
    keys = [f"{law}|{method}", *(f"{law}|{method}|{seed}" for seed in range(100))]
    return [records[key] for key in keys if key in records]


def _entry(runs: Sequence[Record], field: str, digits: int) -> str:
    return with_error([run[field] for run in runs], digits) if runs else "-"


def _ising(records: Records) -> str:
    rows = []
    for label, method in ISING_ROWS:
        runs = runs_of(records, "ising", method)
        size = f"{runs[0]['parameters']:,}" if runs and "parameters" in runs[0] else "-"
        rows.append((label, size, str(len(runs)), _entry(runs, "tv", 4), _entry(runs, "kl", 4)))
    return table(("method", "parameters", "runs", "TV", "KL(model, p)"), rows)


def _combinations(records: Records) -> str:
    features = tuple(dict.fromkeys(feature for _, _, feature in COMBINATIONS))
    pairs = dict.fromkeys((horizon, kind) for horizon, kind, _ in COMBINATIONS)
    rows = []
    for pair in pairs:
        cells = [runs_of(records, "ising", ", ".join((*pair, feature))) for feature in features]
        rows.append(
            (
                *pair,
                *(_entry(runs, "tv", 4) for runs in cells),
                *(_entry(runs, "kl", 4) for runs in cells),
            )
        )
    head = ("horizon", "parametrisation", *(f"TV, {feature}" for feature in features))
    return table((*head, *(f"KL, {feature}" for feature in features)), rows, 2)


def _likelihoods(records: Records) -> str:
    rows = []
    for label, method in ISING_ROWS:
        for run in runs_of(records, "likelihood", method):
            rows.append(
                (
                    label,
                    f"{run['kl']:.4f} ± {run['kl_error']:.4f}",
                    f"{run['kl_bias']:.4f}",
                    f"{run['effective']:.3f}",
                    f"{run['effective_by_p']:.3f}",
                    f"{run['total']:.4f} ± {run['total_error']:.4f}",
                    f"{run['seconds'] / records[f'likelihood|{DEFAULT}|0']['seconds']:.2f}",
                )
            )
    head = (
        "method",
        "KL(p, model)",
        "of which noise",
        "ESS, states",
        "ESS, by p",
        "sum of all",
        "time",
    )
    return table(head, rows)


def _grids(records: Records) -> str:
    rows = []
    for label, method in GRID_ROWS:
        cells = [runs_of(records, f"grid {c}", method) for c in GRIDS]
        entries = [(_entry(runs, "tv", 4), _entry(runs, "kl", 4)) for runs in cells]
        rows.append((label, *(entry for both in entries for entry in both)))
    head = ("method", *(f"{distance}, c = {c}" for c in GRIDS for distance in ("TV", "KL")))
    return table(head, rows)


def _grid_laws(records: Records) -> str:
    rows = []
    for c in GRIDS:
        true, law = (runs_of(records, f"grid {c}", name) for name in ("true", "independent"))
        if true and law:
            facts = law[0]
            rows.append(
                (
                    str(c),
                    f"{facts['states']:,}",
                    f"{math.exp(facts['entropy']):,.0f}",
                    f"{facts['coupling']:.3f}",
                    f"{true[0]['samples']:,}",
                )
            )
    head = ("c", "states", "effective states", "mutual information, nats", "samples")
    return table(head, rows, 0)


def _costs(records: Records) -> str:
    """Our part against n c, as multiples of the smallest, with slopes."""
    if "cost" not in records:
        return "-"
    columns = []
    for varied in ("variables", "classes"):
        rows = [row for row in records["cost"]["rows"] if row["varied"] == varied]
        sizes = [row["variables"] * row["classes"] for row in rows]
        columns += [[row[kind] for row in rows] for kind in ("training", "sampling", "likelihood")]
    entries = [
        [f"2^{round(math.log2(size))}", *(f"{column[k] / column[0]:.1f}" for column in columns)]
        for k, size in enumerate(sizes)
    ]
    slopes = [f"**{exponent(sizes, column):.2f}**" for column in columns]
    kinds = ("training", "sampling", "likelihood")
    head = ("n c", *(f"{kind}, {more}" for more in ("more n", "more c") for kind in kinds))
    return table(head, [*entries, ["slope", *slopes]])


def _whole(records: Records) -> str:
    """Whole steps with the dense network, as multiples of our part."""
    if "cost" not in records:
        return "-"
    rows = [
        (
            str(row["variables"]),
            str(row["classes"]),
            f"{row['dense_training'] / row['training']:.1f}",
            f"{row['dense_sampling'] / row['sampling']:.1f}",
        )
        for row in records["cost"]["rows"]
        if "dense_training" in row
    ]
    head = ("n", "c", "training step, times our part", "sampling step, times our part")
    return table(head, rows, 0)


def _divergences(records: Records) -> str:
    if "cost" not in records:
        return "-"
    rows = [
        (
            str(row["variables"]),
            f"{row['dense_exact'] / row['dense']:.1f}",
            f"{row['dense_hutchinson'] / row['dense']:.1f}",
            f"{row['left_out_exact'] / row['left_out']:.2f}",
            f"{row['left_out'] / row['dense']:.2f}",
        )
        for row in records["cost"]["likelihoods"]
    ]
    head = ("n", "dense, exact", "dense, one probe", "leaving out, closed form")
    return table((*head, "leaving out, times dense"), rows)


def _misplaced(records: Records) -> str:
    if "steps" not in records:
        return "-"
    cases: dict[tuple[str, int, str], dict[str, Record]] = {}
    for row in records["steps"]["rows"]:
        cases.setdefault((row["solver"], row["steps"], row["horizon"]), {})[row["law"]] = row
    laws = list(dict.fromkeys(row["law"] for row in records["steps"]["rows"]))
    rows = []
    for (solver, steps, horizon), by_law in cases.items():
        factor, order = CONSTANTS[solver]
        entries = [
            f"{row['share']:.4f} ({min(1.0, factor * row['h'] ** order):.4f})"
            for row in (by_law[law] for law in laws)
        ]
        rows.append((horizon, solver, str(steps), *entries))
    return table(("horizon", "solver", "steps", *laws), sorted(rows, key=_in_order), 2)


def _in_order(row: Sequence[str]) -> tuple[int, str, int]:
    return list(CONSTANTS).index(row[1]), row[0], int(row[2])


TABLES: dict[str, Callable[[Records], str]] = {
    "3 x 3 Ising model": _ising,
    "Combinations of options": _combinations,
    "Probabilities of all states": _likelihoods,
    "Laws of two coupled labels": _grid_laws,
    "Two coupled labels": _grids,
    "Cost of our part": _costs,
    "Cost of whole steps": _whole,
    "Cost of divergences": _divergences,
    "Steps of the solver": _misplaced,
}


def draw_figure(records: Records, path: Path) -> None:
    """Draw total variations on the Ising model as bars, and on coupled labels as lines."""
    figure = new_figure(10.5, 3.8)
    bars, lines = figure.subplots(1, 2, width_ratios=(1.15, 1))
    for place, (_, method) in enumerate(BARS):
        mean, error = _mean(records, "ising", method)
        color = "0.6" if method == "true" else "C0" if place == 1 else "C7"
        bars.barh(place, mean, xerr=error, color=color, capsize=3)
        bars.text(mean + error + 0.004, place, f"{mean:.3f}", va="center", fontsize=9)
    bars.set_yticks(range(len(BARS)), [label for label, _ in BARS])
    bars.invert_yaxis()
    bars.margins(x=0.2)
    bars.set_xlabel("total variation, standard errors over seeds")
    bars.set_title("3 x 3 Ising model", fontsize=11)
    for label, method, style in LINES:
        entries = [
            (c, *_mean(records, f"grid {c}", method))
            for c in GRIDS
            if runs_of(records, f"grid {c}", method)
        ]
        if entries:
            lines.errorbar(*zip(*entries, strict=True), fmt=style, capsize=3, label=label)
    lines.set_xscale("log", base=2)
    lines.set_yscale("log")
    lines.set_xticks(GRIDS, map(str, GRIDS))
    lines.minorticks_off()
    lines.set_yticks(
        (0.01, 0.02, 0.05, 0.1, 0.2, 0.5), ("0.01", "0.02", "0.05", "0.1", "0.2", "0.5")
    )
    lines.set_xlabel("classes c")
    lines.set_ylabel("total variation")
    lines.set_title("two coupled labels", fontsize=11)
    lines.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path, dpi=150)


def _mean(records: Records, law: str, method: str) -> tuple[float, float]:
    """Mean total variation over seeds, and its standard error."""
    values = [run["tv"] for run in runs_of(records, law, method)]
    return mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0

"""The tables of the benchmark of assignment flows, from its records."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from assignment_models import COMBINATIONS, DEFAULT
from assignment_steps import CONSTANTS
from flows.records import Record, with_error

__all__ = ["TABLES", "runs_of"]

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


def runs_of(records: Records, law: str, method: str) -> list[Record]:
    """Runs of a method on a law, one for each seed; of what has no seed a single one."""
    keys = [f"{law}|{method}", *(f"{law}|{method}|{seed}" for seed in range(100))]
    return [records[key] for key in keys if key in records]


def _entry(runs: Sequence[Record], field: str, digits: int) -> str:
    return with_error([run[field] for run in runs], digits) if runs else "-"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table whose first columns are words and whose others are numbers."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def _ising(records: Records) -> str:
    rows = []
    for label, method in ISING_ROWS:
        runs = runs_of(records, "ising", method)
        size = f"{runs[0]['parameters']:,}" if runs and "parameters" in runs[0] else "-"
        rows.append((label, size, str(len(runs)), _entry(runs, "tv", 4), _entry(runs, "kl", 4)))
    return _table(("method", "parameters", "runs", "TV", "KL(model, p)"), rows)


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
    return _table((*head, *(f"KL, {feature}" for feature in features)), rows, 2)


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
    return _table(head, rows)


def _grids(records: Records) -> str:
    rows = []
    for label, method in GRID_ROWS:
        cells = [runs_of(records, f"grid {c}", method) for c in GRIDS]
        entries = [(_entry(runs, "tv", 4), _entry(runs, "kl", 4)) for runs in cells]
        rows.append((label, *(entry for both in entries for entry in both)))
    head = ("method", *(f"{what}, c = {c}" for c in GRIDS for what in ("TV", "KL")))
    return _table(head, rows)


def _grid_laws(records: Records) -> str:
    rows = []
    for c in GRIDS:
        true, law = (runs_of(records, f"grid {c}", name) for name in ("true", "independent"))
        if true and law:
            found = law[0]
            rows.append(
                (
                    str(c),
                    f"{found['states']:,}",
                    f"{math.exp(found['entropy']):,.0f}",
                    f"{found['coupling']:.3f}",
                    f"{true[0]['samples']:,}",
                )
            )
    head = ("c", "states", "effective states", "mutual information, nats", "samples")
    return _table(head, rows, 0)


def slope(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Slope of the logarithm of times against that of sizes, by least squares; NaN of one."""
    if len(sizes) < 2:
        return math.nan
    x, y = ([math.log(value) for value in values] for values in (sizes, times))
    middle, level = sum(x) / len(x), sum(y) / len(y)
    rise = sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True))
    return rise / sum((a - middle) ** 2 for a in x)


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
    slopes = [f"**{slope(sizes, column):.2f}**" for column in columns]
    kinds = ("training", "sampling", "likelihood")
    head = ("n c", *(f"{kind}, {more}" for more in ("more n", "more c") for kind in kinds))
    return _table(head, [*entries, ["slope", *slopes]])


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
    return _table(head, rows, 0)


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
    return _table((*head, "leaving out, times dense"), rows)


def _misplaced(records: Records) -> str:
    if "steps" not in records:
        return "-"
    cases: dict[tuple[str, int, str], dict[str, Record]] = {}
    for row in records["steps"]["rows"]:
        cases.setdefault((row["solver"], row["steps"], row["horizon"]), {})[row["law"]] = row
    laws = list(dict.fromkeys(row["law"] for row in records["steps"]["rows"]))
    rows = []
    for (solver, steps, horizon), found in cases.items():
        factor, order = CONSTANTS[solver]
        entries = [
            f"{row['share']:.4f} ({min(1.0, factor * row['h'] ** order):.4f})"
            for row in (found[law] for law in laws)
        ]
        rows.append((horizon, solver, str(steps), *entries))
    return _table(("horizon", "solver", "steps", *laws), sorted(rows, key=_in_order), 2)


def _in_order(row: Sequence[str]) -> tuple[int, str, int]:
    return list(CONSTANTS).index(row[1]), row[0], int(row[2])


TABLES: dict[str, Callable[[Records], str]] = {
    "ISING_TABLE": _ising,
    "COMBINATION_TABLE": _combinations,
    "LIKELIHOOD_TABLE": _likelihoods,
    "LAW_TABLE": _grid_laws,
    "GRID_TABLE": _grids,
    "COST_TABLE": _costs,
    "WHOLE_TABLE": _whole,
    "DIVERGENCE_TABLE": _divergences,
    "MISPLACED_TABLE": _misplaced,
}

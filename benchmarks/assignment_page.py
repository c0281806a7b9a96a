"""The page and the figure of the benchmark of assignment flows, from its records."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from assignment_tables import TABLES, runs_of
from assignment_text import PAGE
from flows.records import Record

__all__ = ["write_page"]

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


def write_page(records: dict[str, Record], steps: int, page: Path | None) -> None:
    """Print the tables, and write the page and its figure if a place is given.

    Args:
        records: Runs by their keys "law|method|seed".
        steps: Number of training steps.
        page: Markdown page, or None.
    """
    tables = {name: table(records) for name, table in TABLES.items()}
    print("\n\n".join(tables.values()))
    if page is None:
        return
    figure = page.parent.parent / "figures" / f"{page.stem}.png"
    _draw(records, figure)
    places = {"STEPS": str(steps), "TORCH": torch.__version__, "MACHINE": platform.machine()}
    text = PAGE
    for name, entry in (tables | places).items():
        text = text.replace(name, entry)
    page.write_text(text.replace("FIGURE", f"../figures/{figure.name}"))


def _draw(records: dict[str, Record], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, lines) = plt.subplots(
        1, 2, figsize=(10.5, 3.8), layout="constrained", width_ratios=(1.15, 1)
    )
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
            for c in (4, 16, 64)
            if runs_of(records, f"grid {c}", method)
        ]
        if entries:
            lines.errorbar(*zip(*entries, strict=True), fmt=style, capsize=3, label=label)
    lines.set_xscale("log", base=2)
    lines.set_yscale("log")
    lines.set_xticks((4, 16, 64), ("4", "16", "64"))
    lines.minorticks_off()
    lines.set_yticks(
        (0.01, 0.02, 0.05, 0.1, 0.2, 0.5), ("0.01", "0.02", "0.05", "0.1", "0.2", "0.5")
    )
    lines.set_xlabel("classes c")
    lines.set_ylabel("total variation")
    lines.set_title("two coupled labels", fontsize=11)
    lines.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _mean(records: dict[str, Record], law: str, method: str) -> tuple[float, float]:
    """Mean total variation over seeds, and its standard error."""
    values = torch.tensor([run["tv"] for run in runs_of(records, law, method)])
    error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return float(values.mean()), error

r"""Densities of real compositions of three parts: flows beside Aitchison's classical models.

    python examples/compositions.py --data path/to/data [--quick] [--out out]

The folder holds ``compositions_aitchison.npz``; the variable NFI_DATA may name it instead.
ArcticLake has sand, silt and clay of 39 sediments and the depth of the water, SkyeAFM alkali, iron
and magnesium oxides of 23 lavas. The script scores Dirichlet, logistic-normal and two tiny flows
by the log-density of held-out compositions in ten folds, against the Lebesgue measure of the first
two parts, and ArcticLake also given the depth, and draws the fitted densities. With --quick
everything is too short to be good.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.lines import Line2D
from support.composition_models import Array, Fit, models
from support.ternary import corners, lattice, regions, scatter

FOLDS, REFERENCE = 10, "logistic-normal"
DEPTHS = {12.0: "#e66101", 30.0: "#1b9e77", 90.0: "#5e3c99"}
FILE = "compositions_aitchison.npz"


class Table(NamedTuple):
    """Compositions (N, 3) and covariates (N, C)."""

    title: str
    names: tuple[str, str, str]
    parts: Array
    covariates: Array


def read_tables(folder: Path | None) -> list[Table]:
    """ArcticLake, SkyeAFM, and ArcticLake with the logarithm of the depth, in metres.

    Raises:
        SystemExit: If there is no such file.
    """
    if folder is None or not (folder / FILE).is_file():
        where = "" if folder is None else f" in {folder}"
        raise SystemExit(
            f"{FILE} was not found{where}. Give the folder that holds it by --data or the "
            "environment variable NFI_DATA."
        )
    with np.load(folder / FILE, allow_pickle=False) as arrays:
        lake, lavas = (arrays[name].astype(np.float64) for name in ("ArcticLake", "SkyeAFM"))
    soil, oxides = ("sand", "silt", "clay"), ("alkali", "iron", "magnesium")
    sediments, lavas = lake[:, :3], lavas / lavas.sum(1, keepdims=True)
    sediments = sediments / sediments.sum(1, keepdims=True)
    return [
        Table("ArcticLake", soil, sediments, np.zeros((len(lake), 0))),
        Table("SkyeAFM", oxides, lavas, np.zeros((len(lavas), 0))),
        Table("ArcticLake given depth", soil, sediments, log_depth(lake[:, 3:])),
    ]


def log_depth(depth: Array) -> Array:
    """The covariate of depths, of order one over the table's 10 to 104 m."""
    return (np.log(depth) - math.log(40.0)) / 0.7


def held_out(fit: Fit, table: Table, repeats: int) -> Array:
    """Log-densities (N,) of compositions left out of the fit, averaged over repeated folds."""
    number = len(table.parts)
    scores = np.zeros(number)
    for repeat in range(repeats):
        order = np.random.default_rng(repeat).permutation(number)
        for held in np.array_split(order, FOLDS):
            kept = np.setdiff1d(order, held)
            torch.manual_seed(repeat)
            log_density = fit(table.parts[kept], table.covariates[kept])
            scores[held] += log_density(table.parts[held], table.covariates[held]) / repeats
    return scores


def print_scores(tables: list[Table], fits: dict[str, Fit], repeats: int) -> None:
    """One row for each table and model, with standard errors over compositions."""
    print(f"| table | model | held-out log-density | minus {REFERENCE} | ahead on | fitted |")
    print("|---|---|---|---|---|---|")
    for table in tables:
        scores = {name: held_out(fit, table, repeats) for name, fit in fits.items()}
        for name, fit in fits.items():
            torch.manual_seed(0)
            own = fit(table.parts, table.covariates)(table.parts, table.covariates)
            gain = scores[name] - scores[REFERENCE]
            beside = "–" if name == REFERENCE else _pm(gain)
            ahead = "–" if name == REFERENCE else f"{(gain > 0).sum()} of {len(gain)}"
            print(
                f"| {table.title} | {name} | {_pm(scores[name])} | {beside} | {ahead} | "
                f"{own.mean():.3f} |"
            )


def _pm(values: Array) -> str:
    return f"{values.mean():.3f} ± {values.std(ddof=1) / math.sqrt(len(values)):.3f}"


def draw(tables: list[Table], fits: dict[str, Fit], file: Path, number: int) -> float:
    """One row for each table, one column for each model; returns the worst error of a mass."""
    figure, axes = plt.subplots(
        len(tables), len(fits), figsize=(13, 9.6), layout="constrained", squeeze=False
    )
    grid, worst = lattice(number), 0.0
    for row, table in zip(axes, tables, strict=True):
        for axis, (name, fit) in zip(row, fits.items(), strict=True):
            torch.manual_seed(0)
            log_density = fit(table.parts, table.covariates)
            corners(axis, table.names)
            for covariate, masses, colour, filled in _layers(table):
                at = np.full((len(grid), table.covariates.shape[1]), covariate)
                mass = regions(axis, grid, log_density(grid, at), masses, colour, filled)
                worst = max(worst, abs(mass - 1))
            scatter(axis, table.parts, s=11, linewidths=0, **_colours(table))
            axis.set_title(name if table is tables[0] else "", fontsize=12)
        row[0].text(-0.16, 0.4, table.title, rotation=90, va="center", fontsize=12)
    lines = [Line2D([], [], color=c, label=f"{d:g} m: 90 % region") for d, c in DEPTHS.items()]
    axes[-1, -1].legend(handles=lines, loc="upper right", fontsize=8, frameon=False)
    figure.suptitle(
        "Above: smallest regions with 50 %, 90 % and 99 % of the fitted mass. "
        "Below: 90 % regions at three depths, data coloured by depth.",
        fontsize=11,
    )
    figure.savefig(file, dpi=90)
    plt.close(figure)
    return worst


def _layers(table: Table) -> Iterable[tuple[float, tuple[float, ...], str, bool]]:
    if table.covariates.shape[1] == 0:
        return [(0.0, (0.99, 0.9, 0.5), "#1f4e9c", True)]
    return [
        (float(log_depth(np.array(depth))), (0.9,), colour, False)
        for depth, colour in DEPTHS.items()
    ]


def _colours(table: Table) -> dict[str, object]:
    if table.covariates.shape[1] == 0:
        return {"color": "k"}
    places = [float(log_depth(np.array(depth))) for depth in DEPTHS]
    nearest = np.abs(table.covariates - places).argmin(1)
    return {"color": [list(DEPTHS.values())[k] for k in nearest]}


def main() -> None:
    """Print the scores and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    environment = os.environ.get("NFI_DATA")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(environment) if environment else None,
        help="folder of the .npz file (default: environment variable NFI_DATA)",
    )
    parser.add_argument("--steps", type=int, default=40, help="training steps of a flow")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of the folds")
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the figure")
    options = parser.parse_args()
    # So small a network gains nothing from more threads, and on a busy machine they slow it down.
    torch.set_num_threads(1)
    tables = read_tables(options.data)
    options.out.mkdir(parents=True, exist_ok=True)
    fits = models(steps=3 if options.quick else options.steps)
    start = time.process_time()
    print_scores(tables, fits, 1 if options.quick else options.repeats)
    print(f"\nscored in {time.process_time() - start:.0f} s of processor time")
    file = options.out / "compositions.png"
    worst = draw(tables, fits, file, 60 if options.quick else 220)
    print(f"masses on the grid of the figure differ from one by at most {worst:.1%}")
    print(f"wrote {file}")


if __name__ == "__main__":
    main()

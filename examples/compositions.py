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
from functools import partial
from pathlib import Path

import normflows as nf
import numpy as np
import torch
from support.composition_baselines import (
    Array,
    Fit,
    LogDensity,
    fit_dirichlet,
    fit_logistic_normal,
)
from support.composition_data import Table, read_tables
from support.composition_figure import draw
from torch import Tensor, nn

import normflows_injective as nfi

FOLDS, REFERENCE = 10, "logistic-normal"


def build_flow(kind: str, num_covariates: int) -> nfi.InjectiveNormalizingFlow:
    """Standard normal, spline coupling, linear map, shift and scale, chart of the simplex."""
    context = num_covariates or None
    layers: list[nf.flows.Flow] = [
        nf.flows.CoupledRationalQuadraticSpline(
            2, 1, 8, num_bins=4, activation=nn.SiLU, num_context_channels=context
        ),
        nf.flows.LULinearPermute(2),
    ]
    if context:
        layers.append(nf.flows.MaskedAffineAutoregressive(2, 8, context_features=context))
    layers.append(nf.flows.ActNorm(2))
    base = nf.distributions.DiagGaussian(2, trainable=False)
    return nfi.InjectiveNormalizingFlow(
        base, [*layers, nfi.flows.SimplexStickBreaking(3, kind=kind)]
    )


def fit_flow(kind: str, steps: int, parts: Array, covariates: Array) -> LogDensity:
    """A tiny flow in coordinates of the simplex: one small spline, one linear map.

    With covariates a shift and a scale that depend on them come last, before the chart.
    """
    x, context = _tensor(parts), _context(covariates)
    model = build_flow(kind, covariates.shape[1])
    model.forward_kld(x, context)  # ActNorm takes its first values from data
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=steps)
    for _ in range(steps):
        loss = model.forward_kld(x, context)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        scheduler.step()
    model.eval()

    def log_density(parts: Array, covariates: Array) -> Array:
        with torch.no_grad():
            return model.log_prob(_tensor(parts), _context(covariates)).double().numpy()

    return log_density


def _tensor(parts: Array) -> Tensor:
    return torch.from_numpy(parts).float()


def _context(covariates: Array) -> Tensor | None:
    return torch.from_numpy(covariates).float() if covariates.shape[1] else None


def models(steps: int) -> dict[str, Fit]:
    """All models by name, the flows trained for a number of steps."""
    return {
        "Dirichlet": fit_dirichlet,
        "logistic-normal": fit_logistic_normal,
        "flow, normal sticks": partial(fit_flow, "normal", steps),
        "flow, log-ratios": partial(fit_flow, "ilr", steps),
    }


def held_out(fit: Fit, table: Table, repeats: int) -> Array:
    """Log-densities (N,) of compositions left out of the fit, averaged over repeated folds."""
    number = len(table.parts)
    scores = np.zeros(number)
    for repeat in range(repeats):
        order = np.random.default_rng(repeat).permutation(number)
        for held in np.array_split(order, FOLDS):
            others = np.setdiff1d(order, held)
            torch.manual_seed(repeat)
            log_density = fit(table.parts[others], table.covariates[others])
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

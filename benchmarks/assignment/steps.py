"""How many labels the steps of a solver misplace, along the exact field of known laws.

    python -m benchmarks.assignment.steps [--samples 8000]

From the same noise, labels by few steps are compared with those by very many. The constants of
``choose_horizon`` come from here: if a step moves the corner by h deviations of the noise, a share
of about C h^p differs.
"""

from __future__ import annotations

import argparse
import math

import torch

from benchmarks.shared.records import Record
from normflows_injective.flows.assignment import (
    AssignmentPath,
    FiniteHorizon,
    Horizon,
    InfiniteHorizon,
    Simplices,
)
from normflows_injective.flows.integration import integrate, time_grid

from .targets import Target, exact_rate, ising, pair

__all__ = ["CONSTANTS", "misplaced"]

CONSTANTS = {"rk4": (0.05, 4), "midpoint": (0.2, 2), "euler": (0.6, 1)}
STEPS = {"rk4": (4, 6, 8, 12), "midpoint": (8, 16, 32), "euler": (16, 32, 64, 128)}
HORIZONS: dict[str, Horizon] = {
    "infinite": InfiniteHorizon(end=8.0),
    "finite": FiniteHorizon(end=0.6),
}
REFERENCE, ROWS = 96, 500


def misplaced(samples: int | None = None) -> Record:
    """Shares of rows whose labels differ, by law, horizon, solver and number of steps."""
    laws = {
        "Ising, 3 x 3": (ising(), 4000),
        "pairs, 2 classes": (pair(2), 20_000),
        "pairs, 16 classes": (pair(16), 8000),
    }
    rows = [
        {"law": law, "horizon": name, **entry}
        for law, (target, num) in laws.items()
        for name, horizon in HORIZONS.items()
        for entry in _shares(target, horizon, samples or num)
    ]
    return {"rows": rows}


def _shares(target: Target, horizon: Horizon, samples: int) -> list[Record]:
    """Every solver and number of steps beside very many steps of the most exact solver."""
    path = AssignmentPath(Simplices(target.variables, target.classes), horizon)
    rate = exact_rate(target, path)
    torch.manual_seed(0)
    starts = path.draw_start(samples, torch.zeros(())).split(ROWS)

    def labels(steps: int, solver: str) -> torch.Tensor:
        times = time_grid(steps, horizon.end)
        ends = [integrate(rate, start, times, solver) for start in starts]
        return path.simplices.round(torch.cat(ends))

    right, step = labels(REFERENCE, "rk4"), _distance(horizon, target.classes)
    return [
        {
            "solver": solver,
            "steps": steps,
            "h": step / steps,
            "share": float((labels(steps, solver) != right).any(1).double().mean()),
            "samples": samples,
        }
        for solver, numbers in STEPS.items()
        for steps in numbers
    ]


def _distance(horizon: Horizon, classes: int) -> float:
    """Deviations between a corner at the end and the face to another class."""
    speed = float(horizon.speeds(torch.tensor([float(classes)])))
    deviation = 1 - horizon.contraction * horizon.end
    return horizon.end * speed / deviation * math.sqrt(classes / (2 * (classes - 1)))


def main() -> None:
    """Print the shares beside the rule."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, help="for every law alike")
    for row in misplaced(parser.parse_args().samples)["rows"]:
        factor, order = CONSTANTS[row["solver"]]
        print(
            f"{row['law']:18} {row['horizon']:9} {row['solver']:9} {row['steps']:4} steps, "
            f"h {row['h']:.3f}: {row['share']:.5f}, by the rule {factor * row['h'] ** order:.5f}"
        )


if __name__ == "__main__":
    main()

"""How many digits of a log-volume survive, beside the usual Gram-matrix routes.

    python -m benchmarks.exact.precision [--draws 50] [--page docs/results/volume_precision.md]

Random 50x8 matrices of given condition number, rounded to the dtype. The truth is the Gram
determinant of the rounded matrix in 100-digit arithmetic, so that the error is that of the route
alone. Reported is the median absolute error in nats over the draws, and how often a route failed
(raised, or gave NaN, infinity or a negative determinant).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import mpmath  # comes with torch
import torch
from torch import Tensor

from benchmarks.shared.tables import publish, table
from normflows_injective.volume import log_volume

ROWS, COLUMNS = 50, 8
DTYPES = {"float32": torch.float32, "float64": torch.float64}
CONDITIONS = {"float32": (1e1, 1e3, 1e4, 1e5, 1e6), "float64": (1e2, 1e6, 1e8, 1e10, 1e12)}


def matrix_of_condition(condition: float, generator: torch.Generator) -> Tensor:
    """A float64 matrix with logarithmically spaced singular values from 1 to 1/condition."""
    draw = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    turn = torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)
    spectrum = torch.logspace(0, -1, COLUMNS, base=condition, dtype=torch.float64)
    return torch.linalg.qr(draw).Q @ spectrum.diag() @ torch.linalg.qr(turn).Q


def by_package(matrix: Tensor) -> float:
    """This package."""
    return log_volume(lambda z: z @ matrix.mT, matrix.new_zeros(1, COLUMNS)).item()


def by_cholesky(matrix: Tensor) -> float:
    """Cholesky factor of the Gram matrix."""
    return torch.linalg.cholesky(matrix.mT @ matrix).diagonal().log().sum().item()


def by_slogdet(matrix: Tensor) -> float:
    """Half the log-determinant of the Gram matrix, sign checked."""
    sign, log_det = torch.linalg.slogdet(matrix.mT @ matrix)
    return log_det.item() / 2 if sign > 0 else float("nan")


ROUTES: dict[str, Callable[[Tensor], float]] = {
    "this package": by_package,
    "Cholesky of J'J": by_cholesky,
    "slogdet of J'J": by_slogdet,
}


def truth_of(matrix: Tensor) -> float:
    """Half the log-determinant of the Gram matrix, in 100-digit arithmetic."""
    with mpmath.workdps(100):
        exact = mpmath.matrix(matrix.double().tolist())
        return float(mpmath.log(mpmath.det(exact.T * exact)) / 2)


def error_of(route: Callable[[Tensor], float], matrix: Tensor, truth: float) -> float:
    """Absolute error in nats, NaN where the route failed."""
    try:
        return abs(route(matrix) - truth)
    except torch.linalg.LinAlgError:
        return float("nan")


def cell(errors: list[float]) -> str:
    """Median error of the successful draws, and the share of failures if any."""
    values = torch.tensor(errors)
    good = values[torch.isfinite(values)]
    failed = 1 - len(good) / len(values)
    text = f"{good.median().item():.0e}" if len(good) else "-"
    return f"{text} ({failed:.0%} fail)" if failed else text


def main() -> None:
    """Measure every route, print the page and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--page", type=Path, help="page to write")
    options = parser.parse_args()
    rows = []
    for name, dtype in DTYPES.items():
        for condition in CONDITIONS[name]:
            generator = torch.Generator().manual_seed(0)
            matrices = [
                matrix_of_condition(condition, generator).to(dtype) for _ in range(options.draws)
            ]
            cases = [(matrix, truth_of(matrix)) for matrix in matrices]
            cells = [cell([error_of(r, *case) for case in cases]) for r in ROUTES.values()]
            rows.append([f"{name}, {condition:.0e}", *cells])
    errors = table(["dtype, condition number", *ROUTES], rows)
    heading = "# Precision of the log-volume\n\nMedian absolute error in nats"
    note = f"{options.draws} draws of 50x8 matrices, torch {torch.__version__}"
    command = "`python -m benchmarks.exact.precision --page docs/results/volume_precision.md`"
    publish(f"{heading}, {note}, by\n{command}.\n\n{errors}\n", options.page)


if __name__ == "__main__":
    main()

"""The page of `derivative_sweep.py`'s results."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import NamedTuple

import torch

__all__ = ["RAISES", "REFUSED", "RIGHT", "WRONG", "Row", "page"]

RIGHT, WRONG, RAISES, REFUSED = "right", "wrong", "raises", "refused by name"
SKIPPED = "-"
COLUMNS = (
    "forward product",
    "its derivative",
    "its second",
    "reverse product",
    "its derivative",
    "its second",
    "`log_volume`",
    "its derivative",
    "its second",
)


class Row(NamedTuple):
    """The verdicts on one function: of a value, its first and its second derivative.

    Attributes:
        name: Of the function.
        forward: On torch's product by forward mode, up to the first that is not right.
        reverse: On torch's product by reverse mode.
        package: On the package's log-volume.
    """

    name: str
    forward: tuple[str, ...]
    reverse: tuple[str, ...]
    package: tuple[str, ...]

    def cells(self) -> list[str]:
        """Three verdicts of each, filled up."""
        roads = (self.forward, self.reverse, self.package)
        return [cell for road in roads for cell in (*road, *[SKIPPED] * (3 - len(road)))]

    def right_everywhere(self) -> bool:
        """Whether nothing is to be said of the function."""
        return all(cell == RIGHT for cell in self.cells())


def page(rows: list[Row], tolerances: tuple[float, ...]) -> str:
    """The page of results."""
    listed = [row for row in rows if not row.right_everywhere()]
    lines = [[f"`{row.name}`", *row.cells()] for row in listed]
    if len(listed) < len(rows):
        lines = [[f"{len(rows) - len(listed)} others", *[RIGHT] * len(COLUMNS)], *lines]
    value, first, second = (f"{tolerance:.0e}" for tolerance in tolerances)
    sections = [
        "# Derivatives of torch's functions",
        f"    {_COMMAND}",
        _wrapped(
            f"Each of {len(rows)} functions of torch {torch.__version__} stands in a decoder "
            "$g(z) = (f(z W), z)$ from 2 dimensions, in float64 on the CPU. Torch alone gives the "
            "product $u^\\top g'(z) v$, in forward mode and in reverse mode, and its first and "
            "second derivative by $W$: a log-volume, its gradient and the derivative of that need "
            "them. The package gives `log_volume` and its derivatives. They are *right* if they "
            "equal an independent result: the product and the singular values of the function's "
            "central differences, and for a derivative the central difference of the result one "
            "column to the left. The bounds, relative and absolute, are "
            f"{value} for values, {first} for first and {second} for second derivatives. Each "
            "of the three roads of a row ends at its first entry that is not *right*. *Raises* is "
            "an error of torch, *refused by name* the package's `UnsupportedLayerError`."
        ),
        _wrapped(_summary(rows)),
        _table(["function", *COLUMNS], lines),
    ]
    return "\n\n".join(sections) + "\n"


_COMMAND = (
    "PYTHONPATH=tests python benchmarks/derivative_sweep.py --out docs/results/derivatives.md"
)


def _summary(rows: list[Row]) -> str:
    wrong = [
        sum(WRONG in road for road in roads)
        for roads in zip(*((row.forward, row.reverse, row.package) for row in rows), strict=True)
    ]
    orders = Counter(_order(row.package) for row in rows)
    return (
        f"Torch gives a wrong derivative without a word for {wrong[0]} functions in forward mode "
        f"and for {wrong[1]} in reverse mode; the package gives one for {wrong[2]}. The package's "
        f"log-volumes have two right derivatives for {orders[3]} functions, one for {orders[2]}, "
        f"and none for {orders[1]}. They do not exist for {orders[0]}."
    )


def _order(verdicts: tuple[str, ...]) -> int:
    """How many verdicts are right before one is not."""
    return next((at for at, one in enumerate(verdicts) if one != RIGHT), len(verdicts))


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)

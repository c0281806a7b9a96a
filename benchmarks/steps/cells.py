"""The raw figures of the cost of training steps, one cell for every model and number of probes."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

from .models import MODELS

AUTOENCODER = "autoencoder"
AUTOENCODER_COMPILED = "autoencoder compiled"
PUBLISHED = "published algorithm"
PACKAGE = "nfi"
PACKAGE_COMPILED = "nfi compiled"
VARIANTS = (AUTOENCODER_COMPILED, PUBLISHED, PACKAGE, PACKAGE_COMPILED)
FLOOR = "floor"
BFLOAT16 = ", bfloat16"  # after the name of a variant


class Cell(NamedTuple):
    """The measurements of one model with one number of probes, by variant.

    Attributes:
        model: Key of the model.
        num_probes: K.
        difference: Of the gradients, package from published algorithm, in float64.
        seconds: Of every round.
        compile_seconds: Wall clock of the first step, which compiles.
        saved_bytes: Kept for the backward pass.
        peak_bytes: On a GPU, beyond the bytes in use before the step.
        multiply_adds: Of the eager variants, and the floor.
    """

    model: str
    num_probes: int
    difference: float
    seconds: dict[str, list[float]]
    compile_seconds: dict[str, float]
    saved_bytes: dict[str, int]
    peak_bytes: dict[str, int]
    multiply_adds: dict[str, int]

    def ratio(self, variant: str) -> float | None:
        """Median time over that of the eager autoencoder in the same precision."""
        if variant not in self.seconds:
            return None
        return median(self.seconds[variant]) / median(self.seconds[_reference(variant)])

    def quartiles(self, variant: str) -> tuple[float, float]:
        """First and third quartile of the ratios of the steps of one round."""
        pairs = zip(self.seconds[variant], self.seconds[_reference(variant)], strict=True)
        ratios = [one / other for one, other in pairs]
        if len(ratios) < 2:
            return ratios[0], ratios[0]
        first, _, third = quantiles(ratios, n=4, method="inclusive")
        return first, third

    def floor(self) -> float:
        """The least multiply-adds, over those of the autoencoder."""
        return self.multiply_adds[FLOOR] / self.multiply_adds[AUTOENCODER]


class Measured(NamedTuple):
    """Cells, and the facts of the machine that they share."""

    facts: dict[str, Any]
    cells: list[Cell]


def write(measured: Measured, path: Path) -> None:
    """Write the raw figures."""
    cells = [cell._asdict() for cell in measured.cells]
    path.write_text(json.dumps({"facts": measured.facts, "cells": cells}))


def read(path: Path) -> Measured:
    """Read what `write` wrote."""
    content = json.loads(path.read_text())
    return Measured(content["facts"], [Cell(**cell) for cell in content["cells"]])


def merged(parts: list[Measured]) -> Measured:
    """Several runs as one, in the order of the models.

    Raises:
        SystemExit: If they do not belong together.
    """
    facts = parts[0].facts
    if any(part.facts != facts for part in parts):
        raise SystemExit("The files were measured under different conditions: merge none of them.")
    order = list(MODELS)
    cells = {(order.index(cell.model), cell.num_probes): cell for p in parts for cell in p.cells}
    return Measured(facts, [cells[key] for key in sorted(cells)])


def summary(cell: Cell) -> str:
    """One line for the terminal."""
    ratios = {variant: cell.ratio(variant) for variant in cell.seconds}
    parts = [f"{variant} {ratio:.2f}" for variant, ratio in ratios.items() if ratio is not None]
    return f"{cell.model}, K = {cell.num_probes}: {', '.join(parts)}, floor {cell.floor():.2f}"


def _reference(variant: str) -> str:
    return AUTOENCODER + (BFLOAT16 if variant.endswith(BFLOAT16) else "")

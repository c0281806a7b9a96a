"""Figures of reports, where matplotlib is installed, and their tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, its size in inches, unknown to pyplot."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError(
            "Plotting needs matplotlib. Install it with pip install normflows-injective[plot]."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def quantile_lines(rows: Iterable[tuple[str, Tensor]], width: int, digits: int) -> list[str]:
    """A heading, and a line for each name with three quantiles of its values."""
    lines = [f"{'':{width}}{'5 %':>11}{'median':>11}{'95 %':>11}"]
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    for name, values in rows:
        quantiles = torch.quantile(values.detach().double().cpu(), levels).tolist()
        lines.append(f"{name:{width}}" + "".join(f"{q:>11.{digits}g}" for q in quantiles))
    return lines

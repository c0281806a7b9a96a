"""Figures of the pages of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

__all__ = ["beside", "new_figure", "save"]


def new_figure(width: float, height: float) -> Any:
    """An empty figure, its size in inches."""
    return plt.figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path, dpi: int = 110) -> None:
    """Write a figure and forget it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def beside(page: Path) -> Path:
    """The figure of a page docs/results/NAME.md, which is docs/figures/NAME.png."""
    return page.parent.parent / "figures" / f"{page.stem}.png"

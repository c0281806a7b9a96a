"""Figures of reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["new_figure"]


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure, its size in inches, that pyplot knows nothing of."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError(
            "plot() needs matplotlib. Install it with pip install normflows-injective[plot]."
        ) from error
    return Figure(figsize=size, layout="constrained")

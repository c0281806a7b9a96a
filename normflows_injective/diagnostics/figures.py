"""Figures of reports, where matplotlib is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, its size in inches, unknown to pyplot."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError(
            "plot() needs matplotlib. Install it with pip install normflows-injective[plot]."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")

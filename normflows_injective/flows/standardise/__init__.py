"""Units: an elementwise layer between standardised coordinates and the columns of a table."""

from .layer import ColumnUnits, Standardise

__all__ = ["ColumnUnits", "Standardise"]


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)

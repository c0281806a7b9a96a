"""Gauges: star-like surfaces as their centre sees them, for ``RadialSurface``."""

from .ellipsoid import EllipsoidGauge
from .gauge import Gauge, HomogeneousGauge, RadiusAndSecant
from .hyperplane import HyperplaneGauge
from .implicit import ImplicitGauge
from .lp import LpGauge
from .network import NetworkRadius
from .penalties import ElasticNetGauge, GroupLassoGauge, SlopeGauge

__all__ = [
    "ElasticNetGauge",
    "EllipsoidGauge",
    "Gauge",
    "GroupLassoGauge",
    "HomogeneousGauge",
    "HyperplaneGauge",
    "ImplicitGauge",
    "LpGauge",
    "NetworkRadius",
    "RadiusAndSecant",
    "SlopeGauge",
]


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)

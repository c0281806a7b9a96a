"""Layers: every one is an ``nf.flows.Flow``."""

from importlib import import_module as _import_module
from typing import Any as _Any

from . import assignment, coupling, gauges, kernel, mixer, volume_preserving
from .assignment.lift import SimplexLift
from .composite import InjectiveComposite
from .flow_matching import FlowMatching
from .free_form import FreeFormInjection
from .injection import Injection
from .latent_blocks import latent_block
from .linear_injection import LinearInjection, Pad
from .on_coordinates import OnCoordinates
from .shapes import Reshape
from .standardise import Standardise
from .surfaces.angular_spline import AngularSpline
from .surfaces.graph_surface import GraphSurface
from .surfaces.hopf_coupling import HopfCoupling
from .surfaces.intervals import HalfLineChart, IntervalChart, LineChart
from .surfaces.product import ProductSurface
from .surfaces.radial import RadialSurface
from .surfaces.rotations import AsRotation, HopfChart
from .surfaces.simplex import SimplexFromOrthant, SimplexStickBreaking
from .surfaces.sphere import InChart, SphereChart, SphereLinear
from .surfaces.surface import Chart, SurfaceMap
from .surfaces.torus import TorusChart

__all__ = [
    "AngularSpline",
    "AsRotation",
    "Chart",
    "FlowMatching",
    "FreeFormInjection",
    "GraphSurface",
    "HalfLineChart",
    "HopfChart",
    "HopfCoupling",
    "InChart",
    "Injection",
    "InjectiveComposite",
    "IntervalChart",
    "LineChart",
    "LinearInjection",
    "OnCoordinates",
    "Pad",
    "ProductSurface",
    "RadialSurface",
    "Reshape",
    "SimplexFromOrthant",
    "SimplexLift",
    "SimplexStickBreaking",
    "SphereChart",
    "SphereLinear",
    "Standardise",
    "SurfaceMap",
    "TorusChart",
    "assignment",
    "coupling",
    "gauges",
    "kernel",
    "latent_block",
    "mixer",
    "product_flow",
    "rotation_flow",
    "star_like_flow",
    "torus_flow",
    "volume_preserving",
]


# Functions that build whole models, and so stand above the layers, with their modules.
_BUILDERS = {
    "product_flow": "product",
    "rotation_flow": "rotations",
    "star_like_flow": "star_like",
    "torus_flow": "torus",
}


def __getattr__(name: str) -> _Any:
    """The builders of whole models."""
    if name in _BUILDERS:
        return getattr(_import_module(f"..models.{_BUILDERS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)

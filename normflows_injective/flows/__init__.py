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
from .shapes import Reshape
from .standardise import Standardise
from .surfaces.angular_spline import AngularSpline
from .surfaces.graph_surface import GraphSurface
from .surfaces.radial import RadialSurface
from .surfaces.simplex import SimplexFromOrthant, SimplexStickBreaking
from .surfaces.sphere import InChart, SphereChart, SphereLinear
from .surfaces.surface import Chart, SurfaceMap

__all__ = [
    "AngularSpline",
    "Chart",
    "FlowMatching",
    "FreeFormInjection",
    "GraphSurface",
    "InChart",
    "Injection",
    "InjectiveComposite",
    "LinearInjection",
    "Pad",
    "RadialSurface",
    "Reshape",
    "SimplexFromOrthant",
    "SimplexLift",
    "SimplexStickBreaking",
    "SphereChart",
    "SphereLinear",
    "Standardise",
    "SurfaceMap",
    "assignment",
    "coupling",
    "gauges",
    "kernel",
    "latent_block",
    "mixer",
    "star_like_flow",
    "volume_preserving",
]


def __getattr__(name: str) -> _Any:
    """``star_like_flow``, which builds a whole model, and so stands above the layers."""
    if name == "star_like_flow":
        return _import_module("..models.star_like", __name__).star_like_flow
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)

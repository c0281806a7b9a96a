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
from .surfaces.hopf_coupling import HopfCoupling
from .surfaces.radial import RadialSurface
from .surfaces.rotations import AsRotation, HopfChart
from .surfaces.simplex import SimplexFromOrthant, SimplexStickBreaking
from .surfaces.sphere import InChart, SphereChart, SphereLinear
from .surfaces.surface import Chart, SurfaceMap

__all__ = [
    "AngularSpline",
    "AsRotation",
    "Chart",
    "FlowMatching",
    "FreeFormInjection",
    "GraphSurface",
    "HopfChart",
    "HopfCoupling",
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
    "rotation_flow",
    "star_like_flow",
    "volume_preserving",
]


# Functions that build a whole model, and so stand above the layers, with their modules.
_BUILDERS = {"rotation_flow": "..models.rotations", "star_like_flow": "..models.star_like"}


def __getattr__(name: str) -> _Any:
    """``rotation_flow`` and ``star_like_flow``."""
    if name in _BUILDERS:
        return getattr(_import_module(_BUILDERS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)

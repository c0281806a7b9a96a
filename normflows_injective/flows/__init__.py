"""Layers: every one is an ``nf.flows.Flow``."""

from . import assignment, coupling, gauges, kernel, mixer, volume_preserving
from .assignment.lift import SimplexLift
from .composite import InjectiveComposite
from .exact import LinearInjection, Pad
from .free_form import FreeFormInjection
from .graph_surface import GraphSurface
from .injection import Injection
from .radial import RadialSurface
from .shapes import Reshape
from .simplex import SimplexFromOrthant, SimplexStickBreaking
from .sphere import InChart, SphereChart, SphereLinear
from .star_like import star_like_flow
from .surface import Chart, SurfaceMap

__all__ = [
    "Chart",
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
    "SurfaceMap",
    "assignment",
    "coupling",
    "gauges",
    "kernel",
    "mixer",
    "star_like_flow",
    "volume_preserving",
]

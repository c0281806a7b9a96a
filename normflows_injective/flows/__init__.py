"""Layers: every one is an ``nf.flows.Flow``."""

from . import gauges
from .composite import InjectiveComposite
from .exact import LinearInjection, Pad
from .free_form import FreeFormInjection
from .injection import Injection
from .radial import RadialSurface
from .shapes import Reshape
from .sphere import InChart, SphereChart, SphereLinear
from .star_like import star_like_flow
from .surface import Chart, SurfaceMap

__all__ = [
    "Chart",
    "FreeFormInjection",
    "InChart",
    "Injection",
    "InjectiveComposite",
    "LinearInjection",
    "Pad",
    "RadialSurface",
    "Reshape",
    "SphereChart",
    "SphereLinear",
    "SurfaceMap",
    "gauges",
    "star_like_flow",
]

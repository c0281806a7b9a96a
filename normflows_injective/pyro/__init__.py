"""Components for Pyro, installed by ``pip install normflows-injective[pyro]``.

Imported as ``import normflows_injective.pyro as nfp``.
"""

try:
    import pyro as _pyro  # noqa: F401
except ImportError as error:
    raise ImportError(
        "normflows_injective.pyro needs Pyro, which is not installed. Install it with "
        "pip install normflows-injective[pyro]."
    ) from error

from .auto_flow import AutoFlow
from .auto_injective import AutoInjective
from .constraints import StarLikeConstraint
from .flow_distribution import FlowDistribution
from .flow_transform import FlowTransform
from .injective_distribution import InjectiveDistribution
from .manifold_reparam import ManifoldReparam
from .persistence import load, module, save
from .surface_distribution import OnSurface, SurfaceDistribution, UniformOnSurface

__all__ = [
    "AutoFlow",
    "AutoInjective",
    "FlowDistribution",
    "FlowTransform",
    "InjectiveDistribution",
    "ManifoldReparam",
    "OnSurface",
    "StarLikeConstraint",
    "SurfaceDistribution",
    "UniformOnSurface",
    "load",
    "module",
    "save",
]

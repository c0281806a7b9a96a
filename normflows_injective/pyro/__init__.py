"""Components for Pyro, installed by ``pip install normflows-injective[pyro]``.

Import it as ``import normflows_injective.pyro as nfp``.
"""

try:
    import pyro as _pyro  # noqa: F401
except ImportError as error:
    raise ImportError(
        "normflows_injective.pyro needs Pyro, which is not installed. Install it with "
        "pip install normflows-injective[pyro]."
    ) from error

from . import charts as _charts  # noqa: F401
from . import flows
from .flow_transform import FlowTransform
from .guides.auto_flow import AutoFlow
from .guides.auto_injective import AutoInjective
from .guides.diagnosis import diagnose
from .laws.flow_distribution import FlowDistribution
from .laws.injective_distribution import InjectiveDistribution
from .laws.surface_distribution import OnSurface, SurfaceDistribution, UniformOnSurface
from .manifold_reparam import ManifoldReparam
from .memory.persistence import load, module, save
from .supports.surfaces import StarLikeConstraint

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
    "diagnose",
    "flows",
    "load",
    "module",
    "save",
]


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)

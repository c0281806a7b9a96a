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

from .constraints import StarLikeConstraint
from .flow_distribution import FlowDistribution
from .flow_transform import FlowTransform
from .surface_distribution import OnSurface, SurfaceDistribution

__all__ = ["FlowDistribution", "FlowTransform", "OnSurface", "StarLikeConstraint", "SurfaceDistribution"]

"""Pure functions on callables: log-volumes, surrogates, probes, Jacobians."""

from ..autodiff.jacobians import ValueAndJacobian, jacobian
from .estimators import Conditional, ConjugateGradient
from .lanczos import EstimatedVolume
from .log_volumes import DecodedVolume, decode_and_log_volume, log_volume
from .normal_equations import ConjugateGradientSolution, conjugate_gradient
from .probes import draw_probes
from .surrogate import Estimator, Surrogate

__all__ = [
    "Conditional",
    "ConjugateGradient",
    "ConjugateGradientSolution",
    "DecodedVolume",
    "EstimatedVolume",
    "Estimator",
    "Surrogate",
    "ValueAndJacobian",
    "conjugate_gradient",
    "decode_and_log_volume",
    "draw_probes",
    "jacobian",
    "log_volume",
]


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)

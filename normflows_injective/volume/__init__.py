"""Pure functions on callables: log-volumes, surrogates, probes, Jacobian products."""

from ..autodiff.jacobians import jacobian
from .estimators import Conditional, ConjugateGradient
from .lanczos import EstimatedVolume
from .log_volumes import DecodedVolume, decode_and_log_volume, log_volume
from .normal_equations import conjugate_gradient
from .probes import draw_probes
from .surrogate import Estimator, Surrogate

__all__ = [
    "Conditional",
    "ConjugateGradient",
    "DecodedVolume",
    "EstimatedVolume",
    "Estimator",
    "Surrogate",
    "conjugate_gradient",
    "decode_and_log_volume",
    "draw_probes",
    "jacobian",
    "log_volume",
]

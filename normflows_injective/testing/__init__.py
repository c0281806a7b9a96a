"""The contracts of layers, gauges and laws, as checks that any suite of tests can call.

The tests of this package call the same checks. A check raises ``AssertionError`` with a sentence
that says which part of the contract is broken. The contract of a guide is in
``normflows_injective.pyro.testing``.
"""

from .gauges import GAUGE_CHECKS, GaugeCase, check_gauge
from .laws import LAW_CHECKS, LawCase, check_law
from .layers import LAYER_CHECKS, LayerCase, check_layer
from .oracles import dense_jacobian, dense_log_volume

__all__ = [
    "GAUGE_CHECKS",
    "LAW_CHECKS",
    "LAYER_CHECKS",
    "GaugeCase",
    "LawCase",
    "LayerCase",
    "check_gauge",
    "check_law",
    "check_layer",
    "dense_jacobian",
    "dense_log_volume",
]


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)

"""Networks for the fields of assignment flows, called as ``net(features, t, context)``."""

from .conditions import FieldNetwork
from .conv import ConvField
from .dense import DenseField
from .leave_one_out import LeaveOneOutField

__all__ = ["ConvField", "DenseField", "FieldNetwork", "LeaveOneOutField"]


def __dir__() -> list[str]:
    return sorted(__all__)

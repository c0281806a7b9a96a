"""Dense derivatives, the independent oracle of everything matrix-free."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from normflows_injective.testing import dense_jacobian, dense_log_volume

__all__ = ["dense_jacobian", "dense_log_volume", "numerical_jacobian"]


def numerical_jacobian(
    function: Callable[[Tensor], Tensor], point: Tensor, step: float = 1e-6
) -> Tensor:
    """Jacobians (B, out, in) by central differences in float64; knows nothing of autograd."""
    columns = []
    for index in range(point[0].numel()):
        shift = torch.zeros_like(point).flatten(1)
        shift[:, index] = step
        shift = shift.view_as(point)
        difference = (function(point + shift) - function(point - shift)) / (2 * step)
        columns.append(difference.detach().flatten(1))
    return torch.stack(columns, dim=2)

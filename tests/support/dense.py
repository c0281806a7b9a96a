"""Dense derivatives, the independent oracle of everything matrix-free."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def dense_jacobian(function: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """Jacobians (B, out, in) of a batched map, one sample and one reverse pass at a time.

    They stay on the graph, so that their gradients can serve as an oracle too.
    """
    matrices = []
    for sample in point:
        matrix = torch.autograd.functional.jacobian(
            lambda s: function(s.unsqueeze(0)).flatten(), sample, create_graph=True
        )
        matrices.append(matrix.flatten(1))
    return torch.stack(matrices)


def dense_log_volume(function: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """Log-volumes (B,) from the singular values of dense Jacobians, in float64."""
    return torch.linalg.svdvals(dense_jacobian(function, point).detach().double()).log().sum(1)


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

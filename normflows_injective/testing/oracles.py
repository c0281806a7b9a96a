"""Dense derivatives, the independent oracle of everything matrix-free."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def dense_jacobian(function: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    r"""Jacobians of a batched map, one sample and one reverse pass at a time.

    .. math:: J_{bij} = \partial f(x_b)_i / \partial x_{bj}

    They stay on the graph, so that their gradients can serve as an oracle too.

    Args:
        function: Map of batches :math:`(B, *)` to batches.
        point: Where to differentiate, shape :math:`(B, *)`.

    Returns:
        Jacobians of shape :math:`(B, D, d)`, events flattened.

    Examples:
        >>> dense_jacobian(lambda x: x.square(), torch.tensor([[1.0, 2.0]])).detach()
        tensor([[[2., 0.],
                 [0., 4.]]])
    """
    matrices = []
    for sample in point:
        matrix = torch.autograd.functional.jacobian(
            lambda s: function(s.unsqueeze(0)).flatten(), sample, create_graph=True
        )
        matrices.append(matrix.flatten(1))
    return torch.stack(matrices)


def dense_log_volume(function: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    r"""Log-volumes from the singular values of dense Jacobians, in float64.

    .. math:: V_b = \sum_i \log \sigma_i(J_b)

    Args:
        function: Map of batches :math:`(B, *)` to batches of at least as many dimensions.
        point: Where to differentiate, shape :math:`(B, *)`.

    Returns:
        Log-volumes of shape :math:`(B,)` in nats, without a graph.

    Examples:
        >>> dense_log_volume(lambda x: torch.cat([x, x], 1), torch.zeros(1, 1)).exp()
        tensor([1.4142], dtype=torch.float64)
    """
    return torch.linalg.svdvals(dense_jacobian(function, point).detach().double()).log().sum(1)


def require(holds: bool, contract: str) -> None:
    """Raise AssertionError with a sentence of the contract unless it holds."""
    if not holds:
        raise AssertionError(f"The contract is broken: {contract}.")


def require_close(actual: Tensor, expected: Tensor, contract: str, like: Tensor) -> None:
    """Raise AssertionError unless tensors agree as far as the dtype of a third lets them."""
    tolerance = 1e-9 if like.dtype == torch.float64 else 1e-3

    def message(difference: str) -> str:
        return f"The contract is broken: {contract}.\n{difference}"

    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, msg=message)

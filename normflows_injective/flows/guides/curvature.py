"""Second derivatives of a density from its gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def hessian_products(
    gradient: Callable[[Tensor], Tensor], at: Tensor, directions: Tensor, step: float
) -> Tensor:
    r"""Products (K, D) of the second derivatives at a place (D,) with directions (K, D).

    .. math:: \ell''(\theta)\, v \approx
              \frac{\nabla \ell(\theta + h v) - \nabla \ell(\theta - h v)}{2h}
    """
    slopes = [gradient(at + step * v) - gradient(at - step * v) for v in directions]
    return torch.stack(slopes) / (2 * step)

"""Rational-quadratic splines of an interval, with the identity outside."""

from __future__ import annotations

import math
from typing import Any

import torch
from normflows.utils import splines
from torch import Tensor

__all__ = ["UNIT_DERIVATIVE", "bounded_spline"]

# softplus of this, with the host's floor added, is a derivative of one.
UNIT_DERIVATIVE = math.log(math.expm1(1 - splines.DEFAULT_MIN_DERIVATIVE))


def bounded_spline(
    z: Tensor, rows: Tensor, derivatives: Tensor, bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    r"""Monotone spline of :math:`[-b, b]` for every element, the identity beyond.

    Args:
        z: Elements of any shape :math:`(*)`.
        rows: Unnormalised widths and heights of the bins, :math:`(*, 2K)` or more; what stands
            behind them is not read.
        derivatives: Unnormalised derivatives at the knots, :math:`(*, K + 1)`.
        bound: :math:`b`.
        inverse: Whether the inverse of the spline is taken.

    Returns:
        The images and the logarithms of the derivatives, both :math:`(*)`.

    References:
        Durkan et al., Neural spline flows, arXiv 1906.04032.

    Examples:
        >>> z = torch.tensor([0.5, -7.0])
        >>> knots = torch.full((2, 3), UNIT_DERIVATIVE)
        >>> image, log_derivative = bounded_spline(z, torch.zeros(2, 4), knots, 3.0, False)
        >>> bool(torch.allclose(image, z)), bool(log_derivative.abs().max() < 1e-6)
        (True, True)
    """
    num_bins = derivatives.shape[-1] - 1
    # All elements go through and those outside are replaced: without boolean indices, which
    # neither vmap nor the JIT can follow.
    inside = z.abs() <= bound
    spline: Any = splines.rational_quadratic_spline
    moved, log_derivative = spline(
        # Zero also in the place of NaN, for which the host finds no bin.
        torch.where(inside, z, torch.zeros_like(z)),
        rows[..., :num_bins],
        rows[..., num_bins : 2 * num_bins],
        derivatives,
        inverse=inverse,
        left=-bound,
        right=bound,
        bottom=-bound,
        top=bound,
    )
    zero = torch.zeros_like(log_derivative)
    return torch.where(inside, moved, z), torch.where(inside, log_derivative, zero)

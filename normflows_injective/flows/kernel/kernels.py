"""Positive-definite kernels of the scaled distance, with derivatives that stay finite.

A kernel library would be one dependency more for four closed forms, and no library promises what
a layer after an injection needs: forward mode, and a double backward that is finite and right
where the two arguments coincide.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

Kernel = Callable[[Tensor], Tensor]


def rbf(squared: Tensor) -> Tensor:
    r"""Squared exponential :math:`e^{-r^2/2}`, by squared distances :math:`r^2`."""
    return (-0.5 * squared).exp()


def matern12(squared: Tensor) -> Tensor:
    r"""Matern-1/2 :math:`e^{-r}`, by squared distances :math:`r^2`."""
    return (-_distance(squared)).exp()


def matern32(squared: Tensor) -> Tensor:
    r"""Matern-3/2 :math:`(1 + \sqrt3 r) e^{-\sqrt3 r}`, by squared distances :math:`r^2`."""
    scaled = math.sqrt(3.0) * _distance(squared)
    return (1 + scaled) * (-scaled).exp()


def matern52(squared: Tensor) -> Tensor:
    r"""Matern-5/2 :math:`(1 + \sqrt5 r + \frac53 r^2) e^{-\sqrt5 r}`, by squared distances."""
    scaled = math.sqrt(5.0) * _distance(squared)
    return (1 + scaled + scaled.square() / 3) * (-scaled).exp()


KERNELS: dict[str, Kernel] = {
    "rbf": rbf,
    "matern12": matern12,
    "matern32": matern32,
    "matern52": matern52,
}


def squared_distances(first: Tensor, second: Tensor) -> Tensor:
    r"""Squared Euclidean distances between the rows of two sets.

    .. math:: r^2_{bi} = |u_b - m|^2 + |z_i - m|^2 - 2 (u_b - m)^\top (z_i - m)

    with :math:`m` the mean of the second set. The expanded form holds no array of shape (B, N, d):
    with 200 rows, 150 points and a gradient it takes 0.8 ms whatever the dimension, where
    differences take 1.7 ms in 5 dimensions and 6.7 ms in 21. Centring keeps the digits that a
    common offset would cost.
    """
    centre = second.mean(-2, keepdim=True)
    first, second = first - centre, second - centre
    lengths = first.square().sum(-1, keepdim=True) + second.square().sum(-1).unsqueeze(-2)
    squared = lengths - 2 * first @ second.mT
    # Rounding can leave a distance of zero below zero. What is added is held constant, for a
    # clamp would cut the derivatives there, and the second ones of a smooth kernel are not zero.
    return squared + (-squared).clamp_min(0).detach()


def _distance(squared: Tensor) -> Tensor:
    # The root of zero has no derivative. Shifted by its square, 1e-6 moves a value by 1e-6 at
    # most, and every derivative at zero is finite; of the smoother Matern kernels also right.
    return (squared + 1e-12).sqrt()

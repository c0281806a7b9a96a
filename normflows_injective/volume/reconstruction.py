"""The reconstruction error of a batch."""

from __future__ import annotations

from torch import Tensor


def squared_error(x: Tensor, reconstruction: Tensor) -> Tensor:
    r"""Squared error :math:`\lVert x_b - \hat x_b \rVert^2`, (B,), of batches (B, *)."""
    # Summed without flattening, which would copy another memory format.
    squares = (x - reconstruction).square()
    return squares if squares.dim() == 1 else squares.sum(tuple(range(1, squares.dim())))

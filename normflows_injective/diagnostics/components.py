"""The reconstruction by principal components alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..modules.precision import as_factored


class LinearReconstruction(NamedTuple):
    """Squared errors (B,) of some components of the rows, and the variances along all of them."""

    errors: Tensor
    variances: Tensor


@torch.no_grad()
def linear_reconstruction(x: Tensor, dim: int) -> LinearReconstruction:
    r"""Reconstruct data (B, \*) by ``dim`` principal components of these very rows.

    No linear map has a lower mean error on them. The variances :math:`\lambda_i` are descending,
    (min(B, D),), with divisor B, so that the mean error is :math:`\sum_{i > d} \lambda_i`.
    """
    rows = as_factored(x.detach().flatten(1))
    centred = rows - rows.mean(0)
    _, scales, directions = torch.linalg.svd(centred, full_matrices=False)
    kept = directions[:dim]
    # The residual itself, not a difference of squares, which would lose the digits of a small one.
    errors = (centred - (centred @ kept.mT) @ kept).square().sum(1)
    return LinearReconstruction(errors.to(x.dtype), scales.square() / len(rows))

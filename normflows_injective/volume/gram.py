r"""Log-volumes by Cholesky factors of Gram matrices in float64, and a measure of their error.

For a tall matrix :math:`J`, (D, d), with :math:`J^\top J = G`, :math:`G \approx L L^\top` as it is
computed, and :math:`Q = J L^{-\top}`,

.. math:: \log\operatorname{vol} J = \sum_i \log L_{ii} + \tfrac12 \log\det Q^\top Q,
          \qquad \log\det Q^\top Q = \operatorname{tr} E + O(\lVert E \rVert^2), \quad
          E = Q^\top Q - I.

Without rounding :math:`E` is zero. Rounding errors of a Gram matrix grow with the square of the
condition number, and :math:`E` shows them, because :math:`J L^{-\top} w` has errors that grow with
the condition number alone. Normal vectors :math:`w_k` measure it at the cost of :math:`K` columns,

.. math:: \epsilon = \tfrac12 \sqrt{\tfrac1K \sum_k (w_k^\top E w_k)^2}, \qquad
          \mathbb E\, (w^\top E w)^2 = (\operatorname{tr} E)^2 + 2 \lVert E \rVert_F^2,

so that :math:`\epsilon` is about the error or above it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_NUM_PROBES = 4
# Numbers in the piece of a batch that a CPU keeps close by, and columns from which on half of a
# symmetric product is left out.
_PIECE = 2**17
_BLOCK = 64


class GramVolume(NamedTuple):
    """Log-volumes (B,), the measured errors (B,) of them, and the Cholesky factors' diagonals."""

    log_volume: Tensor
    error: Tensor
    diagonal: Tensor


@torch.no_grad()
def gram_volume(matrix: Tensor) -> GramVolume:
    """Log-volumes of matrices (B, D, d), in float64; errors are NaN where no factor was found."""
    count, num_rows, num_columns = matrix.shape
    size = max(1, _PIECE // max(1, num_rows * num_columns))
    if matrix.device.type != "cpu":
        size = max(1, count)
    probes = _probes(num_columns).to(matrix.device)
    # Fresh memory for every piece would cost as much as its products.
    buffer = matrix.new_empty(size, num_columns, num_rows, dtype=torch.float64)
    diagonal = matrix.new_empty(count, num_columns, dtype=torch.float64)
    error = matrix.new_empty(count, dtype=torch.float64)
    for start in range(0, count, size):
        piece = slice(start, min(start + size, count))
        columns = buffer[: piece.stop - start].copy_(matrix[piece].mT)
        factor, failed = torch.linalg.cholesky_ex(_lower_gram(columns))
        diagonal[piece] = factor.diagonal(dim1=1, dim2=2)
        images = torch.linalg.solve_triangular(factor.mT, probes, upper=True).mT @ columns
        excess = images.square().sum(2) - probes.square().sum(0)
        error[piece] = excess.square().mean(1).sqrt().div_(2).masked_fill_(failed > 0, torch.nan)
    return GramVolume(diagonal.log().sum(1), error, diagonal)


def _lower_gram(columns: Tensor) -> Tensor:
    """Gram matrices of columns (B, d, D), whose entries far above the diagonal may be anything."""
    num_columns = columns.shape[1]
    if num_columns < 2 * _BLOCK:
        return columns @ columns.mT
    gram = columns.new_zeros(len(columns), num_columns, num_columns)
    width = max(_BLOCK, num_columns // 8)
    for start in range(0, num_columns, width):
        end = min(start + width, num_columns)
        gram[:, start:end, :end] = columns[:, start:end] @ columns[:, :end].mT
    return gram


def _probes(num_columns: int) -> Tensor:
    """Normal vectors (d, K), the same ones for all matrices and at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_columns, _NUM_PROBES, generator=generator, dtype=torch.float64)

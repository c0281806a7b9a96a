"""Orthogonal maps: the factor of a matrix, remembered, and products of reflections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def orthogonal_factor(matrix: Tensor) -> Tensor:
    r"""The orthogonal factor :math:`Q` of :math:`A = QR`, unique by a positive diagonal of R."""
    q, r = torch.linalg.qr(matrix)
    return q * r.diagonal().sign()


def reflected(rows: Tensor, vectors: Tensor, back: bool = False) -> Tensor:
    r"""Rows (B, D) times :math:`H_K \cdots H_1`, or back, with reflections by vectors (K, D).

    .. math:: H_1 \cdots H_K = \prod_k (I - 2 v_k v_k^\top / |v_k|^2) = I - V^\top S^{-1} V,
              \qquad S + S^\top = V V^\top

    with S upper triangular: orthogonal for every V and so in every dtype, as a stored matrix is
    not, and several times as fast as one reflection after the other.
    """
    gram = vectors @ vectors.T
    factor = gram.triu(1) + 0.5 * torch.diag(gram.diagonal())
    # The transpose of the product has S^T in the place of S.
    system = factor if back else factor.T
    # No triangular system is solved in half precision.
    dtype = torch.promote_types(gram.dtype, torch.float32)
    products = (rows @ vectors.T).T.to(dtype)
    inner = torch.linalg.solve_triangular(system.to(dtype), products, upper=back)
    return rows - inner.T.to(rows.dtype) @ vectors


class RememberedFactor:
    """The orthogonal factor of a buffer, computed again when that is replaced or written to.

    Copies and files of it are empty, because a copied tensor counts its versions afresh.
    """

    def __init__(self) -> None:
        # One attribute, so that a thread never sees the parts of two states.
        self._known: tuple[Tensor | None, Any, Tensor | None] = (None, None, None)

    def of(self, matrix: Tensor) -> Tensor:
        """The factor of a matrix (D, D)."""
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            return orthogonal_factor(matrix)
        # Modes that watch what a network calls would see every look at the tensor.
        with torch._C.DisableTorchFunction():
            if not _counts_versions(matrix):
                return orthogonal_factor(matrix)
            state = (matrix._version, matrix.data_ptr(), matrix.dtype, matrix.device)
            source, known, factor = self._known
            if source is matrix and known == state and factor is not None:
                return factor
            # A factor made in inference mode could not be used in training.
            with torch.inference_mode(False), torch.no_grad():
                factor = orthogonal_factor(matrix)
            if _counts_versions(factor):
                self._known = (matrix, state, factor)
            return factor

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def _counts_versions(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary one without gradient, outside transforms and tracing."""
    return (
        type(tensor) is Tensor
        and not tensor.requires_grad
        and not tensor.is_inference()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )

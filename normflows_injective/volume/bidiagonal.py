r"""Gauss rules of the spectrum of :math:`J^\top J` by bidiagonalising :math:`J`.

The Lanczos process on :math:`J^\top J`, started at a unit vector :math:`v`, gives a tridiagonal
:math:`T_m`, whose eigenvalues and squared first components of the eigenvectors are nodes and
weights of the Gauss rule with :math:`m` nodes for :math:`v^\top f(J^\top J)\, v`.

Golub and Kahan's process, started at the same :math:`v`, gives orthonormal :math:`U, V` and an
upper bidiagonal :math:`B` with :math:`J V = U B`, so that :math:`V^\top J^\top J V = B^\top B =
T_m`, from as many products. Thus the singular values of :math:`B` are the square roots of the same
nodes, and its right singular vectors are the same eigenvectors. References: Golub and Kahan,
Calculating the singular values and pseudo-inverse of a matrix, 1965; Golub and Meurant, Matrices,
moments and quadrature, 1994.

Rounding differs. The computed values belong to a neighbour :math:`J + E` with
:math:`\lVert E \rVert \approx \epsilon \lVert J \rVert`, which moves no singular value by more
than that (Weyl), hence the smallest one by the fraction :math:`\epsilon \operatorname{cond} J`.
An error of :math:`\epsilon \lVert J \rVert^2` in :math:`T_m` moves its smallest eigenvalue by the
fraction :math:`\epsilon (\operatorname{cond} J)^2`, and where that exceeds one, possibly below
zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..modules.precision import factored_dtype

Product = Callable[[Tensor], Tensor]


class Bidiagonal(NamedTuple):
    """Diagonal (K, B, m), superdiagonal (K, B, m - 1), and which rules are complete (K, B)."""

    diagonal: Tensor
    superdiagonal: Tensor
    complete: Tensor


def bidiagonalise(
    jacobian_times: Product,
    transpose_times: Product,
    start: Tensor,
    data_dim: int,
    num_steps: int,
    tolerance: float,
) -> Bidiagonal:
    """Run Golub and Kahan's process from unit vectors (K, B, d), reorthogonalising fully."""
    # A process whose next vector vanishes, relative to the largest entry so far, has found an
    # invariant subspace, and its rule is complete. It goes on with zero vectors, and with diagonal
    # entries that the first row is not coupled to.
    shape, dimension = start.shape[:2], start.shape[2]
    right, left = (start.new_zeros(*shape, num_steps, n) for n in (dimension, data_dim))
    diagonal = start.new_zeros(*shape, num_steps)
    superdiagonal = start.new_zeros(*shape, num_steps - 1)
    scale = start.new_zeros(shape)
    active = torch.ones(shape, dtype=torch.bool, device=start.device)
    v = start
    for step in range(num_steps):
        right[:, :, step] = v
        u = jacobian_times(v)
        if step > 0:
            u = u - superdiagonal[:, :, step - 1, None] * left[:, :, step - 1]
        u, alpha = _orthonormalise(u, left[:, :, :step])
        if step == 0:
            diagonal[:] = alpha.unsqueeze(2)
        # A vanishing entry is a null direction of J. It ends the process but stays, to be seen.
        diagonal[:, :, step] = torch.where(active, alpha, diagonal[:, :, step])
        scale = torch.maximum(scale, alpha)
        active = active & ~(alpha <= tolerance * scale)
        if step == num_steps - 1 or not bool(active.any()):
            break
        u = u * active.unsqueeze(2)
        left[:, :, step] = u
        v, beta = _orthonormalise(
            transpose_times(u) - alpha.unsqueeze(2) * v, right[:, :, : step + 1]
        )
        scale = torch.maximum(scale, beta)
        active = active & ~(beta <= tolerance * scale)
        superdiagonal[:, :, step] = beta * active
        if not bool(active.any()):
            break
        v = v * active.unsqueeze(2)
    return Bidiagonal(diagonal, superdiagonal, ~active | (num_steps == dimension))


def gauss_rule(bidiagonal: Bidiagonal, num_nodes: int) -> tuple[Tensor, Tensor]:
    r"""Integrals (K, B) and singular values :math:`\sigma`, (K, B, n), of rules with n nodes.

    .. math:: v^\top \tfrac12 \log(J^\top J)\, v \approx \sum_i w_i \log\sigma_i
    """
    factored = factored_dtype(bidiagonal.diagonal.device)
    diagonal = bidiagonal.diagonal[:, :, :num_nodes].to(factored)
    above = bidiagonal.superdiagonal[:, :, : num_nodes - 1].to(factored)
    matrix = torch.diag_embed(diagonal) + torch.diag_embed(above, offset=1)
    # The factorisation raises on NaN; a decoder that gives NaN is to have it as its log-volume.
    finite = torch.isfinite(matrix).flatten(2).all(2)
    identity = torch.eye(num_nodes, dtype=factored, device=matrix.device)
    _, singular_values, right = torch.linalg.svd(
        torch.where(finite[..., None, None], matrix, identity)
    )
    # No weight, no contribution, also where the logarithm is infinite.
    integral = torch.xlogy(right[..., 0].square(), singular_values).sum(2)
    return torch.where(finite, integral, torch.nan), singular_values


def _orthonormalise(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors (K, B, n) of w without its parts in the bases (K, B, j, n), and the norms."""
    # The recursion that made w has removed its one large part, so what is left here is rounding.
    # Removing that is the second of the two passes that suffice.
    parts = basis @ w.unsqueeze(3)
    w = w - (basis.mT @ parts).squeeze(3)
    norm = torch.linalg.vector_norm(w, dim=2)
    return w / torch.where(norm > 0, norm, 1.0).unsqueeze(2), norm

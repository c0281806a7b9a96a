r"""Unit quaternions and rotation matrices, and the way from one to the other.

A quaternion :math:`q = (w, x, y, z)` of length one turns vectors by the matrix

.. math:: R(q) = \begin{pmatrix}
          w^2 + x^2 - y^2 - z^2 & 2(xy - wz) & 2(xz + wy) \\
          2(xy + wz) & w^2 - x^2 + y^2 - z^2 & 2(yz - wx) \\
          2(xz - wy) & 2(yz + wx) & w^2 - x^2 - y^2 + z^2 \end{pmatrix},

a quadratic form, so that :math:`q` and :math:`-q` give the same matrix to the last bit. Every
inner product :math:`\operatorname{tr}(M^\top R(q)) = q^\top S(M)\, q` is a quadratic form too,
with a symmetric matrix :math:`S(M)` of trace zero. For a rotation, :math:`S(R(q)) + I = 4 q
q^\top`: its trace is four, so its largest diagonal entry is one at least, and the row of that
entry, divided by its length, is :math:`\pm q` without any cancellation, for turns by :math:`\pi`
too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check_finite, is_readable
from .off_manifold import TOLERANCE, refuse_far, unit_vectors

# Forms of a rotation, with their event shapes.
FORMS: dict[str, tuple[int, ...]] = {"quaternion": (4,), "matrix": (3, 3)}


def multiply(p: Tensor, q: Tensor) -> Tensor:
    """Products (*, 4) of quaternions (*, 4), whose matrices are multiplied in the same order."""
    a, b, c, d = p.unbind(-1)
    w, x, y, z = q.unbind(-1)
    parts = (
        a * w - b * x - c * y - d * z,
        a * x + b * w + c * z - d * y,
        a * y - b * z + c * w + d * x,
        a * z + b * y - c * x + d * w,
    )
    return torch.stack(parts, dim=-1)


def conjugate(q: Tensor) -> Tensor:
    """Conjugates (*, 4) of quaternions (*, 4), the inverses of those of length one."""
    return torch.cat([q[..., :1], -q[..., 1:]], dim=-1)


def matrix_from_quaternion(q: Tensor) -> Tensor:
    """Matrices (*, 3, 3) of unit quaternions (*, 4), the same for both signs to the last bit."""
    w, x, y, z = q.unbind(-1)
    ww, xx, yy, zz = q.square().unbind(-1)
    xy, xz, yz, wx, wy, wz = 2 * x * y, 2 * x * z, 2 * y * z, 2 * w * x, 2 * w * y, 2 * w * z
    rows = (
        torch.stack([ww + xx - yy - zz, xy - wz, xz + wy], dim=-1),
        torch.stack([xy + wz, ww - xx + yy - zz, yz - wx], dim=-1),
        torch.stack([xz - wy, yz + wx, ww - xx - yy + zz], dim=-1),
    )
    return torch.stack(rows, dim=-2)


def symmetric_form(matrix: Tensor) -> Tensor:
    r"""The matrix S (*, 4, 4) with :math:`q^\top S q = \operatorname{tr}(M^\top R(q))`."""
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in matrix.unbind(-2))
    entries = (
        (a + e + i, h - f, c - g, d - b),
        (h - f, a - e - i, b + d, c + g),
        (c - g, b + d, e - a - i, f + h),
        (d - b, c + g, f + h, i - a - e),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in entries], dim=-2)


def upper(q: Tensor) -> Tensor:
    """Of each pair of quaternions (*, 4) that are one rotation, that with w >= 0."""
    return torch.where(q[..., :1] < 0, -q, q)


def quaternion_from_matrix(matrix: Tensor) -> Tensor:
    """Unit quaternions (*, 4) with w >= 0 of rotation matrices (*, 3, 3)."""
    outer = symmetric_form(matrix) + torch.eye(4, dtype=matrix.dtype, device=matrix.device)
    pivot = outer.detach().diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    # Not by take_along_dim, which would fix the batch of an exported program.
    row = outer.gather(-2, pivot.expand(*outer.shape[:-2], 1, 4)).squeeze(-2)
    return upper(row / torch.linalg.vector_norm(row, dim=-1, keepdim=True))


def nearest_quaternion(matrix: Tensor) -> Tensor:
    r"""Unit quaternions (*, 4) of the rotations nearest to matrices (*, 3, 3).

    The distance :math:`\lVert M - R \rVert` of Frobenius is least where
    :math:`\operatorname{tr}(M^\top R) = q^\top S q` is largest: at the first eigenvector.
    """
    # The other eigenvalues of a rotation agree, and the derivative of a full decomposition
    # divides by their differences. That of the first vector is (s - S)^+ dS q alone.
    form = symmetric_form(matrix)
    with torch.no_grad():
        values, vectors = torch.linalg.eigh(form)
        q, rest = vectors[..., -1:], vectors[..., :-1]
        gaps = values[..., -1:] - values[..., :-1]
        gaps = gaps.clamp_min(torch.finfo(gaps.dtype).eps * (1 + values.abs().amax()))
    residual = rest.mT @ (form @ q)
    moved = q + rest @ ((residual - residual.detach()) / gaps[..., None])
    return upper(moved.squeeze(-1))


def as_quaternions(x: Tensor, form: str, off_manifold: str, name: str) -> Tensor:
    """Unit quaternions (*, 4) of rotations; other points are refused or moved."""
    if form == "quaternion":
        return unit_vectors(x, off_manifold, name)
    if off_manifold == "project":
        if is_readable(x):
            check_finite(x, name)
        return nearest_quaternion(x)
    q = quaternion_from_matrix(x)
    distances = (matrix_from_quaternion(q) - x).detach().abs().amax((-2, -1))
    refuse_far(
        1 + distances,
        (x, name),
        lambda rows, index, factor: (
            f"{name} has {rows} that are no rotation matrices, the worst at index {index}, whose "
            f"entries are off by {factor - 1:.3g}, where {TOLERANCE} is allowed. Rows must be "
            "orthonormal and the determinant one; build with off_manifold='project' for the "
            "nearest rotation."
        ),
    )
    return q


def from_quaternions(q: Tensor, form: str) -> Tensor:
    """Rotations in a form, (*, 4) with w >= 0 or (*, 3, 3), of unit quaternions (*, 4)."""
    return upper(q) if form == "quaternion" else matrix_from_quaternion(q)

r"""Unit quaternions :math:`(w, x, y, z)` and the rotations of space that they stand for.

A quaternion and its negative are one rotation. Rotations by :math:`q` after :math:`p` multiply to
:math:`q p`, as their matrices do.
"""

from __future__ import annotations

import torch
from torch import Tensor


def matrix_from_quaternion(q: Tensor) -> Tensor:
    """Rotation matrices (*, 3, 3) of unit quaternions (*, 4)."""
    w, x, y, z = q.unbind(-1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], -1),
        torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], -1),
        torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1),
    ]
    return torch.stack(rows, -2)


def quaternion_from_matrix(matrix: Tensor) -> Tensor:
    r"""Unit quaternions (*, 4) of rotation matrices (*, 3, 3), without a negative w."""
    # All products 4 q_i q_j are sums of entries. The row of the largest q_i^2, which is at least
    # 1/4, is q up to a factor, and loses no digits.
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in matrix.unbind(-2))
    rows = [
        torch.stack([1 + a + e + i, h - f, c - g, d - b], -1),
        torch.stack([h - f, 1 + a - e - i, b + d, c + g], -1),
        torch.stack([c - g, b + d, 1 - a + e - i, f + h], -1),
        torch.stack([d - b, c + g, f + h, 1 - a - e + i], -1),
    ]
    products = torch.stack(rows, -2)
    pivot = products.diagonal(dim1=-2, dim2=-1).argmax(-1)
    index = pivot[..., None, None].expand(*pivot.shape, 1, 4)
    q = products.gather(-2, index).squeeze(-2)
    return without_negative(q / torch.linalg.vector_norm(q, dim=-1, keepdim=True))


def without_negative(q: Tensor) -> Tensor:
    """That one of each pair q and -q (*, 4) whose w is not negative."""
    return torch.where(q[..., :1] < 0, -q, q)


def multiply(p: Tensor, q: Tensor) -> Tensor:
    """Products p q (*, 4) of quaternions (*, 4)."""
    a, u = p[..., :1], p[..., 1:]
    b, v = q[..., :1], q[..., 1:]
    scalar = a * b - (u * v).sum(-1, keepdim=True)
    return torch.cat([scalar, a * v + b * u + torch.linalg.cross(u, v)], -1)


def conjugate(q: Tensor) -> Tensor:
    """Conjugates (*, 4) of quaternions (*, 4), the inverse rotations of unit ones."""
    return torch.cat([q[..., :1], -q[..., 1:]], -1)

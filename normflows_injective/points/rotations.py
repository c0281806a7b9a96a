"""Rotations as unit quaternions, matrices, and axes with angles."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import checks_arguments, is_readable, numbers_of
from ..flows.surfaces.quaternions import (
    matrix_from_quaternion,
    quaternion_from_matrix,
    upper,
)
from .refusals import (
    Numbers,
    check_axes,
    check_same_shape,
    check_unit,
    refuse_where,
    tolerance_of,
)


@checks_arguments
def matrices_from_quaternions(quaternions: Numbers) -> Tensor:
    r"""Turn unit quaternions into rotation matrices.

    .. math:: R = (2 w^2 - 1) I + 2 v v^\top + 2 w [v]_\times, \qquad q = (w, v)

    A quaternion and its negative are the same rotation.

    Args:
        quaternions: :math:`q` of shape (*, 4), in the order (w, x, y, z), of norm one.

    Returns:
        Matrices :math:`R` of shape (*, 3, 3), which turn columns: :math:`x \mapsto R x`.

    Raises:
        ShapeError: If the last axis is not 4.
        OffManifoldError: If a norm is not one within 1e-4. Smaller deviations are divided out.
        NonFiniteError: If a value is NaN or infinite.

    References:
        Shepperd, Journal of Guidance and Control 1, 1978.

    Examples:
        >>> matrices_from_quaternions([0.0, 0.0, 0.0, 1.0])  # half a turn about z
        tensor([[-1.,  0.,  0.],
                [ 0., -1.,  0.],
                [ 0.,  0.,  1.]])
    """
    return matrix_from_quaternion(_unit(quaternions, "quaternions", 4))


@checks_arguments
def quaternions_from_matrices(matrices: Numbers) -> Tensor:
    r"""Turn rotation matrices into unit quaternions.

    .. math:: q = \frac{k_i}{\lVert k_i \rVert}, \qquad K = 4 q q^\top, \qquad
              i = \operatorname{argmax}_j K_{jj}

    The entries of :math:`K` are sums of entries of the matrix. The row of its largest pivot, at
    least one, loses no digits for any rotation, those by half a turn included.

    Args:
        matrices: :math:`R` of shape (*, 3, 3), orthogonal with determinant one.

    Returns:
        Quaternions :math:`q` of shape (*, 4), in the order (w, x, y, z), with :math:`w \ge 0`.
        For half a turn, where w is zero, the sign means nothing.

    Raises:
        ShapeError: If the last axes are not (3, 3).
        OffManifoldError: If a matrix is no rotation within 1e-4, reflections included.
        NonFiniteError: If a value is NaN or infinite.

    References:
        Shepperd, Journal of Guidance and Control 1, 1978.

    Examples:
        >>> quaternions_from_matrices([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        tensor([0.7071, 0.0000, 0.0000, 0.7071])
    """
    matrices = numbers_of(matrices, "matrices")
    check_axes(matrices, (3, 3), "matrices")
    _check_rotations(matrices)
    return quaternion_from_matrix(matrices)


@checks_arguments
def quaternions_from_axis_angle(axes: Numbers, angles: Numbers) -> Tensor:
    r"""Turn axes with angles into unit quaternions.

    .. math:: q = (\cos\tfrac\alpha2,\; a \sin\tfrac\alpha2)

    Args:
        axes: :math:`a` of shape (*, 3), of norm one.
        angles: :math:`\alpha` of shape (*) in radians, counter-clockwise seen against the axis.

    Returns:
        Quaternions :math:`q` of shape (*, 4), in the order (w, x, y, z). A whole turn changes
        their sign, and no rotation.

    Raises:
        ShapeError: If the last axis of the axes is not 3, or there is not one angle for each.
        OffManifoldError: If the norm of an axis is not one within 1e-4.
        NonFiniteError: If a value is NaN or infinite.

    References:
        Shepperd, Journal of Guidance and Control 1, 1978.

    Examples:
        >>> quaternions_from_axis_angle([[1.0, 0.0, 0.0]], [torch.pi / 3])
        tensor([[0.8660, 0.5000, 0.0000, 0.0000]])
    """
    axes, angles = _unit(axes, "axes", 3), numbers_of(angles, "angles")
    check_same_shape(angles.shape, axes.shape[:-1], "angles")
    halves = (angles / 2).unsqueeze(-1)
    parts = halves.sin() * axes
    return torch.cat([halves.cos().to(parts.dtype), parts], -1)


@checks_arguments
def axis_angle_from_quaternions(quaternions: Numbers) -> tuple[Tensor, Tensor]:
    r"""Turn unit quaternions into axes with angles.

    .. math:: a = \frac v{\lVert v \rVert}, \qquad
              \alpha = 2 \operatorname{atan2}(\lVert v \rVert, w), \qquad q = (w, v), \; w \ge 0

    At the identity the axis is z and neither has a gradient; for half a turn an axis and its
    negative mean the same.

    Args:
        quaternions: :math:`q` of shape (*, 4), in the order (w, x, y, z), of norm one.

    Returns:
        Axes :math:`a` of shape (*, 3) and angles :math:`\alpha` of shape (*) in radians, from 0
        to :math:`\pi`.

    Raises:
        ShapeError: If the last axis is not 4.
        OffManifoldError: If a norm is not one within 1e-4.
        NonFiniteError: If a value is NaN or infinite.

    References:
        Shepperd, Journal of Guidance and Control 1, 1978.

    Examples:
        >>> axis_angle_from_quaternions([0.0, 0.0, 0.6, 0.8])
        (tensor([0.0000, 0.6000, 0.8000]), tensor(3.1416))
    """
    q = upper(_unit(quaternions, "quaternions", 4))
    w, v = q[..., 0], q[..., 1:]
    is_identity = (v == 0).all(-1, keepdim=True)
    v = torch.where(is_identity, v.new_tensor([0.0, 0.0, 1.0]), v)
    # The norm is taken of a scaled vector, whose squares do not underflow near the identity.
    scale = v.detach().abs().amax(-1, keepdim=True)
    scaled = v / scale
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    sine = torch.where(is_identity, 0, norm * scale)[..., 0]
    return scaled / norm, 2 * torch.atan2(sine, w)


def _unit(values: Numbers, name: str, width: int) -> Tensor:
    """Vectors (*, D) whose norm must be one, divided by it."""
    vectors = numbers_of(values, name)
    check_axes(vectors, (width,), name)
    check_unit(vectors, name)
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)


def _check_rotations(matrices: Tensor) -> None:
    """Raise OffManifoldError unless matrices (*, 3, 3) are orthogonal, with determinant one."""
    if not is_readable(matrices):
        return
    wide = matrices.detach().to(torch.promote_types(matrices.dtype, torch.float32))
    identity = torch.eye(3, dtype=wide.dtype, device=wide.device)
    errors = (wide @ wide.mT - identity).abs().amax((-2, -1))
    refuse_where(
        ~(errors <= 2 * tolerance_of(matrices)),
        "matrices must be rotations, with R R^T - I zero",
        errors,
        "Give orthonormal rows; torch.linalg.svd finds the nearest ones.",
    )
    determinants = torch.linalg.det(wide)
    refuse_where(
        determinants < 0,
        "matrices must be rotations, with determinant one",
        determinants,
        "These are reflections, which no quaternion describes: change the sign of one column, or "
        "look for a left-handed frame.",
    )

"""Quaternions, matrices and axes with angles agree with the exponential map and with scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from support.points import double, on_sphere
from support.seeds import seeded_generator

from normflows_injective import points
from normflows_injective.errors import NonFiniteError, OffManifoldError, ShapeError
from normflows_injective.flows.surfaces.quaternions import (
    conjugate,
    matrix_from_quaternion,
    multiply,
)

DTYPES = [torch.float32, torch.float64]


def cross_matrices(v):
    """Matrices (N, 3, 3) of the cross products with vectors (N, 3)."""
    return torch.stack([torch.linalg.cross(v, e.expand_as(v)) for e in torch.eye(3).to(v)], -1)


def special(dtype):
    """Axes and angles: the identity, small turns, all but half a turn and half a turn itself."""
    axes = torch.cat([torch.eye(3), -torch.eye(3), on_sphere(20, 3)]).to(torch.float64)
    angles = double([0.0, 1e-12, 1e-3, 1.0, 3.0, math.pi - 1e-9, math.pi])
    axes, angles = axes.repeat_interleave(len(angles), 0), angles.repeat(len(axes))
    return axes.to(dtype), angles.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices_are_exponentials_of_cross_products(dtype):
    axes, angles = special(dtype)
    quaternions = points.quaternions_from_axis_angle(axes, angles)
    found = points.matrices_from_quaternions(quaternions)
    vectors = axes.double() * angles.double()[:, None]
    expected = torch.linalg.matrix_exp(cross_matrices(vectors))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_quaternions_are_those_of_scipy():
    axes, angles = special(torch.float64)
    quaternions = points.quaternions_from_axis_angle(axes, angles)
    oracle = Rotation.from_rotvec((axes * angles[:, None]).numpy())
    expected = torch.from_numpy(np.roll(oracle.as_quat(), 1, axis=1))
    inner = (quaternions * expected).sum(1).abs()
    torch.testing.assert_close(inner, torch.ones_like(inner), rtol=0, atol=1e-15)
    matrices = torch.from_numpy(oracle.as_matrix())
    torch.testing.assert_close(points.matrices_from_quaternions(expected), matrices)
    found = points.quaternions_from_matrices(matrices)
    inner = (found * expected).sum(1).abs()
    torch.testing.assert_close(inner, torch.ones_like(inner), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quaternions_come_back_from_matrices(dtype):
    """To rounding in every component, for all rotations: no square root of a difference."""
    random = torch.nn.functional.normalize(torch.randn(500, 4, dtype=dtype), dim=1)
    axes, angles = special(dtype)
    for q in (random, points.quaternions_from_axis_angle(axes, angles)):
        found = points.quaternions_from_matrices(points.matrices_from_quaternions(q))
        assert bool((found[:, 0] >= 0).all())
        signs = (found * q).sum(1, keepdim=True).sign()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found * signs, q, rtol=0, atol=6 * eps)
        norms = found.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=3 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_axes_and_angles_come_back(dtype):
    axes, angles = special(dtype)
    q = points.quaternions_from_axis_angle(axes, angles)
    for rotations in (q, -q):
        found_axes, found_angles = points.axis_angle_from_quaternions(rotations)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found_angles, angles, rtol=6 * eps, atol=0)
        turned, half = angles > 0, angles > 3.14
        torch.testing.assert_close(found_axes[turned & ~half], axes[turned & ~half])
        inner = (found_axes * axes).sum(1)[half].abs()
        torch.testing.assert_close(inner, torch.ones_like(inner))


def test_the_identity_has_some_axis():
    axis, angle = points.axis_angle_from_quaternions([[1.0, 0.0, 0.0, 0.0], [-1.0, 0, 0, 0]])
    assert axis.tolist() == 2 * [[0.0, 0.0, 1.0]]
    assert angle.tolist() == [0.0, 0.0]


def test_products_of_quaternions_are_products_of_matrices():
    p, q = torch.nn.functional.normalize(torch.randn(2, 50, 4, dtype=torch.float64), dim=-1)
    both = matrix_from_quaternion(multiply(p, q))
    torch.testing.assert_close(both, matrix_from_quaternion(p) @ matrix_from_quaternion(q))
    torch.testing.assert_close(
        matrix_from_quaternion(conjugate(q)), matrix_from_quaternion(q).transpose(1, 2)
    )
    torch.testing.assert_close(multiply(q, conjugate(q))[:, 0], torch.ones(50).double())


def test_gradients_are_those_of_the_maps_and_finite_at_special_points():
    generator = seeded_generator(0)
    q = torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_()

    def unit(q):
        return q / q.norm(dim=-1, keepdim=True)

    assert torch.autograd.gradcheck(lambda q: points.matrices_from_quaternions(unit(q)), q)
    assert torch.autograd.gradcheck(lambda q: points.axis_angle_from_quaternions(unit(q)), q)
    assert torch.autograd.gradcheck(
        lambda q: points.quaternions_from_matrices(points.matrices_from_quaternions(unit(q))), q
    )
    axes, angles = (part.clone().requires_grad_() for part in special(torch.float64))
    q = points.quaternions_from_axis_angle(axes, angles)
    matrices = points.matrices_from_quaternions(q)
    parts = (points.quaternions_from_matrices(matrices), *points.axis_angle_from_quaternions(q))
    for grad in torch.autograd.grad(sum(part.sum() for part in parts), (axes, angles)):
        assert bool(grad.isfinite().all())


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_any_batch_shape_is_taken(shape):
    q = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(*shape, 4)
    matrices = points.matrices_from_quaternions(q)
    assert matrices.shape == (*shape, 3, 3)
    assert points.quaternions_from_matrices(matrices).shape == q.shape
    axes, angles = points.axis_angle_from_quaternions(q)
    assert (axes.shape, angles.shape) == ((*shape, 3), shape)
    assert points.quaternions_from_axis_angle(axes, angles).shape == q.shape


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: points.matrices_from_quaternions([[2.0, 0.0, 0.0, 0.0]]), OffManifoldError,
         r"quaternions must have norm one, got 2 at index \[0\], and 1 of 1"),
        (lambda: points.matrices_from_quaternions([1.0, 0.0, 0.0]), ShapeError, r"\(\*, 4\)"),
        (lambda: points.quaternions_from_matrices(torch.eye(2)), ShapeError, r"\(\*, 3, 3\)"),
        (lambda: points.quaternions_from_matrices(torch.ones(3)), ShapeError, r"\(\*, 3, 3\)"),
        (lambda: points.quaternions_from_matrices([torch.eye(3).tolist(), 3 * [[1.0] * 3]]),
         OffManifoldError, r"matrices must be rotations.* at index \[1\], and 1 of 2"),
        (lambda: points.quaternions_from_matrices(-torch.eye(3)), OffManifoldError,
         "determinant one, got -1.* reflections"),
        (lambda: points.quaternions_from_matrices(torch.full((3, 3), torch.nan)), NonFiniteError,
         "matrices"),
        (lambda: points.quaternions_from_axis_angle([0.0, 0.0, 2.0], 1.0), OffManifoldError,
         "axes must have norm one"),
        (lambda: points.quaternions_from_axis_angle(torch.eye(3), [1.0]), ShapeError,
         r"angles must have one value for every point, of shape \(3,\)"),
        (lambda: points.axis_angle_from_quaternions([0.0] * 4), OffManifoldError, "got 0"),
    ],
)  # fmt: skip
def test_what_is_no_rotation_is_refused_by_name(call, error, text):
    with pytest.raises(error, match=text):
        call()

"""Gradients for all parameters at once, and their comparison."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradients(scalar: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradient for every parameter, zero where the scalar does not depend on one."""
    if not scalar.requires_grad:
        return tuple(torch.zeros_like(p) for p in parameters)
    return torch.autograd.grad(
        scalar, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def directional_derivatives(
    values: Tensor, parameters: Sequence[Tensor], directions: Sequence[Tensor]
) -> Tensor:
    """Derivative of every one of N values along one direction in parameter space, shape (N,)."""
    weights = torch.zeros_like(values, requires_grad=True)
    pulled = torch.autograd.grad(values, parameters, weights, create_graph=True, allow_unused=True)
    along = sum((p * d).sum() for p, d in zip(pulled, directions, strict=True) if p is not None)
    return torch.autograd.grad(along, weights)[0]


def assert_gradients_close(
    actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float
) -> None:
    """Compare gradients parameter by parameter, on the scale of the largest entry of all."""
    scale = max(float(e.detach().abs().max()) for e in expected)
    assert scale > 1e-3, "the expected gradient is zero: the comparison would be empty"
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(
            a, e, rtol=0, atol=tolerance * scale, msg=lambda m, i=index: f"parameter {i}: {m}"
        )

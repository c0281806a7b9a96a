r"""Matrix-free solution of :math:`(J^\top J)\, s = v` for a batch of decoder Jacobians."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..autodiff.products import event_rows
from ..checks import check_positive, checks_arguments


class ConjugateGradientSolution(NamedTuple):
    """Solution (K, B, *), true relative residuals (K, B), and the number of iterations."""

    solution: Tensor
    residual: Tensor
    iterations: int


@checks_arguments
def conjugate_gradient(
    product: Callable[[Tensor], Tensor], v: Tensor, max_iterations: int, tolerance: float
) -> ConjugateGradientSolution:
    r"""Solve symmetric positive definite systems :math:`A s = v`, one per probe and sample.

    Every system has step sizes of its own, and stops moving once its residual is below
    ``tolerance`` :math:`\cdot \lVert v \rVert`. In exact arithmetic :math:`d` iterations suffice.

    Args:
        product: :math:`p \mapsto A p` on tensors of shape :math:`(K, B, *)`.
        v: Right-hand sides of shape :math:`(K, B, *)`.
        max_iterations: Bound on the iterations.
        tolerance: Relative residual at which a system counts as solved.

    Returns:
        :class:`ConjugateGradientSolution`; an unsolved system shows in ``residual``.

    References:
        Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, 1952;
        used for log-volumes by rectangular flows, arXiv 2106.01413.

    Examples:
        >>> conjugate_gradient(lambda p: 4 * p, torch.ones(1, 1, 2), 2, 1e-6).solution
        tensor([[[0.2500, 0.2500]]])
    """
    check_positive(tolerance, "tolerance")
    solution, residual, direction = torch.zeros_like(v), v, v
    norm = _inner(v, v)
    threshold = norm * tolerance**2
    iterations = 0
    while iterations < max_iterations and bool((norm > threshold).any()):
        image = product(direction)
        curvature = _inner(direction, image)
        # A solved (or singular) system gets step zero instead of 0/0.
        moving = (norm > threshold) & (curvature > 0)
        step = torch.where(moving, norm / torch.where(moving, curvature, 1.0), 0.0)
        solution = solution + _scale(step, direction)
        residual = residual - _scale(step, image)
        updated = _inner(residual, residual)
        momentum = torch.where(moving, updated / torch.where(moving, norm, 1.0), 0.0)
        direction = residual + _scale(momentum, direction)
        norm = torch.where(moving, updated, norm)
        iterations += 1
    # The recursion's own residual drifts away from the true one in low precision.
    true = v - product(solution) if iterations else v
    squared, scale = _inner(true, true), _inner(v, v)
    # Probes of width zero are solved by nothing: their residual is 0, not 0/0.
    relative = (squared / torch.where(scale > 0, scale, 1.0)).sqrt()
    return ConjugateGradientSolution(solution, relative, iterations)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return event_rows(a * b).sum(2)


def _scale(step: Tensor, v: Tensor) -> Tensor:
    return step.view(*step.shape, *[1] * (v.dim() - 2)) * v

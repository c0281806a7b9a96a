r"""A normal fit along the path of an optimiser (Zhang et al., Pathfinder, arXiv 2108.03782).

L-BFGS climbs the log-joint density :math:`\ell` from several points. Its path leads from the tails
through the bulk of the posterior to a mode, which in many dimensions, or next to a singularity of
the density, is no typical point. Along the path normal laws

.. math:: N\big(\theta + H \nabla \ell(\theta),\; H\big), \qquad H \approx (-\ell'')^{-1}

are fitted, and that of the largest evidence bound is taken. For few latents H comes from the dense
matrix of second derivatives, whose eigenvalues are taken by their absolute values. For many it is
the estimate of the optimiser itself: from pairs of steps s and changes of the gradient y, applied
to a diagonal :math:`\alpha` that follows

.. math:: \alpha \leftarrow b \Big/
          \Big( \frac{a}{\alpha} + y^2 - \frac{a s^2}{c\, \alpha^2} \Big), \qquad
          a = \textstyle\sum y^2 \alpha, \quad b = s^\top y, \quad c = \sum s^2 / \alpha
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import NonFiniteError
from .log_joint import LogJoint
from .normal_fit import NormalFit

# The largest number of latents with a dense matrix of second derivatives, and with a covariance.
_DENSE, _MATRIX = 40, 256
_PATHS, _STEPS, _HISTORY = 3, 60, 10
_FITS, _DRAWS, _LAST_DRAWS = 5, 16, 200
# Bounds of the precision in any direction, and the step of its finite differences.
_FLATTEST, _SHARPEST, _STEP = 0.1, 1e8, 1e-3


class Point(NamedTuple):
    """A place (D,) on a path, and the density and its gradient (D,) there."""

    at: Tensor
    value: float
    gradient: Tensor


def pathfinder(log_joint: LogJoint, start: Tensor) -> NormalFit:
    """The normal law of the largest evidence bound along several paths from latents (D,)."""
    generator = torch.Generator().manual_seed(0)
    fits = []
    for index in range(_PATHS):
        noise = torch.randn(len(start), generator=generator).to(start)
        path = _climb(log_joint, start + (noise if index else 0))
        fits += [
            _measured(log_joint, fit, _DRAWS, generator) for fit in _fits_along(log_joint, path)
        ]
    finite = [fit for fit in fits if math.isfinite(fit.elbo)]
    if not finite:
        raise NonFiniteError(
            "No normal fit along the paths of the optimiser has a finite evidence bound. Start "
            "elsewhere by init_loc_fn, or leave warm_start out."
        )
    best = max(finite, key=lambda fit: fit.elbo)
    best = _measured(log_joint, best, _LAST_DRAWS, generator)
    return best._replace(source=f"the best of {len(finite)} fits along {_PATHS} paths")


def _climb(log_joint: LogJoint, start: Tensor) -> list[Point]:
    """The path of L-BFGS, to a mode or to where the density is no finite number."""
    at = start.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [at], max_iter=1, history_size=_HISTORY, line_search_fn="strong_wolfe"
    )
    path: list[Point] = []

    def closure() -> Tensor:
        value, gradient = log_joint.gradient(at)
        at.grad = -gradient
        return -value

    for _ in range(_STEPS):
        value, gradient = log_joint.gradient(at)
        point = Point(at.detach().clone(), float(value), gradient)
        if not (math.isfinite(point.value) and bool(gradient.isfinite().all())):
            break
        if path and point.value <= path[-1].value:
            break
        path.append(point)
        optimizer.step(closure)
    return path


def _fits_along(log_joint: LogJoint, path: list[Point]) -> list[NormalFit]:
    """Normal fits at places that are spread over a path."""
    if not path:
        return []
    count = min(_FITS, len(path))
    chosen = {round(k * (len(path) - 1) / max(1, count - 1)) for k in range(count)}
    estimate = _InverseCurvature(len(path[0].at), path[0].gradient)
    fits = []
    for index, point in enumerate(path):
        if index:
            estimate.learn(path[index - 1], point)
        if index not in chosen:
            continue
        covariance = _dense(log_joint, point.at)
        if covariance is None:
            covariance = estimate.matrix()
        move = (
            covariance @ point.gradient if covariance.dim() == 2 else covariance * point.gradient
        )
        fits += [NormalFit(mean, covariance) for mean in (point.at, point.at + move)]
    return fits


def _dense(log_joint: LogJoint, at: Tensor) -> Tensor | None:
    """The inverse (D, D) of the second derivatives by absolute eigenvalues, for few latents."""
    dim = len(at)
    if dim > _DENSE:
        return None
    step = _STEP * (1 + float(at.abs().amax()))
    sides = [
        [log_joint.gradient(at + sign * step * axis)[1] for sign in (1, -1)]
        for axis in torch.eye(dim, dtype=at.dtype, device=at.device)
    ]
    hessian = torch.stack([(up - down) / (2 * step) for up, down in sides])
    if not bool(hessian.isfinite().all()):
        return None
    values, vectors = torch.linalg.eigh(-(hessian + hessian.mT) / 2)
    spread = values.abs().clamp(_FLATTEST, _SHARPEST).reciprocal()
    return (vectors * spread) @ vectors.mT


class _InverseCurvature:
    """The estimate of the inverse curvature from the steps of a path."""

    def __init__(self, dim: int, gradient: Tensor) -> None:
        self.dim = dim
        self.diagonal = torch.ones_like(gradient)
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def learn(self, before: Point, after: Point) -> None:
        """Take in a step, if the density is concave along it."""
        s, y = after.at - before.at, before.gradient - after.gradient
        b = s @ y
        if float(b) <= 1e-10 * float(y @ y):
            return
        a, c = y.square() @ self.diagonal, s.square() @ self.diagonal.reciprocal()
        inverse = a / self.diagonal + y.square() - a * s.square() / (c * self.diagonal.square())
        diagonal = b / inverse
        if bool((diagonal > 0).all()) and bool(diagonal.isfinite().all()):
            self.diagonal = diagonal
        self.pairs.append((s, y))

    def matrix(self) -> Tensor:
        """The estimate (D, D), or its diagonal (D,) for many latents."""
        if self.dim > _MATRIX:
            return self.diagonal.clamp(1 / _SHARPEST, 1 / _FLATTEST)
        matrix = self._times(torch.eye(self.dim).to(self.diagonal))
        values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
        return (vectors * values.clamp(1 / _SHARPEST, 1 / _FLATTEST)) @ vectors.mT

    def _times(self, columns: Tensor) -> Tensor:
        """The product of the estimate with columns (D, n), by the recursion of two loops."""
        kept = []
        for s, y in reversed(self.pairs):
            weight = (s @ columns) / (s @ y)
            columns = columns - torch.outer(y, weight)
            kept.append(weight)
        columns = self.diagonal.unsqueeze(1) * columns
        for (s, y), weight in zip(self.pairs, reversed(kept), strict=True):
            columns = columns + torch.outer(s, weight - (y @ columns) / (s @ y))
        return columns


@torch.no_grad()
def _measured(
    log_joint: LogJoint, fit: NormalFit, count: int, generator: torch.Generator
) -> NormalFit:
    """A fit with its evidence bound, from so many draws."""
    dim, root = len(fit.mean), fit.root
    normal = torch.randn(count, dim, generator=generator).to(fit.mean)
    draws = fit.mean + (normal * root if root.dim() == 1 else normal @ root.mT)
    log_det = (root if root.dim() == 1 else root.diagonal()).log().sum()
    log_q = -0.5 * (normal.square().sum(1) + dim * math.log(2 * math.pi)) - log_det
    log_p = torch.stack([log_joint(draw) for draw in draws])
    values = (log_p - log_q).double()
    return fit._replace(elbo=float(values.mean()), error=float(values.std() / count**0.5))

r"""A normal fit along the path of an optimiser (Zhang et al., Pathfinder, arXiv 2108.03782).

L-BFGS climbs the log-joint density :math:`\ell` from several points. Its path leads from the tails
through the bulk of the posterior to a mode, which in many dimensions, or next to a singularity of
the density, is no typical point. Along the path normal laws

.. math:: N\big(\theta + H \nabla \ell(\theta),\; H\big), \qquad H \approx (-\ell'')^{-1}

are fitted, and that of the largest evidence bound is taken. H is the estimate of the optimiser
itself: from pairs of steps s and changes of the gradient y, applied to a diagonal :math:`\alpha`
that follows

.. math:: \alpha \leftarrow b \Big/
          \Big( \frac{a}{\alpha} + y^2 - \frac{a s^2}{c\, \alpha^2} \Big), \qquad
          a = \textstyle\sum y^2 \alpha, \quad b = s^\top y, \quad c = \sum s^2 / \alpha

For up to a hundred latents laws with the dense matrix of second derivatives, whose eigenvalues are
taken by their absolute values, are tried as well, at the places of the best of these fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...errors import NonFiniteError
from .curvature import hessian_products
from .normal_fit import LARGEST_COVARIANCE, NormalFit

# The largest number of latents with a dense matrix of second derivatives.
_DENSE = 100
_PATHS, _STEPS, _HISTORY = 3, 60, 10
_FITS, _DRAWS = 5, 16
_FINALISTS, _LAST_DRAWS = 4, 100
# Places of the best fits at which the second derivatives are taken.
_REFINED = 2
# Bounds of the precision in any direction, and the step of its finite differences.
_FLATTEST, _SHARPEST, _STEP = 0.1, 1e8, 1e-3


class Density(Protocol):
    """A log-density of latents (D,), up to a constant."""

    def __call__(self, latent: Tensor) -> Tensor:
        """Log-density, 0-dimensional, in nats."""

    def gradient(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density, 0-dimensional, and its gradient (D,)."""


class Point(NamedTuple):
    """A place (D,) on a path, and the density and its gradient (D,) there."""

    at: Tensor
    value: float
    gradient: Tensor


def pathfinder(log_joint: Density, start: Tensor) -> NormalFit:
    """The normal law of the largest evidence bound along several paths from latents (D,)."""
    generator = torch.Generator().manual_seed(0)

    def judged(fit: NormalFit) -> NormalFit:
        return _measured(log_joint, fit, _DRAWS, generator)

    trials: list[tuple[NormalFit, Point]] = []
    for index in range(_PATHS):
        noise = torch.randn(len(start), generator=generator).to(start)
        path = _climb(log_joint, start + (noise if index else 0))
        for point, covariance in _estimates_along(path):
            trials += [(judged(fit), point) for fit in _fits_at(point, covariance)]
    trials.sort(key=lambda trial: trial[0].elbo, reverse=True)
    fits = [fit for fit, _ in trials if fit.elbo > -math.inf]
    places = {id(point): point for _, point in trials[: 2 * _REFINED]}
    for point in [*places.values()][:_REFINED]:
        dense = _dense(log_joint, point.at)
        if dense is not None:
            fits += [judged(fit) for fit in _fits_at(point, dense)]
    if not fits:
        raise NonFiniteError(
            "No normal fit along the paths of the optimiser has a finite evidence bound. Start "
            "elsewhere by init_loc_fn, or leave warm_start out."
        )
    # Few draws choose who is judged by many.
    fits.sort(key=lambda fit: fit.elbo, reverse=True)
    final = [_measured(log_joint, fit, _LAST_DRAWS, generator) for fit in fits[:_FINALISTS]]
    best = max(final, key=lambda fit: fit.elbo)
    return best._replace(source=f"the best of {len(fits)} fits along {_PATHS} paths")


def _at(log_joint: Density, at: Tensor) -> Point:
    """Density and gradient at a place, minus infinity where the model has none."""
    try:
        value, gradient = log_joint.gradient(at)
    # Laws refuse parameters that have overflowed.
    except ValueError:
        return Point(at.detach().clone(), -math.inf, torch.zeros_like(at))
    return Point(at.detach().clone(), float(value), gradient)


def _climb(log_joint: Density, start: Tensor) -> list[Point]:
    """The path of L-BFGS, to a mode or to where the density is no finite number."""
    at = start.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [at], max_iter=1, history_size=_HISTORY, line_search_fn="strong_wolfe"
    )
    path: list[Point] = []
    seen: list[Point] = []

    def here() -> Point:
        # A step begins and ends at places that a line search has been to.
        for point in reversed(seen):
            if torch.equal(point.at, at):
                return point
        seen.append(_at(log_joint, at))
        return seen[-1]

    def closure() -> Tensor:
        point = here()
        at.grad = -point.gradient
        return at.new_tensor(-point.value)

    for _ in range(_STEPS):
        point = here()
        if not (math.isfinite(point.value) and bool(point.gradient.isfinite().all())):
            break
        if path and point.value <= path[-1].value:
            break
        path.append(point)
        optimizer.step(closure)
    return path


def _estimates_along(path: list[Point]) -> Iterator[tuple[Point, Tensor]]:
    """Places that are spread over a path, with the optimiser's covariances (D, D) or (D,)."""
    count = min(_FITS, len(path))
    chosen = {round(k * (len(path) - 1) / max(1, count - 1)) for k in range(count)}
    for index, point in enumerate(path):
        if index == 0:
            estimate = _InverseCurvature(point.gradient)
        else:
            estimate.learn(path[index - 1], point)
        if index in chosen:
            yield point, estimate.matrix()


def _fits_at(point: Point, covariance: Tensor) -> list[NormalFit]:
    """Normal laws around a place and around the end of a step of Newton from there."""
    is_matrix = covariance.dim() == 2
    move = covariance @ point.gradient if is_matrix else covariance * point.gradient
    return [NormalFit(mean, covariance) for mean in (point.at, point.at + move)]


def _dense(log_joint: Density, at: Tensor) -> Tensor | None:
    """The inverse (D, D) of the second derivatives by absolute eigenvalues, for few latents."""
    if len(at) > _DENSE:
        return None
    step = _STEP * (1 + float(at.abs().amax()))
    axes = torch.eye(len(at), dtype=at.dtype, device=at.device)
    hessian = hessian_products(lambda place: _at(log_joint, place).gradient, at, axes, step)
    if not bool(hessian.isfinite().all()):
        return None
    values, vectors = torch.linalg.eigh(-(hessian + hessian.mT) / 2)
    spread = values.abs().clamp(_FLATTEST, _SHARPEST).reciprocal()
    return (vectors * spread) @ vectors.mT


class _InverseCurvature:
    """The estimate of the inverse curvature from the steps of a path."""

    def __init__(self, gradient: Tensor) -> None:
        self.dim = len(gradient)
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
        if self.dim > LARGEST_COVARIANCE:
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
    log_joint: Density, fit: NormalFit, count: int, generator: torch.Generator
) -> NormalFit:
    """A fit with its evidence bound, from so many draws."""
    dim, root = len(fit.mean), fit.root
    normal = torch.randn(count, dim, generator=generator).to(fit.mean)
    draws = fit.mean + (normal * root if root.dim() == 1 else normal @ root.mT)
    log_det = (root if root.dim() == 1 else root.diagonal()).log().sum()
    log_q = -0.5 * (normal.square().sum(1) + dim * math.log(2 * math.pi)) - log_det
    log_p = torch.stack([_value(log_joint, draw) for draw in draws])
    values = (log_p - log_q).double()
    mean = float(values.mean())
    elbo = -math.inf if math.isnan(mean) else mean
    return fit._replace(elbo=elbo, error=float(values.std() / count**0.5))


def _value(log_joint: Density, at: Tensor) -> Tensor:
    try:
        return log_joint(at)
    except ValueError:
        return at.new_tensor(-math.inf)

r"""The contract of a gauge: a star-like surface as its centre sees it.

A star-like surface meets every ray :math:`\{s u : s > 0\}` once, at :math:`x = r(u) u`. With
:math:`\psi` the angle between the ray and the surface's normal, relative to the measure
:math:`d\omega` of the sphere,

.. math:: d\mathcal H = r^{D-1} \sec\psi\, d\omega, \qquad
          \log\sec\psi = \tfrac12 \log\big(1 + \lVert P_u \nabla \log r(u) \rVert^2\big), \quad
          P_u = I - u u^\top

because :math:`dx = r\,(I + u \nabla \log r^\top) P_u\, du` has the Gram matrix
:math:`r^2 (P_u + P_u \nabla\log r \nabla\log r^\top P_u)` on the tangent space. No matrix is
built, and the gradient may be that of any smooth extension of :math:`\log r` off the sphere.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...autodiff.products import out_of_inference, value_and_gradient
from ...checks import check_event_shape, checks_arguments_of, looks_first
from ...errors import ShapeError
from ...host.context import context_arguments
from ...modules.precision import as_factored

_OF_POINTS = ("log_radius", "radius_and_secant", "value", "log_value")


def _check_points(gauge: Gauge, *args: Any, **kwargs: Any) -> None:
    """Refuse a first argument that is no batch of vectors of the gauge's dimension."""
    name, points = ("points", args[0]) if args else next(iter(kwargs.items()))
    if gauge.dim is not None:
        check_event_shape(points, (gauge.dim,), name)
    elif isinstance(points, Tensor) and (points.dim() != 2 or points.shape[1] == 0):
        raise ShapeError(f"{name} must have shape (B, D), got {tuple(points.shape)}.")


class RadiusAndSecant(NamedTuple):
    r"""Two values for every direction: :math:`\log r` and :math:`\log\sec\psi`, (B,) each."""

    log_radius: Tensor
    log_secant: Tensor


@checks_arguments_of
class Gauge(nn.Module, ABC):
    r"""A family of star-like surfaces :math:`\{r_t(u)\, u\}`, one for each level :math:`t`.

    A subclass defines :meth:`log_radius`. It may replace :meth:`radius_and_secant`, which
    differentiates :meth:`log_radius`, by a closed form, and add facts about the whole surface:
    :meth:`log_cone_mass`, :meth:`log_area` and :meth:`sample_cone`.

    ``domain`` is ``"sphere"``, or ``"orthant"`` if only directions with positive coordinates meet
    the surface; ``dim`` is :math:`D` where the gauge fixes it.

    Examples:
        >>> class Flower(Gauge):  # r = t (1 + u_1 u_2 / 2)
        ...     def log_radius(self, u, level, context=None):
        ...         return level.log() + (1 + u[:, 0] * u[:, 1] / 2).log()
        >>> u = torch.tensor([[1.0, 0.0]])
        >>> Flower().radius_and_secant(u, torch.tensor(2.0)).log_radius.exp()
        tensor([2.])
    """

    domain: str = "sphere"
    dim: int | None = None
    takes_context: bool = False
    needs_context: bool = False

    def __init_subclass__(cls) -> None:
        """Attach the check of arguments to the methods of a subclass."""
        super().__init_subclass__()
        checks_arguments_of(cls)
        looks_first(cls, _OF_POINTS, _check_points)

    @abstractmethod
    def log_radius(self, u: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Log-radius along directions.

        Args:
            u: Unit vectors :math:`(B, D)`.
            level: :math:`t > 0`, of shape :math:`()` or :math:`(B,)`.
            context: One row per direction, or None.

        Returns:
            :math:`\log r_t(u)` of shape :math:`(B,)`.
        """

    def radius_and_secant(
        self, u: Tensor, level: Tensor, context: Tensor | None = None
    ) -> RadiusAndSecant:
        r"""Log-radius and log-secant along directions, by one gradient of :meth:`log_radius`."""
        level = out_of_inference(torch.as_tensor(level))
        context = None if context is None else out_of_inference(context)
        log_radius, gradient = value_and_gradient(lambda v: self.log_radius(v, level, context), u)
        along = (gradient * u).sum(1, keepdim=True)
        slope = (gradient - along * u).square().sum(1)
        return RadiusAndSecant(log_radius, 0.5 * slope.log1p())

    def log_cone_mass(self, dim: int, level: Tensor) -> Tensor | None:
        r""":math:`\log \int r^D d\omega`, :math:`\log(D\,\mathrm{Vol})`; None if not known."""
        return None

    def log_area(self, dim: int, level: Tensor) -> Tensor | None:
        """Log of the surface area; None if it has no closed form."""
        return None

    def sample_cone(self, num_samples: int, dim: int, like: Tensor) -> Tensor | None:
        """Directions (n, D) of points drawn by the cone measure at level 1; None if not known."""
        return None


class HomogeneousGauge(Gauge):
    r"""The level sets :math:`\{F = t\}` of a function with :math:`F(s x) = s F(x)`, :math:`s > 0`.

    .. math:: \log r_t(u) = \log t - \log F(u)

    A subclass gives :meth:`value`; ``nfi.testing.check_gauge`` checks the contract.
    Every norm is such a function, and so is :math:`\lVert x \rVert_p` with :math:`p < 1`.

    Examples:
        >>> class Taxicab(HomogeneousGauge):
        ...     def value(self, x, context=None):
        ...         return x.abs().sum(1)
        >>> u = torch.tensor([[0.6, 0.8]])
        >>> Taxicab().log_radius(u, torch.tensor(1.0)).exp()
        tensor([0.7143])
    """

    @abstractmethod
    def value(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Values F(x) > 0, (B,), at points (B, D) other than zero."""

    def log_value(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Values log F(x), (B,), at points (B, D); replace it where the value could overflow."""
        return self.value(x, context).log()

    def log_radius(self, u: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-radius along directions, log t - log F(u)."""
        return torch.as_tensor(level).log() - self.log_value(u, context)

    def log_cone_mass(self, dim: int, level: Tensor) -> Tensor | None:
        r""":math:`\log \int r^D d\omega`, which grows as :math:`t^D`; None if not known."""
        unit = self.unit_cone_mass(dim)
        return None if unit is None else unit + dim * level.log()

    def log_area(self, dim: int, level: Tensor) -> Tensor | None:
        r"""Log-area where :math:`\lVert\nabla F\rVert` is constant: cone mass times it, over t.

        With :math:`n` the unit normal, :math:`x \cdot n = t / \lVert\nabla F\rVert` and the cone
        measure is :math:`(x \cdot n)\, d\mathcal H`.
        """
        mass, bounds = self.log_cone_mass(dim, level), self.log_slope_bounds(dim)
        if mass is None or bounds is None or bounds[0] != bounds[1]:
            return None
        return mass + bounds[0] - level.log()

    def unit_cone_mass(self, dim: int) -> Tensor | None:
        r""":math:`\log(D\,\mathrm{Vol}\{F \le 1\})`; None if not known."""
        return None

    def log_slope_bounds(self, dim: int) -> tuple[float, float] | None:
        r"""Least and greatest :math:`\log\lVert\nabla F\rVert`; None if not known or unbounded."""
        return None


class ConstantSlopeGauge(HomogeneousGauge):
    r"""A homogeneous gauge with :math:`\lVert\nabla F\rVert = \lVert w \rVert` almost everywhere.

    .. math:: \log\sec\psi = \log\lVert w \rVert - \log F(u)

    because :math:`\sec\psi = \lVert x\rVert \lVert\nabla F\rVert / (x \cdot \nabla F)` and
    :math:`x \cdot \nabla F = F`. Area and cone measure then differ by a constant only.
    """

    # The vector w, a buffer of the subclass.
    weights: Tensor

    def radius_and_secant(
        self, u: Tensor, level: Tensor, context: Tensor | None = None
    ) -> RadiusAndSecant:
        r"""Log-radius and log-secant in closed form, without a gradient."""
        log_value = self.log_value(u, context)
        log_norm = torch.linalg.vector_norm(self.weights).log()
        return RadiusAndSecant(torch.as_tensor(level).log() - log_value, log_norm - log_value)

    def log_slope_bounds(self, dim: int) -> tuple[float, float] | None:
        """The norm of the weights, twice."""
        log_norm = math.log(float(torch.linalg.vector_norm(as_factored(self.weights))))
        return log_norm, log_norm


def one_each(function: Any, points: Tensor, context: Tensor | None, rule: str) -> Tensor:
    """Values (B,) of a function at points (B, D), which may return (B, 1) but nothing else."""
    value: Tensor = function(points, **context_arguments(function, context))
    rows = points.shape[0]  # len(points) would bind an exported program to one batch size
    if value.shape not in ((rows,), (rows, 1)):
        raise ShapeError(f"{rule}, shape ({rows},) or ({rows}, 1), got {tuple(value.shape)}.")
    return value.reshape(rows)


def unit_rows(points: Tensor) -> Tensor:
    """Points (n, D) divided by their norms."""
    return points / torch.linalg.vector_norm(points, dim=1, keepdim=True)


def with_random_signs(sizes: Tensor) -> Tensor:
    """Sizes of any shape, each with a fair random sign."""
    return sizes * (2 * torch.randint_like(sizes, 2) - 1)

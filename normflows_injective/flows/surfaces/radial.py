"""Star-like surfaces as a layer: points of the sphere moved along their rays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from ...checks import (
    check_callable,
    check_choice,
    check_count,
    check_positive,
    is_number,
    is_readable,
)
from ...errors import ContextError, OptionError, ShapeError
from ..gauges.gauge import Gauge
from .off_manifold import TOLERANCE, check_policy, refuse_far, refuse_off_orthant, unit_vectors
from .surface import Surface, SurfaceMap

FromContext = int | Callable[[Tensor], Tensor]


@final
class RadialSurface(SurfaceMap):
    r"""The map from the sphere to a star-like surface, :math:`u \mapsto r_t(u)\, u`.

    .. math:: \log\frac{d\mathcal H}{d\omega} = (D-1) \log r + \log\sec\psi, \qquad
              \log\frac{d\mu}{d\omega} = D \log r

    The first is for the surface's own measure, ``"hausdorff"``, and the second for the cone
    measure :math:`d\mu = (x \cdot n)\, d\mathcal H` with :math:`n` the unit normal, ``"cone"``. It
    costs :math:`O(D)` besides one evaluation of the gauge.

    **Which measure?** "Uniform on the surface" as geometers mean it is uniform by ``"hausdorff"``,
    which is area. A prior that depends on :math:`x` only through :math:`F(x)`, conditioned on
    :math:`F(x) = t`, is uniform by ``"cone"``, and so are normalised generalised-Gaussian
    variables. The two differ by more than a constant unless :math:`x \cdot n` is constant, as it
    is for :math:`\ell_1`, :math:`\ell_2`, the simplex, group lasso and SLOPE.

    Args:
        gauge: The surface, from ``nfi.flows.gauges``.
        level: :math:`t > 0`.
        measure: ``"hausdorff"`` or ``"cone"``.
        level_from_context: Source of one level per sample instead: the index of a column of the
            context, or a callable of the context (B, *) to levels (B,).
        off_manifold: Treatment by :meth:`inverse` of points whose distance from the centre differs
            from the surface's by more than a factor of 1e-4: ``"reject"`` raises, ``"project"``
            moves them along their rays.

    Raises:
        OptionError: If an option is unknown or out of range.

    References:
        arXiv 2406.09116; the formulas are derived in ``gauges/gauge.py``.

    Examples:
        >>> from normflows_injective.flows.gauges import LpGauge
        >>> surface = RadialSurface(LpGauge(1.0), level=2.0)
        >>> surface(torch.tensor([[1.0, 0.0]]))[0]
        tensor([[2., 0.]])
    """

    def __init__(
        self,
        gauge: Gauge,
        level: float = 1.0,
        measure: str = "hausdorff",
        level_from_context: FromContext | None = None,
        off_manifold: str = "reject",
    ) -> None:
        super().__init__()
        check_policy(off_manifold)
        if not isinstance(gauge, Gauge):
            raise OptionError(
                f"gauge must be one of nfi.flows.gauges, got {type(gauge).__name__}. A function "
                "that increases along rays becomes one by ImplicitGauge(function)."
            )
        self.gauge, self.off_manifold = gauge, off_manifold
        self.measure = check_choice(measure, ("hausdorff", "cone"), "measure")
        self.level = Level(level, level_from_context)
        self.domain = gauge.domain
        if gauge.dim is not None:
            self.latent_shape = self.data_shape = (gauge.dim,)
        self.takes_context = gauge.takes_context or self.level.from_context is not None
        self.needs_context = gauge.needs_context or self.level.from_context is not None

    @property
    def level_from_context(self) -> FromContext | None:
        """How the level is read from a context."""
        return self.level.from_context

    def surface(self, before: Surface | None = None) -> Surface:
        """The level set, or an image where every context has a level set of its own."""
        declared = super().surface(before)
        if self.needs_context:
            return declared
        return declared._replace(kind="level_set", gauge=self.gauge, level=self.level.level)

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Points (B, D) of the sphere to points (B, D) of the surface."""
        u = self._directions(z, "reject", "z")
        return self._log_radius(u, context).exp().unsqueeze(1) * u

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Points (B, D) of the surface to their directions (B, D)."""
        u = self._directions(x, "project", "x")
        if self.off_manifold == "reject":
            self._refuse_off_surface(x, self._log_radius(u, context))
        return u

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Points (B, D) of the sphere to the surface, with the log-factor (B,) in nats."""
        u = self._directions(z, "reject", "z")
        log_radius, log_stretch = self._stretch(u, context)
        return log_radius.exp().unsqueeze(1) * u, log_stretch

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Points (B, D) of the surface to the sphere, with minus the log-factor (B,) in nats."""
        u = self._directions(x, "project", "x")
        log_radius, log_stretch = self._stretch(u, context)
        if self.off_manifold == "reject":
            self._refuse_off_surface(x, log_radius)
        return u, -log_stretch

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"measure={self.measure!r}, off_manifold={self.off_manifold!r}"

    def _directions(self, points: Tensor, off_manifold: str, name: str) -> Tensor:
        u = unit_vectors(points, off_manifold, name)
        if self.domain == "orthant":
            refuse_off_orthant(u, name)
        return u

    def _log_radius(self, u: Tensor, context: Tensor | None) -> Tensor:
        return self._one_each(self.gauge.log_radius(u, self.level(u, context), context), u)

    def _one_each(self, log_radius: Tensor, u: Tensor) -> Tensor:
        if log_radius.shape != (u.shape[0],):
            raise ShapeError(
                f"{type(self.gauge).__name__} must give one value per direction, shape "
                f"({len(u)},), got {tuple(log_radius.shape)}. Sum without keepdim."
            )
        return log_radius

    def _stretch(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        dim = u.shape[1]
        if self.measure == "cone":
            log_radius = self._log_radius(u, context)
            return log_radius, dim * log_radius
        log_radius, log_secant = self.gauge.radius_and_secant(u, self.level(u, context), context)
        self._one_each(log_radius, u)
        return log_radius, (dim - 1) * log_radius + log_secant

    def _refuse_off_surface(self, x: Tensor, log_radius: Tensor) -> None:
        # By logarithms of scaled norms: surfaces of small p reach far towards the centre.
        scale = x.detach().abs().amax(1)
        scaled = x.detach() / scale.unsqueeze(1)
        log_norms = torch.linalg.vector_norm(scaled, dim=1).log() + scale.log()
        refuse_far(
            (log_norms - log_radius.detach()).exp(),
            (x, "x"),
            lambda rows, index, factor: (
                f"x has {rows} off the surface of {self.gauge}, the worst at index {index[0]}, "
                f"whose distance from the centre is {factor:.6g} times that of the surface, where "
                f"1 +- {TOLERANCE} is allowed. Check the level, or build with "
                "off_manifold='project', which moves points along their rays."
            ),
        )


class Level(nn.Module):
    """The level t of a surface: a number, or a column or a function of the context."""

    def __init__(self, level: float = 1.0, from_context: FromContext | None = None) -> None:
        super().__init__()
        self.level = float(check_positive(level, "level"))
        if from_context is not None and self.level != 1:
            raise OptionError(
                "The level comes from the context, so level= would not be used. Give one of them."
            )
        if is_number(from_context) or isinstance(from_context, bool):
            from_context = check_count(from_context, "level_from_context", least=0)
        elif from_context is not None:
            advice = "Give the index of a column of the context, or a function of the context."
            check_callable(from_context, "level_from_context", advice)
        self.from_context = from_context

    def forward(self, like: Tensor, context: Tensor | None) -> Tensor:
        """Levels, of shape () or (B,), in dtype and device of a batch (B, *)."""
        if self.from_context is None:
            return torch.full((), self.level, dtype=like.dtype, device=like.device)
        if context is None:
            raise ContextError("The level comes from the context, but none came. Pass context=.")
        if isinstance(self.from_context, int):
            if context.dim() != 2 or not 0 <= self.from_context < context.shape[1]:
                raise ContextError(
                    f"The level is column {self.from_context} of the context, whose shape is "
                    f"{tuple(context.shape)}."
                )
            level = context[:, self.from_context]
        else:
            level = self.from_context(context)
        if level.shape != (like.shape[0],):
            raise ShapeError(
                f"level_from_context must give one level per sample, shape ({len(like)},), got "
                f"{tuple(level.shape)}."
            )
        if is_readable(level) and not bool(((level > 0) & (level < math.inf)).all()):
            raise ContextError(
                "Levels must be positive and finite, but the context gives "
                f"{float(level.min()):.6g} to {float(level.max()):.6g}."
            )
        return level.to(like)

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"{self.level:g}" if self.from_context is None else "from the context"

"""The uniform laws of a star-like surface."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from ..checks import check_count
from ..errors import OptionError
from ..flows.gauges.gauge import Gauge, HomogeneousGauge
from ..flows.surfaces.radial import FromContext, RadialSurface
from .law import Law
from .surface_sampling import SurfaceSampler


@final
class UniformOnSurface(Law):
    r"""The uniform law of a star-like surface, by area or by cone measure.

    .. math:: \log p(x) = -\log \mathcal H(\mathcal M_t) \qquad\text{or}\qquad
              \log p(x) = -\log \int r_t^D\, d\omega = -\log(D\,\mathrm{Vol}_t)

    The total mass is a closed form where the gauge knows one: areas of :math:`\ell_1`,
    :math:`\ell_2`, the cube, the simplex, group lasso and SLOPE; cone masses of all homogeneous
    gauges of ``nfi.flows.gauges``. Otherwise it is an average over fixed random directions, and
    ``standard_error`` is the standard error of its logarithm (infinite variance is possible for
    :math:`p < 1`). The area of a homogeneous gauge grows as :math:`t^{D-1}` and the cone mass as
    :math:`t^D`, so there the level may come from a context.

    It serves as target of ``reverse_kld``, and as base through :class:`Pullback`; samples carry no
    gradient.

    Args:
        gauge: The surface.
        level: :math:`t > 0`.
        measure: ``"hausdorff"`` or ``"cone"``, see ``nfi.flows.RadialSurface``.
        dim: :math:`D`, where the gauge does not fix it.
        level_from_context: Column of the context, or callable of it, that gives the level.
        off_manifold: ``"reject"`` or ``"project"``, for points off the surface.
        num_directions: Number of directions of the average.

    Raises:
        OptionError: If the dimension is not known, the level cannot come from a context, or the
            gauge is being trained.

    Warns:
        NumericalWarning: If few of the directions count in the average, as in high dimensions;
            and during sampling by area, if the density ratio to the proposal has no known bound
            and exceeds its greatest value over the directions of the average.

    References:
        Surface and cone measure: arXiv 2406.09116; Naor and Romik, Projecting the surface measure
        of the sphere of l_p^n, 2003.

    Examples:
        >>> from normflows_injective.flows.gauges import LpGauge
        >>> law = UniformOnSurface(LpGauge(1.0), dim=3)  # an octahedron of area 4 sqrt(3)
        >>> law.log_prob(torch.tensor([[1.0, 0.0, 0.0]])).neg().exp()
        tensor([6.9282])
    """

    on_manifold = True

    def __init__(
        self,
        gauge: Gauge,
        level: float = 1.0,
        measure: str = "hausdorff",
        *,
        dim: int | None = None,
        level_from_context: FromContext | None = None,
        off_manifold: str = "reject",
        num_directions: int = 2**16,
    ) -> None:
        super().__init__()
        self.surface = RadialSurface(gauge, level, measure, level_from_context, off_manifold)
        self.measure = measure
        self.dim = known_dimension(gauge, dim, least=2)
        self.shape = (self.dim,)
        self._is_homogeneous = isinstance(gauge, HomogeneousGauge)
        _check_fixed(gauge, level_from_context is not None and not self._is_homogeneous)
        self.takes_context = self.surface.takes_context
        self.needs_context = self.surface.needs_context
        # The mass of a homogeneous gauge is stored at level 1, of any other at its own level.
        self._unit = 1.0 if self._is_homogeneous else float(level)
        self.num_directions = num_directions
        self._measure()
        self.register_load_state_dict_post_hook(_measure_again)
        # Holds no numbers, which would lose digits, but the dtype and the device.
        self._like = nn.Buffer(torch.empty(0), persistent=False)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Log-density at points of the surface, which is constant on each level.

        Args:
            x: Points of shape :math:`(B, D)`.
            context: One row per point, if the level comes from it.

        Returns:
            Log-densities of shape :math:`(B,)` in nats.

        Raises:
            OffManifoldError: If points are off the surface and are to be rejected.
        """
        self.surface.encode(x, context)
        return self._log_density(x, context)

    def forward(
        self, num_samples: int = 1, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw points (n, D) with their log-density (n,) in nats."""
        u = self._sampler().directions(num_samples, self._log_bound).to(self._like)
        with torch.no_grad():
            x = self.surface.decode(u, context)
        return x, self._log_density(x, context)

    def extra_repr(self) -> str:
        """Options as shown by ``print(law)``."""
        return f"dim={self.dim}, standard_error={self.standard_error:.2g}"

    @property
    def gauge(self) -> Gauge:
        """The gauge of the surface."""
        return self.surface.gauge

    @property
    def level(self) -> float:
        """The level, where no context gives it."""
        return self.surface.level.level

    @property
    def level_from_context(self) -> FromContext | None:
        """The rule that reads the level from a context."""
        return self.surface.level_from_context

    @property
    def off_manifold(self) -> str:
        """The policy for points off the surface."""
        return self.surface.off_manifold

    def _measure(self) -> None:
        sampler = self._sampler()
        self.log_unit_mass, self.standard_error = sampler.log_mass()
        self._log_bound = sampler.log_bound()

    def _sampler(self) -> SurfaceSampler:
        gauge, measure = self.surface.gauge, self.surface.measure
        return SurfaceSampler(gauge, self._unit, measure, self.dim, self.num_directions)

    def _log_density(self, x: Tensor, context: Tensor | None) -> Tensor:
        mass = x.new_full((x.shape[0],), self.log_unit_mass)
        if self._is_homogeneous:
            power = self.dim if self.surface.measure == "cone" else self.dim - 1
            mass = mass + power * self.surface.level(x, context).log()
        return -mass


def _measure_again(law: UniformOnSurface, _: object) -> None:
    # A gauge that was loaded is another surface.
    law._measure()


def known_dimension(gauge: Gauge, dim: int | None, least: int) -> int:
    """The dimension D of an option or a gauge, which must agree if both have one."""
    known = gauge.dim if dim is None else dim
    if known is None or (gauge.dim is not None and gauge.dim != known):
        raise OptionError(
            f"dim must be given, and be that of the gauge where it has one: got dim={dim!r}, and "
            f"{type(gauge).__name__} has {gauge.dim!r}."
        )
    return check_count(known, "dim", least=least)


def _check_fixed(gauge: Gauge, changes_shape: bool) -> None:
    if changes_shape:
        raise OptionError(
            f"The surfaces of {type(gauge).__name__} change their shape with the level, so each "
            "has a mass of its own. Give a fixed level."
        )
    if gauge.needs_context or any(parameter.requires_grad for parameter in gauge.parameters()):
        raise OptionError(
            "The mass of a surface is found once, but this gauge is trained or depends on a "
            "context. Freeze it with gauge.requires_grad_(False)."
        )

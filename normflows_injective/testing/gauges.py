"""The contract of a gauge."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import gradcheck

from ..flows.composite import InjectiveComposite
from ..flows.gauges.gauge import Gauge
from ..flows.surfaces.radial import RadialSurface
from ..flows.surfaces.sphere import SphereChart
from .oracles import dense_jacobian, require, require_close


class GaugeCase(NamedTuple):
    r"""A gauge in float64, and arguments with which its contract is checked.

    Attributes:
        gauge: The gauge.
        u: Unit vectors of its domain away from its kinks, shape :math:`(B, D)`, B at least two.
        level: :math:`t`, the level of the surface.
    """

    gauge: Gauge
    u: Tensor
    level: float = 1.7

    def surface(self, measure: str = "hausdorff") -> InjectiveComposite:
        """A chart of the directions followed by the surface."""
        surface = RadialSurface(self.gauge, self.level, measure)
        return InjectiveComposite([self.chart(), surface]).to(self.u)

    def chart(self) -> SphereChart:
        """A chart of the directions."""
        kind = "orthant" if self.gauge.domain == "orthant" else "cot"
        return SphereChart(self.u.shape[1], kind).to(self.u)

    def levels(self) -> Tensor:
        """The level, 0-dimensional."""
        return torch.as_tensor(self.level, dtype=self.u.dtype, device=self.u.device)


def check_gauge(gauge: Gauge, u: Tensor, *, level: float = 1.7) -> None:
    r"""Check the whole contract of a gauge.

    Args:
        gauge: Gauge in float64, without a context.
        u: Unit vectors of its domain away from its kinks, shape :math:`(B, D)`, B at least two.
        level: :math:`t`, the level of the surface.

    Raises:
        AssertionError: If the contract is broken, saying where.

    References:
        ``docs/surfaces.md``.

    Examples:
        >>> class Flower(Gauge):  # r = t (1 + u_1 u_2 / 2)
        ...     def log_radius(self, u, level, context=None):
        ...         return level.log() + (1 + u[:, 0] * u[:, 1] / 2).log()
        >>> u = torch.nn.functional.normalize(torch.randn(4, 3, dtype=torch.float64))
        >>> check_gauge(Flower(), u)
    """
    for check in GAUGE_CHECKS:
        check(GaugeCase(gauge, u, level))


def check_radius(case: GaugeCase) -> None:
    """The radius is one finite number for every direction, and its closed form is consistent."""
    log_radius = case.gauge.log_radius(case.u, case.levels())
    require(log_radius.shape == case.u.shape[:1], "log_radius gives one value per direction")
    require(bool(log_radius.isfinite().all()), "every direction of the domain meets the surface")
    both = case.gauge.radius_and_secant(case.u, case.levels())
    require_close(both.log_radius, log_radius, "radius_and_secant gives log_radius", case.u)
    default = Gauge.radius_and_secant(case.gauge, case.u, case.levels())
    require_close(both.log_secant, default.log_secant, "the closed form is the gradient's", case.u)


def check_levels(case: GaugeCase) -> None:
    """Every direction may have a level of its own."""
    levels = torch.linspace(0.7, 1.9, case.u.shape[0]).to(case.u)
    together = case.gauge.radius_and_secant(case.u, levels)
    for index, level in enumerate(levels):
        alone = case.gauge.radius_and_secant(case.u[index : index + 1], level)
        for actual, expected in zip(together, alone, strict=True):
            contract = "a batch of levels gives the radii of single ones"
            require_close(actual[index : index + 1], expected, contract, case.u)


def check_round_trip(case: GaugeCase) -> None:
    """The surface can be left and reached again, with opposite log-dets."""
    surface = case.surface()
    z = case.chart().encode(case.u)
    x, log_det = surface(z)
    back, inverse_log_det = surface.inverse(x.detach())
    torch.testing.assert_close(back, z, atol=1e-7, rtol=1e-7)
    require_close(inverse_log_det, -log_det, "log-dets of the two directions are opposite", z)


def check_volumes(case: GaugeCase) -> None:
    """Log-volumes in both measures are those of the dense Jacobian."""
    z = case.chart().encode(case.u)
    surface = case.surface()
    x, log_volume = surface(z)
    jacobian = dense_jacobian(surface.decode, z).detach()
    expected = torch.linalg.svdvals(jacobian).log().sum(1)
    require_close(log_volume, expected, "the log-volume is 1/2 log det J^T J", z)
    # (x . n) times the area of the tangents' parallelotope is the volume that x spans with them.
    matrix = torch.cat([jacobian, x.detach().unsqueeze(2)], dim=2)
    expected = torch.linalg.slogdet(matrix).logabsdet
    cone = case.surface("cone")(z)[1]
    require_close(cone, expected, "the cone measure is that of the volume below", z)


def check_gradients(case: GaugeCase) -> None:
    """The log-volume can be differentiated by the coordinates."""
    z = case.chart().encode(case.u).detach().requires_grad_()
    surface = case.surface()
    require(gradcheck(lambda s: surface(s)[1] + 0 * s.sum(1), (z,)), "derivatives are right")


def check_copies(case: GaugeCase) -> None:
    """A deep copy is the same surface."""
    twin = case._replace(gauge=copy.deepcopy(case.gauge))
    z = case.chart().encode(case.u)
    contract = "a deep copy is the same surface"
    require_close(twin.surface()(z)[0], case.surface()(z)[0], contract, z)


def check_cone_samples(case: GaugeCase) -> None:
    """Directions that the gauge draws, if it does, are unit vectors of its domain."""
    u = case.gauge.sample_cone(5, case.u.shape[1], case.u)
    if u is None:
        return
    norms = torch.linalg.vector_norm(u, dim=1)
    require_close(norms, torch.ones_like(norms), "sample_cone gives unit vectors", u)
    require(u.dtype == case.u.dtype, "sample_cone keeps the dtype of its last argument")
    inside = case.gauge.domain != "orthant" or bool((u >= 0).all())
    require(inside, "sample_cone gives directions of the domain")


GAUGE_CHECKS: tuple[Callable[[GaugeCase], None], ...] = (
    check_radius,
    check_levels,
    check_round_trip,
    check_volumes,
    check_gradients,
    check_copies,
    check_cone_samples,
)
"""The checks of :func:`check_gauge`, each of a :class:`GaugeCase`, to be called one by one."""

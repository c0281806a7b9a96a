"""A whole model on a known surface: base, angular flow, chart, surface."""

from __future__ import annotations

from typing import Any

import normflows as nf
import torch
from torch import nn

from ..checks import check_choice, checks_arguments
from ..errors import OptionError
from ..flows.composite import InjectiveComposite
from ..flows.gauges.gauge import Gauge
from ..flows.gauges.hyperplane import HyperplaneGauge
from ..flows.surfaces.angular_spline import AngularSpline
from ..flows.surfaces.radial import FromContext, RadialSurface
from ..flows.surfaces.sphere import InChart, SphereChart, SphereLinear
from ..flows.surfaces.sphere_coordinates import COORDINATES
from ..flows.surfaces.surface import SurfaceMap
from .injective import InjectiveNormalizingFlow

__all__ = ["star_like_flow"]


@checks_arguments
def star_like_flow(
    dim: int,
    gauge: Gauge | None = None,
    *,
    level: float = 1.0,
    measure: str = "hausdorff",
    level_from_context: FromContext | None = None,
    context_dim: int = 0,
    chart: str | None = None,
    num_layers: int = 4,
    width: int = 64,
    num_blocks: int = 2,
    num_bins: int = 8,
    bound: float = 4.0,
    num_frequencies: int = 1,
    off_manifold: str = "reject",
    p: Any = None,
) -> InjectiveNormalizingFlow:
    r"""Put a flow on a star-like surface together, starting from the uniform law of directions.

    .. math:: z \sim q_0 \;\to\; \text{(spline, linear map of the sphere)} \times \text{layers}
              \;\to\; u \in S^{D-1} \;\to\; x = r_t(u)\, u

    The base is the uniform law of the sphere seen in the chart. Every layer is a spline coupling
    whose azimuth is circular (:class:`~normflows_injective.flows.AngularSpline`)
    followed by a linear map of the sphere seen in the chart, which moves the poles and the seam.
    Choose ``chart="stereographic"``, whose coordinates have no angle and are mixed by the host's
    ``LULinearPermute``, where most mass is in one narrow place, as posteriors have it.
    ``flows`` of the model is an ordinary list: add to it, or write your own.

    Args:
        dim: :math:`D`, the dimension of the ambient space.
        gauge: The surface; None for the unit sphere.
        level: :math:`t`.
        measure: ``"hausdorff"`` or ``"cone"``, see :class:`RadialSurface`.
        level_from_context: Column of the context, or callable of it, that gives the level.
        context_dim: Number of context features; 0 for none.
        chart: ``"cot"`` or ``"stereographic"``, or ``"orthant"`` for surfaces that only positive
            directions meet; None chooses.
        num_layers: Number of splines with a linear map each.
        width: Width of the networks of the splines.
        num_blocks: Number of residual blocks of each.
        num_bins: Number of bins of a spline.
        bound: Bound of the splines of linear coordinates.
        num_frequencies: Number of multiples of every angle that the networks see; more than one
            for data with fine structure.
        off_manifold: ``"reject"`` or ``"project"``, for data off the surface.
        p: Target density for ``reverse_kld``.

    Returns:
        An :class:`~normflows_injective.InjectiveNormalizingFlow`.

    Raises:
        OptionError: If an option is unknown, or the chart does not fit the surface.

    References:
        Negri, Aellen and Roth, arXiv 2406.09116. The chart and the chain are ours.

    Examples:
        >>> from normflows_injective.flows.gauges import LpGauge
        >>> model = star_like_flow(5, LpGauge(1.0), level=3.0, num_layers=2)
        >>> x, log_q = model.sample(4)
        >>> import torch
        >>> bool(torch.allclose(x.abs().sum(1), torch.tensor(3.0)))
        True
    """
    surface: list[SurfaceMap] = []
    if gauge is not None:
        surface = [RadialSurface(gauge, level, measure, level_from_context, off_manifold)]
    domain = surface[0].domain if surface else "sphere"
    kind = ("orthant" if domain == "orthant" else "cot") if chart is None else chart
    check_choice(kind, COORDINATES, "chart")
    if (kind == "orthant") != (domain == "orthant") or kind == "angles":
        raise OptionError(
            f"chart={kind!r} does not fit a surface over the {domain}. Leave chart out; 'cot' and "
            "'stereographic' serve the sphere."
        )
    sphere = SphereChart(dim, kind, off_manifold=off_manifold if gauge is None else "reject")
    flows: list[nf.flows.Flow] = []
    for layer in range(num_layers):
        flows.append(
            AngularSpline(
                dim - 1,
                sphere.ind_circ,
                width,
                num_blocks,
                num_bins,
                bound,
                num_frequencies,
                context_dim,
                reverse_mask=layer % 2 == 1,
            )
        )
        flows.append(_mixing(dim, kind))
    if gauge is None and (
        level != 1.0 or level_from_context is not None or measure != "hausdorff"
    ):
        raise OptionError(
            "level, level_from_context and measure belong to a gauge; the unit sphere has none. "
            "Spheres of other radii are gauges.LpGauge(2)."
        )
    base = _orthant_base(dim) if domain == "orthant" else _sphere_base(dim, kind)
    return InjectiveNormalizingFlow(base, [*flows, sphere, *surface], p=p)


def _sphere_base(dim: int, kind: str) -> nn.Module:
    from ..distributions import Pullback, UniformSphere

    return Pullback(UniformSphere(dim), SphereChart(dim, kind))


def _orthant_base(dim: int) -> nn.Module:
    """Directions of uniform points of the standard simplex."""
    from ..distributions import Pullback, UniformOnSurface

    gauge = HyperplaneGauge(torch.ones(dim))
    chart = InjectiveComposite([SphereChart(dim, "orthant"), RadialSurface(gauge)])
    return Pullback(UniformOnSurface(gauge), chart)


def _mixing(dim: int, kind: str) -> nf.flows.Flow:
    if kind == "cot":
        return InChart(SphereLinear(dim, rotate=True), SphereChart(dim))
    # Without an azimuth the coordinates are those of a linear space, which may be mixed as such.
    return nf.flows.LULinearPermute(dim - 1)

"""A whole model on a known surface: base, angular flow, chart, surface."""

from __future__ import annotations

from functools import partial
from typing import Any

import normflows as nf
import torch
from torch import nn

from ..checks import check_choice, checks_arguments
from ..distributions import Pullback, UniformOnSurface, UniformSphere
from ..errors import OptionError
from ..flows.composite import InjectiveComposite
from ..flows.gauges.gauge import Gauge
from ..flows.gauges.hyperplane import HyperplaneGauge
from ..flows.surfaces.angular_spline import AngularSpline
from ..flows.surfaces.radial import FromContext, RadialSurface
from ..flows.surfaces.sphere import InChart, SphereChart, SphereLinear
from ..flows.surfaces.sphere_coordinates import COORDINATES
from .injective import InjectiveNormalizingFlow


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
    r"""Build a flow on a star-like surface, which starts from the uniform law of directions.

    .. math:: z \sim q_0 \;\to\; \text{(spline, linear map of the sphere)} \times \text{layers}
              \;\to\; u \in S^{D-1} \;\to\; x = r_t(u)\, u

    The base is the uniform law of the sphere seen in the chart. Every layer is a spline coupling
    whose azimuth is circular (:class:`~normflows_injective.flows.AngularSpline`)
    followed by a linear map of the sphere seen in the chart, which moves the poles and the seam.
    Where most mass is in one narrow place, as in posteriors, choose ``chart="stereographic"``,
    whose coordinates have no angle and are mixed by ``LULinearPermute`` of normflows. ``flows`` of
    the model is an ordinary list: add to it, or write your own.

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
        num_blocks: Number of residual blocks of each network.
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
    surface: list[nf.flows.Flow] = []
    if gauge is not None:
        surface = [RadialSurface(gauge, level, measure, level_from_context, off_manifold)]
    elif (level, level_from_context, measure) != (1.0, None, "hausdorff"):
        raise OptionError(
            "level, level_from_context and measure belong to a gauge; the unit sphere has none. "
            "Spheres of other radii are gauges.LpGauge(2)."
        )
    kind = _checked_kind(chart, "sphere" if gauge is None else gauge.domain)
    sphere = SphereChart(dim, kind, off_manifold if gauge is None else "reject")
    spline = partial(
        AngularSpline,
        dim - 1,
        sphere.ind_circ,
        width=width,
        num_blocks=num_blocks,
        num_bins=num_bins,
        bound=bound,
        num_frequencies=num_frequencies,
        context_dim=context_dim,
    )
    flows: list[nf.flows.Flow] = []
    for layer in range(num_layers):
        flows += [spline(reverse_mask=layer % 2 == 1), _mixing(dim, kind)]
    return InjectiveNormalizingFlow(_base(dim, kind), [*flows, sphere, *surface], p=p)


def _checked_kind(chart: str | None, domain: str) -> str:
    fitting = ("orthant",) if domain == "orthant" else ("cot", "stereographic")
    kind = fitting[0] if chart is None else check_choice(chart, COORDINATES, "chart")
    if kind not in fitting:
        raise OptionError(
            f"chart={kind!r} does not fit a surface over the {domain}. Leave chart out; 'cot' and "
            "'stereographic' serve the sphere."
        )
    return kind


def _base(dim: int, kind: str) -> nn.Module:
    """The uniform law of the sphere, or the directions of that of the simplex, in the chart."""
    chart = SphereChart(dim, kind)
    if kind != "orthant":
        return Pullback(UniformSphere(dim), chart)
    gauge = HyperplaneGauge(torch.ones(dim))
    return Pullback(UniformOnSurface(gauge), InjectiveComposite([chart, RadialSurface(gauge)]))


def _mixing(dim: int, kind: str) -> nf.flows.Flow:
    if kind == "cot":
        return InChart(SphereLinear(dim, rotate=True), SphereChart(dim))
    # Without an azimuth the coordinates are those of a linear space, which may be mixed as such.
    return nf.flows.LULinearPermute(dim - 1)

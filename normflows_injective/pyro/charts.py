"""The registrations of our constraints with torch, by which guides and samplers reach them."""

from __future__ import annotations

from typing import Any

from torch import Size
from torch.distributions import (
    ComposeTransform,
    IndependentTransform,
    ReshapeTransform,
    Transform,
    biject_to,
    transform_to,
)

from ..errors import UnsupportedModelError
from ..flows.surfaces.graph_surface import GraphSurface
from ..flows.surfaces.intervals import ColumnChart
from ..flows.surfaces.product import ProductSurface
from ..flows.surfaces.simplex import SimplexStickBreaking
from ..flows.surfaces.sphere import SphereChart
from ..flows.surfaces.surface import Chart
from ..flows.surfaces.torus import TorusChart
from ..host.copies import in_evaluation
from .flow_transform import FlowTransform
from .supports.boxes import Box, BoxTransform, PushedBox, Scalars
from .supports.surfaces import ImageConstraint, StarLikeConstraint


def _to_surface(constraint: StarLikeConstraint) -> Transform:
    return in_evaluation(FlowTransform(constraint.chart(), cache_size=0))


def _to_image(constraint: ImageConstraint) -> Transform:
    stack = constraint.stack
    chart = without_angles(stack.flows[-1]) if isinstance(stack.flows[-1], Chart) else None
    if len(stack.composite) == 1 and chart is not None:
        return in_evaluation(FlowTransform(chart, cache_size=0))
    if not (len(stack.flows) == 1 and isinstance(stack.flows[0], GraphSurface)):
        raise UnsupportedModelError(
            "No chart of this image from all of R^d is known, so guides and samplers cannot reach "
            "it by themselves. Sample the base variables instead: z from the model's q0 and x = "
            "model.forward(z), which needs no density of x. Rotations have no such chart either: "
            "sample four normal numbers and divide them by their length."
        )
    return FlowTransform(list(stack.flows), cache_size=0)


def without_angles(chart: Any) -> Chart | None:
    """A chart of the same surface from all of R^d, which may miss a point; None if unknown."""
    if isinstance(chart, TorusChart):
        kept = chart.form, chart.period, chart.start, chart.off_manifold
        return TorusChart(chart.dim, *kept, kind="stereographic")
    if isinstance(chart, SphereChart):
        return SphereChart(chart.dim, "stereographic", chart.off_manifold)
    if isinstance(chart, ProductSurface):
        factors = [without_angles(factor) for factor in chart.factors]
        known = [factor for factor in factors if factor is not None]
        whole = len(known) == len(factors)
        return ProductSurface(dict(zip(chart.names, known, strict=True))) if whole else None
    return chart if isinstance(chart, (SimplexStickBreaking, ColumnChart)) else None


def _to_box(constraint: Box) -> Transform:
    return IndependentTransform(BoxTransform(constraint), constraint.event_dim)


def _to_pushed_box(constraint: PushedBox) -> Transform:
    layers = FlowTransform(constraint.layers, event_dim=constraint.event_dim, cache_size=0)
    return ComposeTransform([biject_to(constraint.box), layers])


def _to_scalars(constraint: Scalars) -> Transform:
    scalar, vector = Size(()), Size((1,))
    vectors = biject_to(constraint.of_vectors)
    there, back = ReshapeTransform(scalar, vector), ReshapeTransform(vector, scalar)
    return ComposeTransform([there, vectors, back])


for _registry in (biject_to, transform_to):
    _registry.register(StarLikeConstraint, _to_surface)
    _registry.register(ImageConstraint, _to_image)
    _registry.register(Box, _to_box)
    _registry.register(PushedBox, _to_pushed_box)
    _registry.register(Scalars, _to_scalars)

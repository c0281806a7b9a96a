"""The surface that layers lead to, as they tell it."""

from __future__ import annotations

import normflows as nf
import pytest
import torch
from support.registry import LAYERS
from torch import nn

from normflows_injective.flows import (
    Chart,
    GraphSurface,
    InjectiveComposite,
    Pad,
    RadialSurface,
    SimplexFromOrthant,
    SimplexStickBreaking,
    SphereChart,
    SphereLinear,
    SurfaceMap,
)
from normflows_injective.flows.gauges import HyperplaneGauge, LpGauge, NetworkRadius
from normflows_injective.flows.surfaces.surface import Surface, surface_of

# Kind, gauge, level and measure by the name of the layer; all the others lead to an image.
KINDS = {
    "sphere_cot": ("sphere", None, None, "hausdorff"),
    "sphere_cot_of_two": ("sphere", None, None, "hausdorff"),
    "sphere_stereographic": ("sphere", None, None, "hausdorff"),
    "sphere_angles": ("sphere", None, None, "hausdorff"),
    "sphere_orthant": ("orthant", None, None, "hausdorff"),
    "surface_moved": ("level_set", "LpGauge", 1.0, "hausdorff"),
    "surface_lp": ("level_set", "LpGauge", 1.3, "hausdorff"),
    "surface_lp_smoothed": ("level_set", "LpGauge", 1.3, "hausdorff"),
    "surface_ellipsoid": ("level_set", "EllipsoidGauge", 1.3, "hausdorff"),
    "surface_simplex": ("level_set", "HyperplaneGauge", 1.3, "hausdorff"),
    "surface_elastic_net": ("level_set", "ElasticNetGauge", 1.3, "hausdorff"),
    "surface_group_lasso": ("level_set", "GroupLassoGauge", 1.3, "hausdorff"),
    "surface_slope": ("level_set", "SlopeGauge", 1.3, "hausdorff"),
    "surface_implicit": ("level_set", "ImplicitGauge", 1.3, "hausdorff"),
    "surface_learned": ("level_set", "NetworkRadius", 1.3, "hausdorff"),
    "surface_user_written": ("level_set", "MixedNorm", 1.3, "hausdorff"),
    "surface_cone": ("level_set", "LpGauge", 1.3, "cone"),
    "hopf_chart": ("sphere", None, None, "hausdorff"),
    "rotations": ("rotations", None, None, "haar"),
    "rotations_by_context": ("rotations", None, None, "haar"),
    "rotations_as_matrices": ("rotations", None, None, "haar"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_the_registry_tell_their_surface(name):
    case = LAYERS[name]
    surface = surface_of([case.build()])
    kind, gauge, level, measure = KINDS.get(name, ("image", None, None, surface.measure))
    assert (surface.kind, surface.level, surface.measure) == (kind, level, measure)
    assert (surface.gauge and type(surface.gauge).__name__) == gauge
    if kind != "image":
        assert surface.dim == case.data_shape[0]


@pytest.mark.parametrize("measure", ["lebesgue", "hausdorff"])
def test_layers_that_lead_to_the_simplex_tell_it(measure):
    charts = [
        [SimplexStickBreaking(3, measure=measure, total=2.0)],
        [SphereChart(3, "orthant"), SimplexFromOrthant(3, measure=measure, total=2.0)],
    ]
    for flows in charts:
        surface = surface_of(flows)
        assert (surface.kind, *surface[2:]) == ("simplex", 2.0, 3, measure)
        assert isinstance(surface.gauge, HyperplaneGauge)
        assert surface.gauge.weights.tolist() == [1, 1, 1]


def test_the_last_layer_speaks():
    chart = SphereChart(4)
    gauge = LpGauge(1.5)
    cone = RadialSurface(gauge, 2.0, "cone")
    assert surface_of([chart, SphereLinear(4)]) == Surface("sphere", dim=4)
    assert surface_of([chart, cone]) == Surface("level_set", gauge, 2.0, 4, "cone")
    assert surface_of([InjectiveComposite([chart]), cone]).kind == "level_set"
    assert InjectiveComposite([chart, cone]).surface() == surface_of([chart, cone])
    # A linear map leads out of the orthant.
    assert surface_of([SphereChart(4, "orthant"), SphereLinear(4)]).kind == "sphere"


def test_surfaces_of_a_context_and_learned_ones_are_images():
    chart = SphereChart(3)
    by_level = RadialSurface(LpGauge(1.0), level_from_context=0)
    assert surface_of([chart, by_level]).kind == "image"
    assert surface_of([GraphSurface(lambda z: z.sum(1))]).kind == "image"
    assert surface_of([chart, nf.flows.AffineConstFlow((3,))]).kind == "image"
    assert surface_of([Pad(2, 3)]).kind == "image"
    learned = NetworkRadius(nn.Linear(3, 1))
    assert surface_of([chart, RadialSurface(learned)]).gauge is learned


class Circle(Chart):
    codomain = "sphere"

    def forward(self, z, context=None):
        return torch.cat([z.cos(), z.sin()], dim=1), z.new_zeros(len(z))

    def inverse(self, x, context=None):
        return torch.atan2(x[:, 1:], x[:, :1]), x.new_zeros(len(x))


class Reflection(SurfaceMap):
    """A map of any surface that is symmetric about its centre, to itself."""

    domain = "surface"
    keeps_surface = True

    def decode(self, z, context=None):
        return -z

    def encode(self, x, context=None):
        return -x

    def log_stretch(self, z, context=None):
        return z.new_zeros(len(z))


def test_layers_of_third_parties_need_no_method():
    assert surface_of([Circle()]) == Surface("sphere")
    circle = Circle()
    circle.data_shape = (2,)
    assert surface_of([circle]) == Surface("sphere", dim=2)
    cube = RadialSurface(LpGauge(1.0))
    before = surface_of([circle, cube])
    assert surface_of([circle, cube, Reflection()]) == before
    assert Reflection().surface().kind == "image"


# The two ways to write a layer of a known surface


class CircleByParts(Chart):
    codomain = "sphere"

    def decode(self, z, context=None):
        return torch.cat([z.cos(), z.sin()], dim=1)

    def encode(self, x, context=None):
        return torch.atan2(x[:, 1:], x[:, :1])

    def log_stretch(self, z, context=None):
        return z.new_zeros(len(z))


class ReflectionByWholes(SurfaceMap):
    def forward(self, z, context=None):
        return -z, z.new_zeros(len(z))

    def inverse(self, x, context=None):
        return -x, x.new_zeros(len(x))


@pytest.mark.parametrize(
    ("one", "other"), [(Circle, CircleByParts), (ReflectionByWholes, Reflection)]
)
def test_a_layer_may_be_given_by_wholes_or_by_parts(one, other):
    one, other = one(), other()
    z = torch.rand(3, 1 if isinstance(one, Circle) else 2)
    for name in ("forward", "decode", "log_stretch"):
        torch.testing.assert_close(getattr(one, name)(z), getattr(other, name)(z))
    x = one.decode(z)
    for name in ("inverse", "encode"):
        torch.testing.assert_close(getattr(one, name)(x), getattr(other, name)(x))


def test_a_layer_that_lacks_a_part_is_abstract():
    class Incomplete(SurfaceMap):
        def decode(self, z, context=None):
            return z

        def encode(self, x, context=None):
            return x

    with pytest.raises(TypeError, match="abstract class Incomplete: give forward, or decode and"):
        Incomplete()

    class OneWay(Chart):
        def forward(self, z, context=None):
            return z, z.new_zeros(len(z))

    with pytest.raises(TypeError, match="abstract class OneWay: give inverse, or encode"):
        OneWay()

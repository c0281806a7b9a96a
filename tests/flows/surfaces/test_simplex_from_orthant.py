"""Maps from the orthant of the sphere to the simplex, and refusals of both charts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.comparison import close
from support.dense import dense_jacobian, dense_log_volume
from support.points import on_orthant
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Dirichlet

from normflows_injective.errors import (
    NonFiniteError,
    OffManifoldError,
    OptionError,
    ShapeError,
    UnsupportedLayerError,
)
from normflows_injective.flows.stacking import check_surfaces
from normflows_injective.flows.surfaces.graph_surface import GraphSurface
from normflows_injective.flows.surfaces.simplex import SimplexFromOrthant, SimplexStickBreaking
from normflows_injective.flows.surfaces.surface import Chart, is_closed_form

DOUBLE = torch.float64
MAPS = ["radial", "square"]


# --- maps from the orthant -----------------------------------------------------------------------


def from_angles(angles):
    """Unit vectors by polar angles, and the log of the sphere's measure by angles."""
    num = angles.shape[1]
    ones = torch.ones_like(angles[:, :1])
    u = torch.cat([angles.cos(), ones], 1) * torch.cat([ones, angles.sin().cumprod(1)], 1)
    powers = torch.arange(num - 1, -1, -1, dtype=DOUBLE)
    return u, (powers * angles.sin().log()).sum(1)


@pytest.mark.parametrize("dim", [2, 3, 5, 10])
@pytest.mark.parametrize("kind", MAPS)
def test_stretch_is_that_of_dense_jacobians_by_angles(kind, dim):
    angles = torch.rand(3, dim - 1, dtype=DOUBLE) * 1.3 + 0.1
    u, log_sphere = from_angles(angles)
    lebesgue, area = (SimplexFromOrthant(dim, kind, m, 2.5) for m in ("lebesgue", "hausdorff"))
    jacobian = dense_jacobian(lambda a: lebesgue.decode(from_angles(a)[0]), angles).detach()
    close(lebesgue(u)[1] + log_sphere, torch.linalg.slogdet(jacobian[:, :-1])[1], 1e-9)
    expected = dense_log_volume(lambda a: area.decode(from_angles(a)[0]), angles)
    close(area(u)[1] + log_sphere, expected, 1e-9)


def test_square_sends_the_uniform_law_to_a_dirichlet_law_of_halves():
    dim = 6
    x, log_stretch = SimplexFromOrthant(dim, "square")(on_orthant(20, dim))
    log_area = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)
    expected = Dirichlet(torch.full((dim,), 0.5, dtype=DOUBLE)).log_prob(x)
    close(dim * math.log(2) - log_area - log_stretch, expected, 1e-11)


def test_flat_law_seen_from_the_orthant_by_the_radial_map():
    angles = torch.rand(5, 3, dtype=DOUBLE) * 1.3 + 0.1
    u, log_sphere = from_angles(angles)
    x, log_stretch = SimplexFromOrthant(4)(u)
    by_formula = math.log(6) + 4 * x.norm(dim=1).log() + log_sphere
    flat = Dirichlet(torch.ones(4, dtype=DOUBLE)).log_prob(x / x.sum(1, keepdim=True))
    close(flat + log_stretch + log_sphere, by_formula, 1e-12)


@pytest.mark.parametrize("kind", MAPS)
def test_orthant_of_three_parts_has_the_area_of_the_triangle(kind):
    nodes, weights = np.polynomial.legendre.leggauss(40)
    axis = torch.as_tensor((nodes + 1) * math.pi / 4)
    weight = torch.as_tensor(weights * math.pi / 4)
    u, log_sphere = from_angles(torch.cartesian_prod(axis, axis))
    log_stretch = SimplexFromOrthant(3, kind, "hausdorff")(u)[1]
    integrand = (log_stretch + log_sphere).exp()
    close((integrand * torch.outer(weight, weight).flatten()).sum(), math.sqrt(3) / 2, 1e-12)


@pytest.mark.parametrize("kind", MAPS)
def test_orthant_round_trip(kind):
    layer = SimplexFromOrthant(5, kind, total=3.0)
    u = on_orthant(6, 5)
    x, log_stretch = layer(u)
    close(x.sum(1), 3.0, 1e-12)
    back, inverse_log_det = layer.inverse(x)
    close(back, u, 1e-12)
    close(inverse_log_det, -log_stretch, 1e-12)


@pytest.mark.parametrize("kind", MAPS)
def test_orthant_gradients(kind):
    layer = SimplexFromOrthant(3, kind)
    angles = (torch.rand(2, 2, dtype=DOUBLE) * 1.3 + 0.1).requires_grad_()
    assert gradcheck(lambda a: layer(from_angles(a)[0]), (angles,), check_forward_ad=True)
    assert gradgradcheck(lambda a: layer(from_angles(a)[0]), (angles,))


def test_orthant_maps_stand_behind_a_chart_of_the_orthant_only():
    class Quarter(Chart):
        codomain = "orthant"

        def forward(self, z, context=None):
            return torch.cat([z.cos(), z.sin()], dim=1), z.new_zeros(len(z))

        def inverse(self, x, context=None):
            return torch.atan2(x[:, 1:], x[:, :1]), x.new_zeros(len(x))

    flows = [Quarter(), SimplexFromOrthant(2)]
    check_surfaces(flows)
    assert is_closed_form(flows)
    flows[0].codomain = "sphere"
    with pytest.raises(UnsupportedLayerError, match="orthant"):
        check_surfaces(flows)


@pytest.mark.parametrize("build", [SimplexStickBreaking, SimplexFromOrthant])
def test_options_out_of_range_are_refused(build):
    with pytest.raises(OptionError, match=r"dim must be an integer of at least 2, got 1\."):
        build(1)
    with pytest.raises(OptionError, match=r"total must be a positive number, got -1\.0\."):
        build(3, total=-1.0)
    with pytest.raises(OptionError, match=r"kind must be one of .*, got 'simple'\."):
        build(3, "simple")
    with pytest.raises(
        OptionError, match=r"measure must be one of lebesgue, hausdorff, got 'cone"
    ):
        build(3, measure="cone")
    with pytest.raises(OptionError, match="off_manifold must be one of reject, project"):
        build(3, off_manifold="ignore")


@pytest.mark.parametrize("build", [SimplexStickBreaking, SimplexFromOrthant])
def test_wrong_shapes_are_refused(build):
    with pytest.raises(ShapeError, match=r"z must have shape \(B, \d\), got \(2, 7\)"):
        build(4)(torch.rand(2, 7))
    with pytest.raises(ShapeError, match=r"x must have shape \(B, 4\), got \(2, 3\)"):
        build(4).inverse(torch.rand(2, 3))


def test_values_are_not_looked_at_inside_a_vmap():
    x = torch.tensor([[0.5, 0.6], [0.5, 0.5]], dtype=DOUBLE)
    u, z = torch.tensor([[-0.6, 0.8]]), torch.tensor([[1.5]])
    torch.func.vmap(lambda row: SimplexStickBreaking(2).inverse(row[None])[0])(x)
    torch.func.vmap(lambda row: SimplexStickBreaking(2, "uniform_box")(row[None])[0])(z)
    torch.func.vmap(lambda row: SimplexFromOrthant(2).decode(row[None]))(u)
    torch.func.vmap(lambda row: GraphSurface(lambda s: s[:, 0]).inverse(row[None])[0])(x)


def test_inputs_outside_the_box_and_off_the_orthant_are_refused():
    chart = SimplexStickBreaking(3, "uniform_box")
    message = (
        r"z has 2 of 4 values outside \(0, 1\), the first at index \[0, 1\]: kind='uniform_box' "
        r"maps the open unit box only\. .* or kind='normal', which takes any real number"
    )
    with pytest.raises(OffManifoldError, match=message):
        chart(torch.tensor([[0.5, 1.0], [-0.1, 0.5]]))
    with pytest.raises(NonFiniteError, match="z has 1 of 2 values NaN"):
        chart(torch.tensor([[float("nan"), 0.5]]))
    message = (
        r"z has 1 of 2 rows with negative coordinates, the first at index 1, outside the positive "
        r"orthant\. Put nfi\.flows\.SphereChart with kind='orthant' before this layer\."
    )
    for call in (SimplexFromOrthant(2).decode, SimplexFromOrthant(2).log_stretch):
        with pytest.raises(OffManifoldError, match=message):
            call(torch.tensor([[0.6, 0.8], [-0.6, 0.8]]))
        with pytest.raises(OffManifoldError, match="off the unit sphere"):
            call(torch.tensor([[0.6, 0.9]]))
    projected = SimplexFromOrthant(2, off_manifold="project")(torch.tensor([[3.0, 4.0]]))
    close(projected[1], SimplexFromOrthant(2)(torch.tensor([[0.6, 0.8]]))[1], 1e-6)

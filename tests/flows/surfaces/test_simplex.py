"""Charts of the simplex, maps from the orthant, and graphs."""

from __future__ import annotations

import copy
import math
import pickle

import normflows as nf
import numpy as np
import pytest
import torch
from scipy import special
from support.dense import dense_jacobian, dense_log_volume, numerical_jacobian
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Beta, Dirichlet, Normal, StickBreakingTransform

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
from normflows_injective.nets import SmoothMLP

DOUBLE = torch.float64
KINDS = ["normal", "logit", "ilr", "alr", "uniform_box"]
UNBOUNDED = KINDS[:-1]
MAPS = ["radial", "square"]


def coordinates(kind, num, dim, dtype=DOUBLE):
    """Coordinates of ordinary points, spread wider than the base."""
    if kind == "uniform_box":
        return torch.rand(num, dim - 1, dtype=dtype) * 0.98 + 0.01
    return 1.5 * torch.randn(num, dim - 1, dtype=dtype)


def directions(num, dim, dtype=DOUBLE):
    """Uniform points of the positive orthant of the sphere."""
    u = torch.randn(num, dim, dtype=dtype).abs()
    return u / u.norm(dim=1, keepdim=True)


def behind(dim):
    """Numbers K - i of the parts behind each."""
    return torch.arange(dim - 1, 0, -1, dtype=DOUBLE)


def sticks(kind, z):
    """The fractions v by their definitions, one by one."""
    exponents = behind(z.shape[1] + 1)
    by_kind = {
        "normal": lambda: 1 - (0.5 * torch.erfc(z / math.sqrt(2))) ** (1 / exponents),
        "logit": lambda: 1 / (1 + exponents * torch.exp(-z)),
        "uniform_box": lambda: 1 - (1 - z) ** (1 / exponents),
    }
    return by_kind[kind]()


def close(actual, expected, tolerance=1e-9, absolute=None):
    """Tensors, arrays and numbers, in the dtype and on the device of the first."""
    expected = torch.as_tensor(expected, dtype=actual.dtype, device=actual.device)
    absolute = tolerance if absolute is None else absolute
    expected = expected.expand(actual.shape) if expected.dim() == 0 else expected
    torch.testing.assert_close(actual.detach(), expected.detach(), atol=absolute, rtol=tolerance)


# --- volumes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3, 5, 10, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_volumes_are_those_of_dense_jacobians(kind, dim):
    z = coordinates(kind, 2, dim)
    lebesgue, area = (SimplexStickBreaking(dim, kind, m, 2.5) for m in ("lebesgue", "hausdorff"))
    jacobian = dense_jacobian(lambda s: lebesgue(s)[0], z).detach()
    close(lebesgue(z)[1], torch.linalg.slogdet(jacobian[:, :-1])[1])
    close(area(z)[1], dense_log_volume(lambda s: area(s)[0], z))


@pytest.mark.parametrize("kind", ["normal", "logit", "uniform_box"])
def test_parts_are_cut_from_a_stick_as_the_formula_says(kind):
    z = coordinates(kind, 5, 6)
    v = sticks(kind, z)
    left = torch.cumprod(1 - v, dim=1)
    first = torch.cat([v[:, :1], v[:, 1:] * left[:, :-1]], dim=1)
    close(SimplexStickBreaking(6, kind)(z)[0], torch.cat([first, left[:, -1:]], dim=1), 1e-12)


def test_logit_kind_is_torchs_transform():
    transform = StickBreakingTransform()
    z = coordinates("logit", 20, 7)
    x, log_det = SimplexStickBreaking(7, "logit")(z)
    close(x, transform(z), 1e-12)
    close(log_det, transform.log_abs_det_jacobian(z, x), 1e-12)
    close(SimplexStickBreaking(7, "logit").inverse(x)[0], transform.inv(x), 1e-9)


@pytest.mark.parametrize("dim", [2, 3, 10, 100])
def test_normal_kind_sends_the_standard_normal_to_the_flat_law(dim):
    z = torch.randn(50, dim - 1, dtype=DOUBLE)
    x, log_det = SimplexStickBreaking(dim)(z)
    expected = Dirichlet(torch.ones(dim, dtype=DOUBLE)).log_prob(x / x.sum(1, keepdim=True))
    close(Normal(0.0, 1.0).log_prob(z).sum(1) - log_det, expected, 1e-11)


def test_uniform_box_has_a_constant_volume():
    log_det = SimplexStickBreaking(10, "uniform_box")(coordinates("uniform_box", 4, 10))[1]
    close(log_det, -12.8018275, 1e-7)


def test_isometric_coordinates_are_those_of_an_orthonormal_basis():
    chart = SimplexStickBreaking(6, "ilr")

    def centred(z):
        logs = chart(z)[0].log()
        return logs - logs.mean(1, keepdim=True)

    basis = centred(torch.eye(5, dtype=DOUBLE))
    close(basis @ basis.T, torch.eye(5), 1e-12)
    close(basis.sum(1), torch.zeros(5), 1e-12)
    z = coordinates("ilr", 5, 6)
    x, log_det = chart(z)
    close(x, torch.softmax(z @ basis, dim=1), 1e-12)
    close(log_det, x.log().sum(1) + 0.5 * math.log(6), 1e-12)


@pytest.mark.parametrize("kind", UNBOUNDED)
@pytest.mark.parametrize(("measure", "area"), [("lebesgue", 0.5), ("hausdorff", math.sqrt(3) / 2)])
def test_the_whole_simplex_has_its_area(kind, measure, area):
    # The trapezoidal rule on the plane converges exponentially for such integrands.
    axis = torch.arange(-45, 45.01, 0.25, dtype=DOUBLE)
    grid = torch.cartesian_prod(axis, axis)
    log_det = SimplexStickBreaking(3, kind, measure, total=2.0)(grid)[1]
    close(log_det.exp().sum() * 0.25**2, 4 * area)


@pytest.mark.parametrize("kind", ["normal", "logit", "uniform_box"])
def test_sticks_of_a_dirichlet_law_are_independent_betas(kind):
    concentration = torch.tensor([0.3, 1.7, 0.9, 2.5], dtype=DOUBLE)
    z = coordinates(kind, 10, 4)
    x, log_det = SimplexStickBreaking(4, kind)(z)
    close(Dirichlet(concentration).log_prob(x) + log_det, stick_density(kind, concentration, z))


def stick_density(kind, concentration, z):
    """Density of z if the sticks are those of a Dirichlet law, by one Beta law for each."""
    z = z.clone().requires_grad_()
    v = sticks(kind, z)
    (slopes,) = torch.autograd.grad(v.sum(), z)
    tails = concentration.flip(0).cumsum(0).flip(0)[1:]
    log_prob = Beta(concentration[:-1], tails).log_prob(v.detach())
    return (log_prob + slopes.log()).sum(1)


@pytest.mark.parametrize(
    ("measure", "elbo"), [("lebesgue", -17.6542084), ("hausdorff", -17.6542084 + 0.8047190)]
)
def test_exact_posterior_gives_the_evidence_at_every_point(measure, elbo):
    prior, counts = torch.full((5,), 0.7, dtype=DOUBLE), torch.tensor([3.0, 0, 5, 1, 2])
    z = torch.randn(30, 4, dtype=DOUBLE)
    x, log_det = SimplexStickBreaking(5, measure=measure)(z)
    joint = Dirichlet(prior).log_prob(x) + (counts.to(x) * x.log()).sum(1)
    posterior = stick_density("normal", prior + counts.to(prior), z) - log_det
    close(joint - posterior, elbo, 1e-7)


@pytest.mark.parametrize("build", [SimplexStickBreaking, SimplexFromOrthant])
def test_measures_differ_by_half_the_log_of_the_number_of_parts(build):
    z = directions(3, 5)[:, : 4 if build is SimplexStickBreaking else 5]
    difference = build(5, measure="hausdorff")(z)[1] - build(5)(z)[1]
    close(difference, 0.8047190, 1e-7)


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
    close(lebesgue(u)[1] + log_sphere, torch.linalg.slogdet(jacobian[:, :-1])[1])
    expected = dense_log_volume(lambda a: area.decode(from_angles(a)[0]), angles)
    close(area(u)[1] + log_sphere, expected)


def test_square_sends_the_uniform_law_to_a_dirichlet_law_of_halves():
    dim = 6
    x, log_stretch = SimplexFromOrthant(dim, "square")(directions(20, dim))
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
    u = directions(6, 5)
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


# --- derivatives ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_both_directions(kind):
    chart = SimplexStickBreaking(4, kind, "hausdorff", total=2.0)
    z = coordinates(kind, 2, 4).requires_grad_()
    x = chart(z)[0].detach().requires_grad_()

    def close_and_invert(s):
        return chart.inverse(2 * s / s.sum(1, keepdim=True))

    assert gradcheck(chart, (z,), check_forward_ad=True)
    assert gradgradcheck(chart, (z,))
    assert gradcheck(close_and_invert, (x,), check_forward_ad=True)
    assert gradgradcheck(close_and_invert, (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_tangents_in_forward_mode_and_in_bulk(kind):
    chart = SimplexStickBreaking(5, kind)
    z = coordinates(kind, 3, 5)
    expected = numerical_jacobian(lambda s: chart(s)[0], z)
    directions = torch.eye(4, dtype=DOUBLE)[:, None].expand(4, 3, 4)

    def tangent(v):
        return torch.func.jvp(lambda s: chart(s), (z,), (v,))[1]

    in_bulk, log_dets = torch.func.vmap(tangent)(directions)
    close(in_bulk.permute(1, 2, 0), expected, 1e-7)
    for index, direction in enumerate(directions):
        x, log_det = tangent(direction)
        close(x, expected[:, :, index], 1e-7)
        close(log_dets[index], log_det, 1e-12)


def test_second_derivatives_of_the_normal_quantile():
    # K = 2: z = -ndtri(x_2), and ndtri' = 1 / phi, ndtri'' = ndtri / phi^2.
    parts = [1e-100, 1e-40, 1e-12, 0.02, 0.4, 0.6, 0.98]
    part = torch.tensor(parts, dtype=DOUBLE)[:, None].requires_grad_()
    chart = SimplexStickBreaking(2)
    z = chart.inverse(torch.cat([part, 1 - part], dim=1))[0]
    (first,) = torch.autograd.grad(z.sum(), part, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), part)
    quantile = special.ndtri(part.detach().cpu().numpy())
    density = np.exp(-0.5 * quantile**2) / math.sqrt(2 * math.pi)
    close(z, quantile, 1e-9, 0)
    close(first, 1 / density, 1e-8, 0)
    close(second, quantile / density**2, 1e-8, 0)


# --- far out ------------------------------------------------------------------------------------


def test_two_parts_are_the_two_tails_of_the_normal_law():
    z = torch.linspace(-36, 36, 289, dtype=DOUBLE)[:, None].requires_grad_()
    logs = SimplexStickBreaking(2)(z)[0].log()
    at = z.detach().cpu().numpy()
    expected = special.log_ndtr(np.concatenate([at, -at], axis=1))
    close(logs, expected, 1e-13, 1e-15)
    (slope,) = torch.autograd.grad(logs[:, 0].sum(), z)
    hazard = np.exp(-0.5 * at**2 - 0.5 * math.log(2 * math.pi) - special.log_ndtr(at))
    close(slope, hazard, 1e-11, 1e-14)


def test_first_sticks_of_many_parts_far_to_the_left():
    z = torch.linspace(-30, 0, 121, dtype=DOUBLE)
    x = SimplexStickBreaking(100)(z[:, None].expand(121, 99))[0]
    expected = -np.expm1(np.log1p(-special.ndtr(z.cpu().numpy())) / 99)
    close(x[:, 0], expected, 1e-12, 0)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("distance", [12.0, 30.0, 300.0])
@pytest.mark.parametrize("kind", UNBOUNDED)
def test_everything_is_finite_far_out(kind, distance, dtype):
    chart = SimplexStickBreaking(8, kind)
    signs = torch.tensor([[1.0] * 7, [-1.0] * 7, [1, -1, 1, -1, 1, 1, -1], [0, 0, 1, 0, 0, -1, 0]])
    z = (distance * signs).to(dtype).requires_grad_()
    x, log_det = chart(z)
    weights = torch.rand(x.shape, dtype=dtype)
    (gradient,) = torch.autograd.grad((weights * x).sum() + log_det.sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), z)
    tangent = torch.func.jvp(chart, (z.detach(),), (torch.ones_like(z),))[1]
    for result in (x, log_det, gradient, second, *tangent):
        assert torch.isfinite(result).all()
    close(x.sum(1), torch.ones(4), 1e-6)


# The box has no number so close to its upper end as the last part would need.
@pytest.mark.parametrize(
    ("kind", "place"),
    [
        (kind, place)
        for kind in KINDS
        for place in (0, 3, 4)
        if (kind, place) != ("uniform_box", 4)
    ],
)
def test_tiny_parts_survive_the_round_trip(kind, place):
    x = torch.full((2, 5), 0.25, dtype=DOUBLE)
    x[0, place], x[1, place] = 1e-30, 1e-200
    chart = SimplexStickBreaking(5, kind)
    z = chart.inverse(x)[0]
    close(chart(z)[0], x, 1e-11, 0)
    back, log_det = chart(z)
    close(chart.inverse(back)[1], -log_det, 1e-12, 0)


@pytest.mark.parametrize("kind", UNBOUNDED)
def test_a_part_that_takes_all_survives_the_round_trip(kind):
    # The first stick leaves 1e-40 to the other parts, and (1 - v)^e = 1e-2000 is no number.
    x = torch.full((1, 51), 1e-40, dtype=DOUBLE)
    x[0, 0] = 1.0
    chart = SimplexStickBreaking(51, kind)
    close(chart(chart.inverse(x)[0])[0], x, 1e-10, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_with_a_thousand_parts(kind):
    chart = SimplexStickBreaking(1000, kind)
    z = torch.randn(50, 999)
    z = torch.special.ndtr(z).clamp(1e-6, 1 - 1e-6) if kind == "uniform_box" else z
    x, log_det = chart(z)
    expected, expected_log_det = chart(z.double())
    assert x.dtype == log_det.dtype == torch.float32
    assert float((x.double().sum(1) - 1).abs().max()) < 6e-7
    close(x.double(), expected, 1e-5, 0)
    close(log_det.double(), expected_log_det, 0, 4e-3)
    close(chart.inverse(x)[0], z, 2e-5)


def test_default_kind_sums_to_one_within_single_precision():
    x = SimplexStickBreaking(1000)(torch.randn(200, 999))[0]
    assert float((x.double().sum(1) - 1).abs().max()) < 1.5e-7


def test_single_precision_keeps_tiny_parts():
    x = torch.tensor([[1e-30, 0.3, 0.7], [0.3, 1e-30, 0.7], [0.3, 0.7, 1e-30]])
    for kind in UNBOUNDED:
        chart = SimplexStickBreaking(3, kind)
        close(chart(chart.inverse(x)[0])[0], x, 3e-5, 0)


# --- the contract --------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_with_another_total(kind, dim):
    chart = SimplexStickBreaking(dim, kind, "hausdorff", total=100.0)
    z = coordinates(kind, 6, dim)
    x, log_det = chart(z)
    close(x.sum(1), 100.0, 1e-12)
    back, inverse_log_det = chart.inverse(x)
    close(back, z, 1e-11)
    close(inverse_log_det, -log_det, 1e-11)
    unit, unit_log_det = SimplexStickBreaking(dim, kind, "hausdorff")(z)
    close(x, 100 * unit, 1e-12)
    close(log_det - unit_log_det, (dim - 1) * math.log(100), 1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_dtype_and_inputs_are_kept(kind):
    chart = SimplexStickBreaking(4, kind)
    z = coordinates(kind, 3, 4, torch.float32)
    before = z.clone()
    x, log_det = chart(z)
    data = x.clone()
    results = (x, log_det, *chart.inverse(x))
    assert {result.dtype for result in results} == {torch.float32}
    assert torch.equal(z, before)
    assert torch.equal(x, data)
    with torch.no_grad():
        close(chart(z)[1], log_det, 0)
    with torch.inference_mode():
        x, log_det = chart(z.clone())
        assert torch.equal(chart.inverse(x)[1], results[3])


@pytest.mark.parametrize(
    "layer", [SimplexStickBreaking(4, "ilr", total=2), SimplexFromOrthant(4, "square", total=2)]
)
def test_layers_show_their_options_and_survive_copying(layer):
    for shown in (layer.kind, "measure='lebesgue'", "total=2", "off_manifold='reject'"):
        assert shown in repr(layer)
    z = directions(2, 4)[:, : layer.latent_shape[0]]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(z)[0], layer(z)[0])
    assert layer.data_shape == (4,)


def test_last_layer_of_a_host_model_gives_the_flat_law():
    base = nf.distributions.DiagGaussian(4, trainable=False)
    model = nf.NormalizingFlow(base, [SimplexStickBreaking(5)]).double()
    flat = Dirichlet(torch.ones(5, dtype=DOUBLE))
    x, log_prob = model.sample(6)
    expected = flat.log_prob(x / x.sum(1, keepdim=True))
    close(model.log_prob(x), expected, 1e-11)
    close(log_prob, expected, 1e-11)


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


@pytest.mark.parametrize("build", [SimplexStickBreaking, SimplexFromOrthant])
def test_rows_off_the_simplex_are_refused_or_closed(build):
    x = torch.tensor([[0.5, 0.5], [1.0, 3.0], [0.5, 0.6], [0.5, 0.50009]], dtype=DOUBLE)
    message = (
        r"x has 2 of 4 rows off the simplex, the worst at index 1 with sum 4, where 1 within a "
        r"relative 0\.0001 is allowed\. Multiply each row by 1 / row\.sum\(\), or build with "
        r"off_manifold='project', which does\."
    )
    with pytest.raises(OffManifoldError, match=message):
        build(2).inverse(x)
    closed = x / x.sum(1, keepdim=True)
    z, log_det = build(2, off_manifold="project").inverse(x)
    expected, expected_log_det = build(2).inverse(closed)
    close(z, expected, 1e-12)
    close(log_det, expected_log_det, 1e-12)
    with pytest.raises(OffManifoldError, match="where 2 within a relative"):
        build(2, total=2.0).inverse(closed)


@pytest.mark.parametrize("policy", ["reject", "project"])
@pytest.mark.parametrize("build", [SimplexStickBreaking, SimplexFromOrthant])
def test_parts_that_are_not_positive_are_refused(build, policy):
    x = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.2, 0.6], [1.5, -0.5, 0.0]])
    message = (
        r"x has 2 of 3 rows with parts that are not positive \(2 zeros, 1 negative\), the worst "
        r"at index 2 with part -0\.5\. A density on the simplex gives its boundary no mass: "
        r"replace zeros by small positive numbers"
    )
    with pytest.raises(OffManifoldError, match=message):
        build(3, off_manifold=policy).inverse(x)
    with pytest.raises(OffManifoldError, match=r"1 of 1 rows .* \(1 zeros, 0 negative\)"):
        build(2, off_manifold=policy).inverse(torch.tensor([[0.0, 1.0]]))
    with pytest.raises(NonFiniteError, match="x has 1 of 3 values NaN"):
        build(3, off_manifold=policy).inverse(torch.tensor([[float("nan"), 0.5, 0.5]]))
    with pytest.raises(NonFiniteError, match="the sums of x has 1 of 1 values NaN or infinite"):
        build(3).inverse(torch.tensor([[float("inf"), 0.5, 0.5]]))


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


# --- graphs -------------------------------------------------------------------------------------


class Heights(nn.Module):
    """A function of coordinates and, if built for it, of a context."""

    def __init__(self, dim, column=False):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, 8), nn.Tanh(), nn.Linear(8, 1))
        self.column = column

    def forward(self, z):
        height = self.layers(z)
        return height if self.column else height[:, 0]


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("column", [False, True])
def test_graph_volume_is_that_of_the_dense_jacobian(dim, column):
    surface = GraphSurface(Heights(dim, column)).double()
    z = torch.randn(3, dim, dtype=DOUBLE)
    x, log_volume = surface(z)
    close(log_volume, dense_log_volume(lambda s: surface(s)[0], z))
    close(x, surface.decode(z), 0)
    back, log_det = surface.inverse(x)
    close(back, z, 0)
    close(log_det, -log_volume, 0)
    assert float(log_volume.detach().min()) > 1e-6
    lebesgue = GraphSurface(surface.f, measure="lebesgue")
    assert torch.equal(lebesgue(z)[1], torch.zeros(3, dtype=DOUBLE))
    assert torch.equal(lebesgue.inverse(x)[1], torch.zeros(3, dtype=DOUBLE))


def test_area_of_a_paraboloid_over_a_disc():
    surface = GraphSurface(lambda z: z.square().sum(1))
    nodes, weights = np.polynomial.legendre.leggauss(30)
    radii = torch.as_tensor(0.75 * (nodes + 1))
    weights = torch.as_tensor(0.75 * weights)
    # The integrand is a function of the radius; one angle serves.
    z = radii[:, None] * torch.tensor([[0.6, 0.8]], dtype=DOUBLE)
    area = 2 * math.pi * (weights * radii * surface(z)[1].exp()).sum()
    close(area, math.pi / 6 * ((1 + 4 * 1.5**2) ** 1.5 - 1), 1e-10)


@pytest.mark.slow
def test_graph_gradients_by_points_and_by_parameters():
    surface = GraphSurface(Heights(2)).double()
    z = torch.randn(2, 2, dtype=DOUBLE, requires_grad=True)
    assert gradcheck(surface, (z,), check_forward_ad=True)
    assert gradgradcheck(surface, (z,))
    name, weight = next(iter(surface.named_parameters()))

    def by_parameter(value):
        return torch.func.functional_call(surface, {name: value}, (z.detach(),))

    assert gradcheck(by_parameter, (weight.detach().clone().requires_grad_(),))
    x = surface(z)[0].detach()
    surface.inverse(x)[1].sum().backward()
    assert all(p.grad is not None for p in list(surface.parameters())[:-1])


def test_graph_tangents_in_bulk():
    surface = GraphSurface(Heights(2)).double()
    z = torch.randn(3, 2, dtype=DOUBLE)
    directions = torch.eye(2, dtype=DOUBLE)[:, None].expand(2, 3, 2)
    points, log_volumes = torch.func.vmap(lambda v: torch.func.jvp(surface, (z,), (v,))[1])(
        directions
    )
    close(points.permute(1, 2, 0), numerical_jacobian(lambda s: surface(s)[0], z), 1e-7)
    expected = numerical_jacobian(lambda s: surface(s)[1][:, None], z)
    close(log_volumes.T, expected[:, 0], 1e-7)


def test_graph_without_gradients():
    surface = GraphSurface(Heights(2)).double()
    z = torch.randn(3, 2, dtype=DOUBLE)
    x, log_volume = surface(z)
    with torch.no_grad():
        without = surface(z)
        assert not without[1].requires_grad
        close(without[1], log_volume.detach(), 0)
    with torch.inference_mode():
        assert torch.equal(surface(z.clone())[1], log_volume)
        assert torch.equal(surface.inverse(x.clone())[1], -log_volume)


def test_graph_takes_a_context_where_its_function_does():
    surface = GraphSurface(SmoothMLP(2, 1, (4,), context_dim=3)).double()
    assert surface.takes_context
    assert surface.needs_context
    assert (surface.latent_shape, surface.data_shape) == ((2,), (3,))
    z, context = torch.randn(4, 2, dtype=DOUBLE), torch.randn(4, 3, dtype=DOUBLE)
    x, log_volume = surface(z, context)
    for row in range(4):
        alone = surface(z[row : row + 1], context[row : row + 1])
        close(alone[0][0], x[row], 1e-12)
        close(alone[1][0], log_volume[row], 1e-12)
    close(surface.inverse(x.detach(), context)[1], -log_volume, 1e-12)
    assert not torch.allclose(surface(z, context + 1)[1], log_volume)
    assert not GraphSurface(Heights(2)).takes_context


def test_points_off_the_graph_are_refused_or_moved():
    x = torch.tensor([[1.0, 1.0], [2.0, 4.0003], [3.0, 8.0], [0.0, 0.5]], dtype=DOUBLE)
    message = (
        r"x has 2 of 4 rows off the graph, the worst at index 2 with last coordinate 8 where f is "
        r"9, and 0\.0001 \* \(1 \+ \|f\|\) is allowed\. Replace the last coordinate by f, or "
        r"build with off_manifold='project', which does\."
    )
    with pytest.raises(OffManifoldError, match=message):
        GraphSurface(lambda z: z[:, 0].square()).inverse(x)
    z, log_det = GraphSurface(lambda z: z[:, 0].square(), "project").inverse(x)
    close(z, x[:, :1], 0)
    close(log_det, -0.5 * (4 * x[:, 0].square()).log1p(), 1e-12)
    with pytest.raises(NonFiniteError, match="the last coordinate of x has 1 of 1"):
        GraphSurface(lambda z: z[:, 0]).inverse(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(NonFiniteError, match=r"f\(z\) has 1 of 1 .* Look at f"):
        GraphSurface(lambda z: z[:, 0].log()).inverse(torch.tensor([[-1.0, 0.0]]))


def test_graph_refuses_wrong_shapes_and_options():
    message = r"f must map z of shape \(3, 2\) to heights of shape \(3,\) or \(3, 1\), .* \(3, 2\)"
    with pytest.raises(ShapeError, match=message):
        GraphSurface(lambda z: z)(torch.zeros(3, 2))
    with pytest.raises(ShapeError, match=r"z must have shape \(B, D - 1\), got \(3,\)"):
        GraphSurface(Heights(2))(torch.zeros(3))
    with pytest.raises(ShapeError, match=r"x must have shape \(B, D\), D >= 2, got \(3, 1\)"):
        GraphSurface(Heights(2)).inverse(torch.zeros(3, 1))
    with pytest.raises(ShapeError, match=r"z must have shape \(B, 2\), got \(3, 4\)"):
        GraphSurface(SmoothMLP(2, 1, (4,)))(torch.zeros(3, 4))
    with pytest.raises(OptionError, match="measure must be one of hausdorff, lebesgue"):
        GraphSurface(Heights(2), measure="cone")
    with pytest.raises(OptionError, match="off_manifold must be one of"):
        GraphSurface(Heights(2), "ignore")
    coupled = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    with pytest.raises(UnsupportedLayerError, match="couples the samples of a batch"):
        GraphSurface(coupled)(torch.randn(3, 2))


def test_graph_in_a_host_model():
    surface = GraphSurface(lambda z: z.square().sum(1))
    base = nf.distributions.DiagGaussian(2, trainable=False)
    model = nf.NormalizingFlow(base, [surface]).double()
    z = torch.randn(4, 2, dtype=DOUBLE)
    x = torch.cat([z, z.square().sum(1, keepdim=True)], dim=1)
    expected = Normal(0.0, 1.0).log_prob(z).sum(1) - 0.5 * (1 + 4 * z.square().sum(1)).log()
    close(model.log_prob(x), expected, 1e-12)
    assert "measure='hausdorff'" in repr(model)

"""Charts of the simplex by breaking a stick."""

from __future__ import annotations

import copy
import math

import normflows as nf
import numpy as np
import pytest
import torch
from scipy import special
from support.comparison import close
from support.dense import dense_jacobian, dense_log_volume, numerical_jacobian
from support.models import pickled
from support.points import on_orthant
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Beta, Dirichlet, Normal, StickBreakingTransform

from normflows_injective.errors import NonFiniteError, OffManifoldError
from normflows_injective.flows.surfaces.simplex import SimplexFromOrthant, SimplexStickBreaking

DOUBLE = torch.float64
KINDS = ["normal", "logit", "ilr", "alr", "uniform_box"]
UNBOUNDED = KINDS[:-1]


def coordinates(kind, num, dim, dtype=DOUBLE):
    """Coordinates of ordinary points, spread wider than the base."""
    if kind == "uniform_box":
        return torch.rand(num, dim - 1, dtype=dtype) * 0.98 + 0.01
    return 1.5 * torch.randn(num, dim - 1, dtype=dtype)


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


# --- volumes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3, 5, 10, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_volumes_are_those_of_dense_jacobians(kind, dim):
    z = coordinates(kind, 2, dim)
    lebesgue, area = (SimplexStickBreaking(dim, kind, m, 2.5) for m in ("lebesgue", "hausdorff"))
    jacobian = dense_jacobian(lambda s: lebesgue(s)[0], z).detach()
    close(lebesgue(z)[1], torch.linalg.slogdet(jacobian[:, :-1])[1], 1e-9)
    close(area(z)[1], dense_log_volume(lambda s: area(s)[0], z), 1e-9)


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
    close(log_det.exp().sum() * 0.25**2, 4 * area, 1e-9)


@pytest.mark.parametrize("kind", ["normal", "logit", "uniform_box"])
def test_sticks_of_a_dirichlet_law_are_independent_betas(kind):
    concentration = torch.tensor([0.3, 1.7, 0.9, 2.5], dtype=DOUBLE)
    z = coordinates(kind, 10, 4)
    x, log_det = SimplexStickBreaking(4, kind)(z)
    close(
        Dirichlet(concentration).log_prob(x) + log_det, stick_density(kind, concentration, z), 1e-9
    )


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
    z = on_orthant(3, 5)[:, : 4 if build is SimplexStickBreaking else 5]
    difference = build(5, measure="hausdorff")(z)[1] - build(5)(z)[1]
    close(difference, 0.8047190, 1e-7)


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
    z = on_orthant(2, 4)[:, : layer.latent_shape[0]]
    for twin in (copy.deepcopy(layer), pickled(layer)):
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

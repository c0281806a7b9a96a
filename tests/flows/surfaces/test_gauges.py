"""The contract of every gauge in the registry, after a chart, in four dimensions.

Statistical tests start from a fixed seed and allow 4.5 of the standard errors that they compute.
"""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from support.dense import dense_jacobian, dense_log_volume
from support.registry import GAUGES
from support.seeds import manual_seed
from torch.autograd import gradcheck, gradgradcheck

import normflows_injective as nfi
from normflows_injective.checkpoints.options import options_of
from normflows_injective.flows import InjectiveComposite, RadialSurface, SphereChart
from normflows_injective.flows.gauges import HomogeneousGauge, LpGauge
from normflows_injective.testing import GAUGE_CHECKS, GaugeCase

DIMS = (2, 3, 5, 20)
# They take derivatives by finite differences, or whole Jacobians.
SLOW = ("check_gradients", "check_volumes")
LEVEL = 1.7
DOUBLE = {"atol": 1e-9, "rtol": 1e-9}
SIGMAS = 4.5
PROPOSALS = 40_000
# Uniform directions say nothing about a surface as spiky as this: 10 in 100 000 would count. Its
# volume is tested by a recursion, and its samples by the law of a coordinate, in test_surfaces.py.
TOO_SPIKY = ("lp_0.5", 20)


def settings():
    for name in GAUGES:
        for dim in DIMS:
            yield pytest.param((name, dim), id=f"{name}-{dim}")


@pytest.fixture(params=settings())
def setting(request):
    return request.param


def gauge_of(setting, dtype=torch.float64):
    return GAUGES[setting[0]].build(setting[1]).to(dtype)


def layers(setting, gauge=None, level=LEVEL, dtype=torch.float64, **options):
    """A chart and the surface of a gauge as one layer, and the gauge."""
    name, dim = setting
    gauge = gauge_of(setting, dtype) if gauge is None else gauge
    surface = RadialSurface(gauge, level, **options)
    return InjectiveComposite([SphereChart(dim, GAUGES[name].chart), surface]), gauge


def directions(setting, count, dtype=torch.float64):
    """Uniform directions of the gauge's domain."""
    name, dim = setting
    u = torch.randn(count, dim, dtype=torch.float64)
    u = u.abs() if GAUGES[name].domain == "orthant" else u
    return torch.nn.functional.normalize(u).to(dtype)


def smooth_directions(setting, count):
    """Directions away from kinks, where coordinates vanish or are of equal size."""
    u = directions(setting, count)
    sizes = (torch.arange(u.shape[1]) + torch.rand(count, 1) + 1).to(u)
    shuffled = torch.stack([row[torch.randperm(u.shape[1])] for row in sizes])
    return torch.nn.functional.normalize(u.sign() * shuffled)


def coordinates(setting, u):
    return SphereChart(setting[1], GAUGES[setting[0]].chart).inverse(u)[0]


def level_of(value=LEVEL):
    return torch.tensor(value, dtype=torch.float64)


def log_area_of_directions(setting):
    """Log-area of the sphere, or of its positive orthant."""
    name, dim = setting
    log_area = math.log(2) + 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim)
    return log_area - dim * math.log(2) if GAUGES[name].domain == "orthant" else log_area


def plain(tensors):
    return [tensor.detach().clone() for tensor in tensors]


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, marks=[pytest.mark.slow] if check.__name__ in SLOW else [])
        for check in GAUGE_CHECKS
    ],
    ids=lambda check: check.__name__,
)
def test_contract(setting, check):
    takes_differences = check.__name__ == "check_gradients"
    if setting[1] == 20 and takes_differences:
        pytest.skip("finite differences in twenty dimensions, which another test takes fast")
    u = smooth_directions(setting, 3) if takes_differences else directions(setting, 8)
    check(GaugeCase(gauge_of(setting), u, LEVEL))


# Geometry


def test_round_trip_with_opposite_log_dets(setting):
    u = directions(setting, 8)
    layer, gauge = layers(setting)
    z = coordinates(setting, u)
    x, log_det = plain(layer(z))
    back, inverse_log_det = plain(layer.inverse(x))
    torch.testing.assert_close(back, z, atol=1e-7, rtol=1e-9)
    torch.testing.assert_close(inverse_log_det, -log_det, **DOUBLE)
    surface = layer.flows[1]
    torch.testing.assert_close(surface.decode(u).detach(), x, **DOUBLE)
    torch.testing.assert_close(surface.encode(x), u, **DOUBLE)
    torch.testing.assert_close(surface.log_stretch(u), surface(u)[1], atol=0, rtol=0)
    assert x.shape == (8, setting[1])


def test_the_function_is_the_level_on_the_surface(setting):
    u = directions(setting, 8)
    gauge = gauge_of(setting)
    levels = torch.linspace(0.5, 3.0, 8, dtype=torch.float64)
    x = gauge.log_radius(u, levels).exp().unsqueeze(1) * u
    if isinstance(gauge, HomogeneousGauge):
        value = gauge.value(x)
        torch.testing.assert_close(gauge.log_value(x), value.log(), **DOUBLE)
    elif setting[0] == "elastic_net":
        value = gauge.l1 * x.abs().sum(1) + gauge.l2 * x.square().sum(1)
    elif setting[0].startswith("implicit"):
        value = gauge.function(x)
    else:
        value = levels * torch.linalg.vector_norm(x, dim=1)  # a radius proportional to the level
        value = value / (gauge.log_radius(u, level_of(1.0)).exp() * levels)
    torch.testing.assert_close(value.detach(), levels, **DOUBLE)


def test_levels_scale_homogeneous_surfaces(setting):
    layer, gauge = layers(setting)
    if not (isinstance(gauge, HomogeneousGauge) or setting[0].startswith("network")):
        pytest.skip("its shape changes with the level")
    z = coordinates(setting, directions(setting, 5))
    (x, log_det), (unit, unit_log_det) = layer(z), layers(setting, gauge, level=1.0)[0](z)
    torch.testing.assert_close(x, LEVEL * unit, **DOUBLE)
    expected = unit_log_det + (setting[1] - 1) * math.log(LEVEL)
    torch.testing.assert_close(log_det, expected, **DOUBLE)


# Derivatives


@pytest.mark.slow
def test_gradients_by_the_coordinates(setting):
    z = coordinates(setting, smooth_directions(setting, 1)).requires_grad_()
    layer, _ = layers(setting)
    for_parameters(layer, False)

    def log_volume(s):
        return layer(s)[1]

    fast = setting[1] == 20
    assert gradcheck(log_volume, (z,), fast_mode=fast)
    assert gradgradcheck(log_volume, (z,), fast_mode=fast)


@pytest.mark.slow
def test_gradients_by_the_parameters(setting):
    layer, _ = layers(setting)
    names = [name for name, _ in layer.named_parameters()]
    if not names:
        pytest.skip("the gauge has no parameters")
    z = coordinates(setting, smooth_directions(setting, 2)).requires_grad_()

    def outputs(point, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, state, (point,))

    point = (z, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert gradcheck(outputs, point, fast_mode=True)
    assert gradgradcheck(outputs, point, fast_mode=True)


def for_parameters(layer, required):
    for parameter in layer.parameters():
        parameter.requires_grad_(required)


@pytest.mark.slow
def test_forward_mode_and_vmap_of_it(setting):
    z = coordinates(setting, smooth_directions(setting, 2))
    layer, _ = layers(setting)
    for_parameters(layer, False)
    tangents = torch.randn(3, *z.shape, dtype=z.dtype)

    def pushed(tangent):
        return torch.func.jvp(layer.forward, (z,), (tangent,))[1]

    leaf = z.clone().requires_grad_()
    x, log_volume = layer(leaf)
    gradient = torch.autograd.grad(log_volume.sum(), leaf)[0]
    expected = (gradient * tangents).sum(2)
    batched = torch.func.vmap(pushed)(tangents)
    torch.testing.assert_close(batched[1], expected, **DOUBLE)
    single = pushed(tangents[0])
    torch.testing.assert_close(single[1], expected[0], **DOUBLE)
    with torch.no_grad():  # which is about reverse mode alone
        torch.testing.assert_close(pushed(tangents[0])[1], expected[0], **DOUBLE)
    jacobian = dense_jacobian(layer.decode, z)
    expected = torch.einsum("bij,kbj->kbi", jacobian, tangents)
    torch.testing.assert_close(batched[0], expected, **DOUBLE)
    torch.testing.assert_close(single[0], expected[0], **DOUBLE)


# Ways of calling


@pytest.mark.slow
@pytest.mark.parametrize("kept", [torch.float32, torch.float64])
def test_dtype_is_kept(setting, kept):
    layer, gauge = layers(setting, dtype=kept)
    z = coordinates(setting, directions(setting, 2, kept))
    results = (*layer(z), *layer.inverse(layer.decode(z).detach()))
    assert {result.dtype for result in results} == {kept}
    sample = gauge.sample_cone(2, setting[1], z)
    assert sample is None or sample.dtype == kept


@pytest.mark.slow
def test_without_gradients_and_in_inference_mode(setting):
    layer, gauge = layers(setting)
    u = directions(setting, 3)
    z = coordinates(setting, u)
    expected = plain((*layer(z), *layer.inverse(layer.decode(z).detach())))
    with torch.no_grad():
        without = (*layer(z), *layer.inverse(layer.decode(z)))
        assert not any(part.requires_grad for part in gauge.radius_and_secant(u, level_of()))
    with torch.inference_mode():
        # Tensors that inference mode has made itself are those that autograd refuses.
        z = z.clone()
        inference = (*layer(z), *layer.inverse(layer.decode(z)))
    assert not any(result.requires_grad for result in (*without, *inference))
    torch.testing.assert_close(without, tuple(expected), **DOUBLE)
    torch.testing.assert_close(tuple(plain(inference)), tuple(expected), **DOUBLE)


def test_a_batch_of_one_and_an_empty_one(setting):
    layer, _ = layers(setting)
    z = coordinates(setting, directions(setting, 3))
    together = layer(z)
    alone = layer(z[1:2])
    torch.testing.assert_close(alone[0], together[0][1:2], **DOUBLE)
    torch.testing.assert_close(alone[1], together[1][1:2], **DOUBLE)
    assert layer(z[:0])[1].shape == (0,)


def test_state_and_copies(setting):
    layer, _ = layers(setting)
    manual_seed(5)
    twin, _ = layers(setting)
    twin.load_state_dict(layer.state_dict())
    z = coordinates(setting, directions(setting, 2))
    if setting[0] != "implicit":  # whose function is no module, and here the same
        torch.testing.assert_close(twin(z), layer(z), atol=0, rtol=0)
    torch.testing.assert_close(copy.deepcopy(layer)(z), layer(z), atol=0, rtol=0)


# Masses and samples


def weights_of(setting, gauge, level, count=PROPOSALS):
    """Uniform directions, with the logarithms of cone and surface measure relative to them."""
    u = directions(setting, count)
    with torch.no_grad():
        log_radius, log_secant = gauge.radius_and_secant(u, level_of(level))
    dim = setting[1]
    return u, dim * log_radius, (dim - 1) * log_radius + log_secant


def log_mean(log_weights):
    """Logarithm of the mean of weights, with its standard error."""
    weights = (log_weights - log_weights.max()).exp()
    error = weights.std() / weights.mean() / math.sqrt(len(weights))
    return float(weights.mean().log() + log_weights.max()), float(error)


def test_total_masses_against_uniform_directions(setting):
    if setting[0] not in KNOWN_MASS or setting == TOO_SPIKY:
        pytest.skip("no mass is known, or uniform directions miss its spikes")
    gauge, dim, level = gauge_of(setting), setting[1], level_of()
    _, cone, surface = weights_of(setting, gauge, LEVEL)
    pairs = [(cone, gauge.log_cone_mass(dim, level))]
    if setting[0] in KNOWN_AREA:
        pairs.append((surface, gauge.log_area(dim, level)))
    for log_weights, known in pairs:
        estimate, error = log_mean(log_weights)
        assert error < 0.25
        difference = estimate + log_area_of_directions(setting) - float(known.detach())
        assert abs(difference) < SIGMAS * error + 1e-12, (difference, error)


KNOWN_MASS = ("lp_0.5", "lp_1", "lp_1.3", "lp_2", "lp_3", "lp_inf", "ellipsoid", "hyperplane")
KNOWN_MASS += ("ellipsoid_matrix", "ellipsoid_trained", "ellipsoid_matrix_trained", "slope")
KNOWN_MASS += ("group_lasso",)
KNOWN_AREA = ("lp_1", "lp_2", "lp_inf", "hyperplane", "group_lasso", "slope")


@pytest.mark.parametrize("name", GAUGES)
def test_which_masses_are_known(name):
    gauge, u = gauge_of((name, 5)), directions((name, 5), 2)
    assert (gauge.log_cone_mass(5, level_of()) is not None) == (name in KNOWN_MASS)
    assert (gauge.sample_cone(2, 5, u) is not None) == (name in KNOWN_MASS)
    assert (gauge.log_area(5, level_of()) is not None) == (name in KNOWN_AREA)


@pytest.mark.parametrize("name", [name for name in GAUGES if name in KNOWN_MASS])
def test_slopes_keep_to_their_bounds(name):
    for dim in (2, 5, 20):
        gauge = gauge_of((name, dim))
        bounds = gauge.log_slope_bounds(dim)
        if name == "lp_0.5":
            assert bounds is None
            continue
        # F(u) = 1 / r and |grad F| = sec(psi) F on the sphere
        u = torch.cat([directions((name, dim), 2000), axes_and_diagonals((name, dim))])
        slope = -gauge.log_radius(u, level_of(1.0)) + gauge.radius_and_secant(u, level_of(1.0))[1]
        low, high = float(slope.detach().min()), float(slope.detach().max())
        assert bounds[0] - 1e-9 <= low
        assert high <= bounds[1] + 1e-9
        if name in ("lp_1.3", "lp_2", "lp_3", "lp_inf", "ellipsoid", "ellipsoid_trained"):
            # The axes and the diagonals attain them.
            assert low < bounds[0] + 1e-6
            assert high > bounds[1] - 1e-6


def axes_and_diagonals(setting):
    """Directions of the axes, and diagonals, a little off the former's kinks."""
    name, dim = setting
    axes = torch.eye(dim, dtype=torch.float64) + 1e-30
    diagonals = torch.ones(2, dim, dtype=torch.float64)
    if GAUGES[name].domain == "sphere":
        diagonals[1, 0] = -1
    return torch.nn.functional.normalize(torch.cat([axes, diagonals]))


STATISTICS = {
    "greatest": lambda u: u.abs().amax(1),
    "first size": lambda u: u[:, 0].abs(),
    "last size": lambda u: u[:, -1].abs(),
    "first": lambda u: u[:, 0],
    "product": lambda u: u[:, 0] * u[:, 1],
}


@pytest.mark.slow
def test_samples_follow_the_cone_measure(setting):
    if setting[0] not in KNOWN_MASS or setting == TOO_SPIKY:
        pytest.skip("it has no sampler, or uniform directions miss its spikes")
    gauge, dim = gauge_of(setting), setting[1]
    u, log_weights, _ = weights_of(setting, gauge, 1.0)
    sample = gauge.sample_cone(PROPOSALS, dim, u)
    assert sample.shape == (PROPOSALS, dim)
    norms = torch.linalg.vector_norm(sample, dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    weights = log_weights.softmax(0)
    for name, statistic in STATISTICS.items():
        drawn, values = statistic(sample), statistic(u)
        mean = (weights * values).sum()
        # The delta method for a ratio of means.
        variance = (weights * (values - mean)).square().sum() + drawn.var() / PROPOSALS
        error = float(variance.sqrt())
        assert error < 0.06
        difference = float(drawn.mean() - mean)
        assert abs(difference) < SIGMAS * error, (name, difference, error)


# Single precision and exact zeros

LARGE = 1000


@pytest.mark.parametrize("name", [*GAUGES, "lp_0.05"])
def test_single_precision_in_a_thousand_dimensions(name):
    if name == "lp_0.05":
        kind, gauge = "lp_0.5", nfi.flows.gauges.LpGauge(0.05)
    else:
        kind, gauge = name, GAUGES[name].build(LARGE)
    u = directions((kind, LARGE), 2, torch.float32)
    layer, _ = layers((kind, LARGE), gauge)
    z = coordinates((kind, LARGE), u).requires_grad_()
    x, log_volume = layer(z)
    (gradient,) = torch.autograd.grad(log_volume.sum(), z, create_graph=True)
    (curvature,) = torch.autograd.grad((gradient * torch.randn_like(z)).sum(), z)
    for result in (x, log_volume, gradient, curvature):
        assert result.dtype == torch.float32
        assert bool(result.isfinite().all())
    exact = layer.double()(z.detach().double())[1]
    torch.testing.assert_close(log_volume.double(), exact, atol=0.02, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_zeros_give_no_nan(setting, dtype):
    name, dim = setting
    layer, gauge = layers(setting, dtype=dtype)
    zeros = torch.eye(dim, dtype=dtype)  # all but one
    half = torch.ones(1, dim, dtype=dtype)
    half[0, : dim // 2] = 0
    u = torch.nn.functional.normalize(torch.cat([zeros, half])).requires_grad_()
    if GAUGES[name].domain == "orthant":
        with pytest.raises(nfi.errors.OffManifoldError, match="lie outside the positive orthant"):
            layer(coordinates(setting, u.detach()))
        return
    log_stretch = layer.flows[1].log_stretch(u)
    (gradient,) = torch.autograd.grad(log_stretch.sum(), u, create_graph=True)
    assert bool(log_stretch.isfinite().all())
    assert bool(gradient.isfinite().all())
    if gradient.requires_grad:
        (curvature,) = torch.autograd.grad(gradient.square().sum(), u, allow_unused=True)
        assert curvature is None or not bool(curvature.isnan().any())


def test_dense_volumes_notice_a_missing_slope():
    """The oracle itself: a surface that is no sphere has a secant, which it must see."""
    setting = ("lp_3", 3)
    layer, gauge = layers(setting)
    z = coordinates(setting, smooth_directions(setting, 1))
    without = 2 * gauge.log_radius(SphereChart(3).decode(z), level_of()) + SphereChart(3)(z)[1]
    assert float(dense_log_volume(layer.decode, z) - without) > 1e-2


def test_the_cube_is_a_gauge_of_p_norms():
    cube = LpGauge(torch.inf)
    assert type(cube) is LpGauge
    assert repr(cube) == "LpGauge(inf)"
    assert options_of(cube)[""].values == {"p": "inf", "eps": 0.0}
    assert not cube.state_dict()
    x = torch.tensor([[1.0, -3.0, 2.0]])
    assert copy.deepcopy(cube).value(x) == pickle.loads(pickle.dumps(cube)).value(x) == 3

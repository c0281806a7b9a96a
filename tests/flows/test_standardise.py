"""Units: the transform of Yeo and Johnson, robust fits, and the layer."""

from __future__ import annotations

import copy
import math

import normflows as nf
import pytest
import torch
from scipy import stats
from support.comparison import close
from torch.autograd import gradcheck, gradgradcheck

from normflows_injective.errors import (
    NonFiniteError,
    OffManifoldError,
    OptionError,
    ShapeError,
)
from normflows_injective.flows import Standardise
from normflows_injective.flows.standardise.power import (
    likeliest_power,
    yeo_johnson,
    yeo_johnson_inverse,
)

POWERS = [0.0, 1e-300, 1e-12, 1e-4, 0.3, 1.0, 1.7, 2 - 1e-4, 2 - 1e-12, 2.0]
SIZES = [0.0, 1e-290, 1e-12, 1e-4, 0.5, 3.0, 1e4, 1e30]
ROWS = 10_000


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("power", POWERS)
def test_the_transform_is_that_of_scipy(power):
    u = doubles([-30.0, -2.0, -0.1, 0.0, 0.1, 2.0, 30.0])
    close(yeo_johnson(u, doubles(power))[0], stats.yeojohnson(u.numpy(), power), 1e-10)


@pytest.mark.parametrize("power", POWERS)
def test_the_inverse_keeps_its_digits_from_the_smallest_to_the_largest(power):
    u = doubles([-size for size in SIZES] + SIZES)
    y, log_slope = yeo_johnson(u, doubles(power))
    back, minus_log_slope = yeo_johnson_inverse(y, doubles(power))
    # A relative error of the logarithm, 69 at 1e30, is an absolute one of the logarithm's image.
    torch.testing.assert_close(back, u, rtol=1e-12, atol=0)
    torch.testing.assert_close(minus_log_slope, -log_slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("function", [yeo_johnson, yeo_johnson_inverse])
def test_derivatives_of_both_orders(power, function):
    # Both sides of zero, at distances that finite differences do not cross.
    u = doubles([-3.0, -0.4, -1e-2, 1e-2, 0.4, 3.0]).requires_grad_()

    def both(u):
        return function(u, doubles(power))

    assert gradcheck(both, (u,), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(both, (u,))
    slope = torch.autograd.grad(both(u)[0].sum(), u)[0]
    close(both(u)[1], slope.log(), 1e-12)


@pytest.mark.parametrize("power", POWERS)
def test_at_zero_both_sides_have_one_slope_and_one_curvature(power):
    at, beside = doubles([0.0]).requires_grad_(), doubles([-1e-9]).requires_grad_()
    for point in (at, beside):
        (slope,) = torch.autograd.grad(
            yeo_johnson(point, doubles(power))[0].sum(), point, create_graph=True
        )
        (curvature,) = torch.autograd.grad(slope.sum(), point)
        close(slope, 1.0, 1e-8)
        close(curvature, power - 1, 1e-8)


@pytest.mark.parametrize("draw", ["exponential", "gumbel", "minus_gamma", "normal", "uniform"])
def test_the_exponent_is_the_likeliest(draw):
    u = {
        "exponential": lambda: -torch.rand(500).log(),
        "gumbel": lambda: -(-torch.rand(500).log()).log(),
        "minus_gamma": lambda: torch.rand(3, 500).log().sum(0),
        "normal": lambda: torch.randn(500),
        "uniform": lambda: torch.rand(500),
    }[draw]()
    ordered = u.double().sort().values
    ordered = ordered - ordered.median()
    expected = min(max(float(stats.yeojohnson_normmax(ordered.numpy())), 0.0), 2.0)
    assert abs(likeliest_power(ordered) - expected) < 1e-4


@pytest.mark.slow
def test_many_values_are_stood_for_by_quantiles():
    normal = torch.randn(50_000, dtype=torch.float64).sort().values
    many, _ = yeo_johnson_inverse(normal, doubles(0.5))
    expected = stats.yeojohnson_normmax(many.numpy())
    # The standard error of the exponent is about .005 here.
    assert abs(likeliest_power(many) - expected) < 1e-3


def skewed():
    """Columns: normal, log-normal, exponential with an offset, two values, constant."""
    exponential = -torch.rand(ROWS, dtype=torch.float64).log()
    return torch.stack(
        [
            3 * torch.randn(ROWS, dtype=torch.float64) + 5,
            1e5 * torch.randn(ROWS, dtype=torch.float64).exp(),
            2 * exponential - 1,
            (torch.rand(ROWS, dtype=torch.float64) < 0.05).double(),
            torch.full((ROWS,), 7.0, dtype=torch.float64),
        ],
        dim=1,
    )


def test_normal_columns_get_their_mean_and_deviation():
    x = torch.randn(ROWS, 2, dtype=torch.float64) * doubles([3.0, 1e-8]) + doubles([5.0, -1e3])
    layer = Standardise.fit(x)
    close(layer.shift, x.mean(0), 1e-12)  # no value of a normal column is winsorised
    close(layer.scale, x.std(0, correction=0), 1e-7)
    close(layer.inverse(x)[0].std(0, correction=0), 1.0, 1e-7)


def test_spikes_are_part_of_a_column_if_they_are_not_few():
    spikes = torch.where(torch.arange(1000) < 30, 100.0, 0.0).unsqueeze(1).double()
    x = spikes + torch.randn(1000, 1).double()
    layer = Standardise.fit(x)
    # The noise of the highest spikes alone is cut.
    close(layer.scale, x.std(0, correction=0), 0.01)
    close(layer.shift, x.mean(0), 0.01)


@pytest.mark.parametrize("transform", ["none", "power"])
@pytest.mark.parametrize("absurd", [9.97e36, -1e30, math.pi * 1e5])
def test_a_few_absurd_values_move_nothing(transform, absurd):
    x = torch.randn(ROWS, 1, dtype=torch.float64) + 2
    clean = Standardise.fit(x, transform=transform)
    spoiled = x.clone()
    spoiled[:3] = absurd
    layer = Standardise.fit(spoiled, transform=transform)
    # Three of ten robust deviations: .003 in the mean, .03 in the variance.
    coordinates = layer.inverse(x)[0] - clean.inverse(x)[0]
    assert coordinates.abs().mean() < 0.03
    assert coordinates.mean().abs() < 0.015
    assert layer.columns[0].remarks[0] == f"3 of {ROWS} values beyond 10 robust deviations"


def test_columns_of_one_value_keep_it_as_their_shift():
    x = torch.full((50, 2), 7.0)
    x[:, 1] = torch.randn(50)
    layer = Standardise.fit(x, transform="auto")
    assert layer.columns[0][1:4] == ("none", 7.0, 1.0)
    assert layer.columns[0].remarks == ("constant",)
    assert not layer.inverse(x)[0][:, 0].any()


def test_a_column_that_is_nearly_constant_is_taken_for_one():
    x = torch.zeros(1000, 1)
    x[3] = 9.97e36
    column = Standardise.fit(x, transform="power").columns[0]
    assert (column.kind, column.shift, column.scale) == ("none", 0.0, 1.0)
    assert column.remarks == ("constant but for 1 of 1000 values",)


def test_a_column_of_many_zeros_has_the_scale_of_the_others():
    x = torch.randn(ROWS, 1, dtype=torch.float64) * 5
    x[: ROWS * 7 // 10] = 0
    layer = Standardise.fit(x)
    x[0] = 1e30
    close(layer.scale, x[1:].std(0, correction=0), 1e-3)
    close(Standardise.fit(x).scale, layer.scale, 2e-2)


def test_the_transform_is_chosen_by_skewness():
    kinds = [column.kind for column in Standardise.fit(skewed(), transform="auto").columns]
    assert kinds == ["none", "log", "power", "none", "none"]


@pytest.mark.parametrize("transform", ["none", "power", "auto", ["auto", "log", *3 * ["power"]]])
def test_coordinates_have_mean_zero_and_deviation_one(transform):
    x = skewed()
    layer = Standardise.fit(x, transform=transform)
    z, log_det = layer.inverse(x)
    back, minus = layer(z)
    torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)
    close(minus, -log_det, 1e-9)
    kinds = {column.kind for column in layer.columns}
    for j in (0, 3) if kinds == {"none"} else (0, 1, 3):
        # Winsorising moves heavy tails a little.
        close(z[:, j].mean(), 0.0, 0.05)
        close(z[:, j].std(), 1.0, 0.05)


def test_log_makes_samples_positive_and_refuses_what_is_not():
    x = torch.rand(100, 2) + 0.1
    layer = Standardise.fit(x, transform=["log", "none"], names=["price", "debt"])
    assert bool((layer(10 * torch.randn(1000, 2))[0][:, 0] > 0).all())
    x[:3] = doubles([0.0, -1.0])
    says = r"positive in columns whose logarithm is taken, got 3 values that are not, in price \(3"
    with pytest.raises(OffManifoldError, match=says):
        layer.inverse(x)
    with pytest.raises(OptionError, match="got values of zero or less in debt, worth"):
        Standardise.fit(
            -x.repeat(1, 2)[:, :3], transform=["none", *2 * ["log"]], names=["a", "debt", "worth"]
        )


def test_logarithms_that_arrive_later_are_seen():
    x = -torch.ones(3, 2)
    layer = Standardise(2)
    twins = layer, copy.deepcopy(layer)
    for twin in twins:
        twin.inverse(x)  # no logarithm yet
    twins[0].load_state_dict(Standardise.fit(torch.rand(9, 2) + 1, transform="log").state_dict())
    twins[1].kind = torch.ones_like(layer.kind)
    for twin in (*twins, copy.deepcopy(twins[0])):
        with pytest.raises(OffManifoldError, match="positive"):
            twin.inverse(x)


def test_numbers_that_are_not_finite_are_refused_by_the_names_of_columns():
    x = torch.randn(20, 3)
    x[1, 0], x[2:4, 2] = math.nan, math.inf
    with pytest.raises(NonFiniteError, match=r"3 of 60 values .* in age \(1\), height \(2\)"):
        Standardise.fit(x, names=["age", "weight", "height"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"transform": "sqrt"}, "transform must be one of none, log, power, auto"),
        ({"transform": ["none"]}, "a list of 3 of them"),
        ({"transform": ["none", "log", "?"]}, r"transform\[2\] must be one of"),
        ({"names": ["a", "b"]}, "3 different strings, one per column, got 2"),
        ({"names": ["a", "b", "b"]}, "got 2 different ones"),
        ({"names": ["a", "b", 3]}, "got 3 among them"),
        ({"names": "abc"}, "names must be a list of strings"),
    ],
)
def test_wrong_options_are_refused(options, says):
    with pytest.raises(OptionError, match=says):
        Standardise.fit(torch.rand(8, 3), **options)


def test_one_row_has_no_scale():
    with pytest.raises(ShapeError, match="at least two rows"):
        Standardise.fit(torch.rand(1, 3))


def test_the_identity_takes_over_what_was_fitted():
    fitted = Standardise.fit(skewed().float(), transform="auto", names=list("abcde"))
    twin = Standardise(5)
    z = torch.randn(4, 5)
    assert torch.equal(twin(z)[0], z)
    assert not list(twin.parameters())
    twin.load_state_dict(fitted.state_dict())
    assert all(map(torch.equal, twin(z), fitted(z)))
    assert [c[1:-1] for c in twin.columns] == [c[1:-1] for c in fitted.columns]
    assert repr(twin) == "Standardise(shape=(5,), none=3, log=1, power=1)"


def test_remarks_go_with_the_numbers_that_they_are_about():
    layer = Standardise.fit(torch.ones(5, 2), names=["a", "b"])
    assert copy.deepcopy(layer).columns == layer.columns
    layer.load_state_dict(Standardise(2).state_dict())
    assert [c.remarks for c in layer.columns] == [(), ()]
    assert [c.name for c in layer.columns] == ["a", "b"]


def test_images_have_one_set_of_numbers_per_channel():
    x = torch.randn(300, 2, 4, 3, dtype=torch.float64) * doubles([2.0, 50.0]).view(2, 1, 1)
    layer = Standardise.fit(x)
    assert layer.shape == (2, 4, 3)
    close(layer.scale, x.transpose(0, 1).flatten(1).std(1, correction=0), 1e-9)
    close(layer(layer.inverse(x)[0])[0], x, 1e-12)
    close(layer(x)[1], 12 * layer.scale.log().sum(), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_offset_costs_the_digits_that_the_page_says(dtype):
    x = 1e6 + torch.randn(1000, 1, dtype=torch.float64)
    layer = Standardise.fit(x).to(dtype)
    z = layer.inverse(x.to(dtype))[0]
    exact = (x - x.mean()) / x.std(correction=0)
    # Rounding of x, of the shift, and of what is added up again: half an ulp of 1e6 each.
    half = torch.finfo(dtype).eps * 2**19
    assert (z - exact).abs().max() < 4 * half
    assert (layer(z)[0] - x).abs().max() < 4 * half


def test_numbers_of_another_precision_follow_the_data():
    layer = Standardise.fit(skewed(), transform="auto")
    z = torch.randn(3, 5)
    x, log_det = layer(z)
    assert {x.dtype, log_det.dtype, layer.inverse(x)[0].dtype} == {torch.float32}
    assert layer.shift.dtype == torch.float64
    assert layer.float().kind.dtype == torch.long


def test_a_flow_of_normflows_has_the_density_of_the_units():
    x = skewed()[:, 1:2]
    layer = Standardise.fit(x, transform="log")
    base = nf.distributions.DiagGaussian(1, trainable=False).double()
    law = stats.lognorm(float(layer.scale), scale=float(layer.shift.exp()))
    # normflows adds log-dets in float32.
    close(nf.NormalizingFlow(base, [layer]).log_prob(x[:50]), law.logpdf(x[:50, 0]), 1e-5)


def test_transforms_go_through_vmap_and_forward_mode():
    layer = Standardise.fit(skewed(), transform="auto")
    z, tangent = torch.randn(2, 3, 5, dtype=torch.float64).unbind()
    rows = torch.func.vmap(lambda row: layer(row[None])[0][0])(z)
    close(rows, layer(z)[0], 1e-12)
    _, product = torch.func.jvp(lambda z: layer(z)[0], (z,), (tangent,))
    slope = torch.autograd.functional.jvp(lambda z: layer(z)[0], z, tangent)[1]
    close(product, slope, 1e-12)
    x = layer(z)[0]
    back = torch.func.vmap(lambda row: layer.inverse(row[None])[0][0])(x)
    close(back, z, 1e-9)


def test_columns_that_are_not_bent_skip_the_transforms_without_a_difference():
    x = 3 + torch.randn(20, 4, dtype=torch.float64)
    units = Standardise.fit(x)
    for way in (units.forward, units.inverse):
        value, log_det = way(x)
        # A vmap follows all transforms, because it cannot ask which columns there are.
        values, log_dets = torch.func.vmap(lambda row, way=way: way(row.unsqueeze(0)))(x)
        close(value, values.squeeze(1), 1e-15)
        close(log_det, log_dets.squeeze(1), 1e-15)
    before = units.inverse(x)[0]
    units.kind[0], units.power[0] = 2, 0.5
    bent = (before - units.inverse(x)[0]).abs().amax(0)
    assert bent[0] > 0.1
    assert not bent[1:].any()

"""Products of surfaces: block-diagonal Jacobians, named columns, and densities that integrate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.dense import dense_jacobian
from support.seeds import manual_seed
from torch import nn

import normflows_injective as nfi
from normflows_injective.errors import (
    InjectiveFlowError,
    NonFiniteError,
    OffManifoldError,
    OptionError,
    ShapeError,
    UnsupportedLayerError,
)
from normflows_injective.flows import (
    HalfLineChart,
    IntervalChart,
    LineChart,
    OnCoordinates,
    ProductSurface,
    SimplexStickBreaking,
    SphereChart,
    TorusChart,
    product_flow,
)
from normflows_injective.flows.coupling import LULinear

WORDS = {
    "wind": "circle:360",
    "place": "sphere",
    "soil": "simplex:3",
    "temp": "real",
    "rate": "positive",
    "share": "between:0:1",
    "joints": "torus:2",
    "depth": "above:-5",
    "pose": "rotation",
}


@pytest.fixture(autouse=True)
def _seed():
    manual_seed(0)


def some_data(rows=40):
    return {
        "wind": 360 * torch.rand(rows),
        "place": nn.functional.normalize(torch.randn(rows, 3)),
        "soil": torch.rand(rows, 3).add(0.1).softmax(1),
        "temp": 15 + 5 * torch.randn(rows),
        "rate": torch.randn(rows).exp(),
        "share": torch.rand(rows),
        "joints": 6 * torch.rand(rows, 2) - 3,
        "depth": torch.rand(rows) - 4,
        "pose": nfi.points.quaternions_from_axis_angle(
            nn.functional.normalize(torch.randn(rows, 3)), torch.rand(rows)
        ),
        "unused": torch.zeros(rows),
    }


def perturbed(flow, size=0.15):
    for parameter in flow.double().parameters():
        parameter.data += size * torch.randn_like(parameter)
    return flow.eval()


def small(words, data=None, **options):
    return product_flow(
        words, data, num_layers=2, width=16, num_blocks=1, num_components=3, **options
    )


COLUMNS = {
    "line": lambda: LineChart(3.0, 2.0),
    "half_line": lambda: HalfLineChart(-1.0, 0.5, 2.0),
    "interval": lambda: IntervalChart(-2.0, 5.0),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_charts_of_columns(name):
    chart = COLUMNS[name]().double()
    z = torch.linspace(-6, 6, 25, dtype=torch.float64).view(-1, 1)
    x, log_volume = chart(z)
    back, log_back = chart.inverse(x)
    # Close to the upper bound of an interval a number keeps few digits of its distance to it.
    torch.testing.assert_close(back, z, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(log_back, -log_volume, rtol=1e-5, atol=1e-4)
    slopes = dense_jacobian(chart.decode, z).flatten()
    torch.testing.assert_close(log_volume, slopes.log())


def test_a_normal_coordinate_is_the_uniform_law_of_an_interval():
    chart = IntervalChart(0.0, 10.0).double()
    x = torch.linspace(0.01, 9.99, 50, dtype=torch.float64).view(-1, 1)
    z, log_det = chart.inverse(x)
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z).squeeze(1) + log_det
    torch.testing.assert_close(log_p, torch.full((50,), -math.log(10.0), dtype=torch.float64))


@pytest.mark.parametrize(
    ("chart", "outside", "message"),
    [
        (HalfLineChart(), 0.0, "not above 0, the first at index 1: 0"),
        (IntervalChart(), 1.0, "not between 0 and 1, the first at index 1: 1"),
    ],
)
def test_numbers_outside_of_a_column_are_refused(chart, outside, message):
    with pytest.raises(OffManifoldError, match=message):
        chart.inverse(torch.tensor([[0.5], [outside]]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LineChart(0.0, 0.0), "scale must be a positive number"),
        (lambda: HalfLineChart(0.0, 0.0, -1.0), "scale must be a positive number"),
        (lambda: IntervalChart(1.0, 0.0), "finite bounds, the lower first"),
        (lambda: ProductSurface([]), "one factor at least"),
        (lambda: ProductSurface({"a": nn.Linear(1, 1)}), "factor 'a' must be a chart"),
        (lambda: OnCoordinates(LULinear(2), [0, 0], 3), "different numbers from 0 to 2"),
    ],
)
def test_wrong_options_are_named(build, message):
    with pytest.raises(OptionError, match=message):
        build()


def test_a_learned_injection_is_no_factor():
    pair = nfi.nets.mlp_autoencoder(5, 2, (8,))
    with pytest.raises(UnsupportedLayerError, match="no closed-form log-volume"):
        ProductSurface({"a": nfi.flows.FreeFormInjection(*pair)})


def test_the_log_volume_is_that_of_the_dense_jacobian():
    surface = nfi.flows.InjectiveComposite(
        [SphereChart(3), nfi.flows.RadialSurface(nfi.flows.gauges.LpGauge(3.0))]
    )
    product = ProductSurface(
        {
            "wind": TorusChart(1, "vectors"),
            "place": SphereChart(3),
            "soil": SimplexStickBreaking(3, measure="hausdorff"),
            "temp": LineChart(1.0, 3.0),
            "around": surface,
        }
    ).double()
    z = 0.7 * torch.randn(3, *product.latent_shape, dtype=torch.float64)
    jacobian = dense_jacobian(product.decode, z)
    expected = 0.5 * torch.logdet(jacobian.mT @ jacobian)
    x, log_volume = product(z)
    torch.testing.assert_close(log_volume, expected)
    back, log_back = product.inverse(x)
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(log_back, -log_volume)
    assert product.ind_circ == [0, 2, 7]
    assert product.measures == {
        "wind": "hausdorff",
        "place": "hausdorff",
        "soil": "hausdorff",
        "temp": "lebesgue",
        "around": "hausdorff",
    }
    assert "temp: lebesgue" in repr(product)


def test_some_coordinates_are_mapped_and_the_others_stay():
    layer = OnCoordinates(LULinear(2), [3, 1], 5).double()
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    z = torch.randn(6, 5, dtype=torch.float64)
    x, log_det = layer(z)
    torch.testing.assert_close(x[:, [0, 2, 4]], z[:, [0, 2, 4]], rtol=0, atol=0)
    jacobian = dense_jacobian(lambda z: layer(z)[0], z)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet)
    torch.testing.assert_close(layer.inverse(x)[0], z)


def test_named_columns_there_and_back():
    data = some_data()
    flow = small(WORDS, data)
    x = flow.rows(data)
    shown = flow.columns(x)
    assert list(shown) == list(WORDS)
    for name in WORDS:
        torch.testing.assert_close(shown[name], data[name])
    arrays = {name: column.numpy() for name, column in data.items()}
    torch.testing.assert_close(flow.rows(arrays), x)
    log_p = flow.log_prob(data)
    torch.testing.assert_close(flow.log_prob(x), log_p)
    assert log_p.isfinite().all()


def test_a_data_frame_is_a_mapping_of_columns():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame({"temp": np.arange(5.0), "rate": np.arange(1, 6)})
    flow = small({"temp": "real", "rate": "positive"}, frame)
    assert flow.log_prob(frame).shape == (5,)


def test_samples_lie_on_their_surfaces_and_have_the_density_that_comes_with_them():
    data = some_data()
    flow = perturbed(small(WORDS, data))
    with torch.no_grad():
        sample, log_q = flow.sample(100)
        # A share next to one keeps few digits of its distance from it, on which its density hangs.
        inner = (sample["share"] - 0.5).abs() < 0.5 - 1e-7
        torch.testing.assert_close(flow.log_prob(sample)[inner], log_q[inner], rtol=0, atol=1e-6)
        assert inner.double().mean() > 0.9
    assert {name: column.shape[1:] for name, column in sample.items()} == {
        name: data[name].shape[1:] for name in WORDS
    }
    assert ((sample["wind"] >= 0) & (sample["wind"] < 360)).all()
    torch.testing.assert_close(sample["place"].norm(dim=1), torch.ones(100).double())
    torch.testing.assert_close(sample["soil"].sum(1), torch.ones(100).double())
    assert (sample["rate"] > 0).all()
    assert (sample["depth"] > -5).all()
    assert ((sample["share"] > 0) & (sample["share"] < 1)).all()


def test_a_density_on_a_cylinder_integrates_to_one():
    flow = perturbed(small({"angle": "circle", "height": "between:0:2"}), 0.08)
    # In the normal coordinate of the height, in which the density is smooth and has light tails.
    heights = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    angles = torch.arange(200, dtype=torch.float64) * 2 * math.pi / 200
    z = torch.cartesian_prod(angles, heights)
    x, log_volume = flow.surface(z)
    with torch.no_grad():
        density = (flow.log_prob(x) + log_volume).exp()
    total = density.sum() * (2 * math.pi / 200) * (heights[1] - heights[0])
    # The splines of the height have corners in their second derivatives.
    assert abs(float(total) - 1) < 1e-5


def test_it_starts_uniform_on_compact_factors_and_normal_on_others():
    flow = small({"wind": "circle:360", "place": "sphere", "soil": "simplex:3", "temp": "real"})
    flow.double()
    data = {name: column.double() for name, column in some_data().items()}
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(data["temp"])
    expected = normal - math.log(360) - math.log(4 * math.pi) + math.log(2)
    # Random turns of the sphere keep the uniform law, random linear maps are the identity.
    torch.testing.assert_close(flow.log_prob(data), expected, rtol=1e-6, atol=1e-5)


def test_location_and_scale_are_those_of_the_data():
    data = {"temp": 100 + 7 * torch.randn(500), "rate": (3 + torch.randn(500)).exp()}
    surface = small({"temp": "real", "rate": "positive"}, data).surface
    temp, rate = surface.factors
    torch.testing.assert_close(temp.loc, data["temp"].mean(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(rate.scale, data["rate"].log().std(correction=0))
    constant = small({"temp": "real"}, {"temp": torch.full((9,), 4.0)}).surface.factors[0]
    assert (float(constant.loc), float(constant.scale)) == (4.0, 1.0)


def test_a_context_is_used_and_a_loss_trains_all_of_it():
    flow = perturbed(small(WORDS, some_data(), context_dim=2))
    data = {name: column.double() for name, column in some_data().items()}
    first, second = (flow.log_prob(data, torch.randn(40, 2).double()) for _ in range(2))
    assert (first - second).abs().min() > 0
    flow.forward_kld(data, torch.randn(40, 2).double()).backward()
    missing = [name for name, p in flow.named_parameters() if p.grad is None]
    assert not missing


def test_many_turns_are_taken_off_before_an_angle_is_rounded():
    seconds = 1.6e9 + 86400 * np.linspace(0.1, 0.9, 50)
    flow = small({"time": "circle:86400"})
    shown = flow.rows({"time": seconds}).squeeze(1).double()
    expected = torch.from_numpy(seconds % 86400)
    assert (shown - expected).abs().max() < 0.01


def test_messages_name_the_column():
    flow = small({"a": "sphere", "b": "sphere", "y": "positive"})
    data = {"a": torch.eye(3), "b": 1.3 * torch.eye(3), "y": torch.ones(3)}
    with pytest.raises(OffManifoldError, match="Column 'b': .* off the unit sphere"):
        flow.log_prob(data)
    with pytest.raises(OffManifoldError, match="Column 'y': .* not above 0"):
        flow.log_prob({"a": torch.eye(3), "b": torch.eye(3), "y": -torch.ones(3)})


@pytest.mark.parametrize("word", ["sphere", "simplex:3", "between:0:1"])
def test_data_off_their_surface_are_refused_at_once(word):
    column = torch.full((4, 3), 5.0) if word != "between:0:1" else torch.full((4,), 5.0)
    with pytest.raises(OffManifoldError, match="Column 'a'"):
        product_flow({"a": word}, {"a": column})


def test_a_target_is_approached_by_draws():
    class Target:
        on_manifold = True

        def log_prob(self, x):
            return x[:, 0].cos()

    flow = small({"a": "circle", "b": "between:0:1"}, p=Target())
    assert flow.reverse_kld(16).dim() == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"a": "complex"}, "word of the column 'a' is not understood: 'complex'. Words are real"),
        ({"a": "simplex"}, "not understood: 'simplex'"),
        ({"a": "above"}, "not understood: 'above'"),
        ({"a": "between:0"}, "not understood: 'between:0'"),
        ({"a": "real:3"}, "not understood: 'real:3'"),
        ({"a": "circle:x"}, "not understood: 'circle:x'"),
        ({"a": 3}, "must be a string or a chart, got 3"),
        ({"a": "circle:-1"}, "period must be a positive number"),
        ({}, "one factor at least"),
        ({"a": SphereChart(3, "angles")}, "no uniform law is known"),
    ],
)
def test_words_that_mean_nothing_are_named(words, message):
    with pytest.raises(InjectiveFlowError, match=message):
        product_flow(words)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda data: data.pop("temp"), OptionError, "no column 'temp'"),
        (lambda data: data.update(temp=torch.zeros(3)), ShapeError, "40"),
        (lambda data: data.update(place=torch.zeros(40, 2)), ShapeError, "shape \\(N, 3\\)"),
        (
            lambda data: data.update(temp=torch.full((40,), math.nan)),
            NonFiniteError,
            "column 'temp'",
        ),
        (lambda data: data.update(rate=torch.zeros(40)), OffManifoldError, "not above 0"),
    ],
)
def test_columns_that_do_not_fit_are_named(change, error, message):
    data = some_data()
    change(data)
    with pytest.raises(error, match=message):
        product_flow(WORDS, data).rows(data)

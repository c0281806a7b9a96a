"""Uniform laws of surfaces, their masses and samples, and laws seen in a chart."""

from __future__ import annotations

import copy
import math

import normflows as nf
import pytest
import torch
from support.seeds import manual_seed, seeded_generator

import normflows_injective as nfi
from normflows_injective.distributions import (
    AngularCentralGaussian,
    Pullback,
    UniformOnSurface,
    UniformSphere,
    VonMisesFisher,
)
from normflows_injective.errors import NumericalWarning, OffManifoldError, OptionError
from normflows_injective.flows import InjectiveComposite, RadialSurface, SphereChart, gauges

ELLIPSOID = torch.tensor([1.0, 0.9, 0.8])


def uniform_directions(count, dim, seed=0):
    generator = seeded_generator(seed)
    x = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("gauge", "dim", "area"),
    [
        (gauges.LpGauge(1.0), 2, 4 * math.sqrt(2)),
        (gauges.LpGauge(1.0), 8, 2**8 * math.sqrt(8) / math.factorial(7)),
        (gauges.LpGauge(2.0), 5, 26.318945069571623),
        (gauges.LpGauge(math.inf), 3, 24.0),
        (gauges.HyperplaneGauge(torch.ones(3)), 3, math.sqrt(3) / 2),
        (gauges.HyperplaneGauge(torch.tensor([1.0, 2.0])), 2, math.hypot(1, 0.5)),
        (gauges.SlopeGauge(torch.ones(3)), 3, 4 * math.sqrt(3)),
        (gauges.SlopeGauge(torch.tensor([1.0, 0.0, 0.0])), 3, 24.0),
        (gauges.GroupLassoGauge([[0, 1, 2]], [1.0]), 3, 4 * math.pi),
        # A double cone of radius and height one: twice the lateral area pi sqrt(2).
        (gauges.GroupLassoGauge([[0, 1], [2]], [1.0, 1.0]), 3, 2 * math.pi * math.sqrt(2)),
    ],
)
@pytest.mark.parametrize("level", [1.0, 2.5])
def test_areas_in_closed_form(gauge, dim, area, level):
    law = UniformOnSurface(gauge, level, dim=dim).double()
    assert law.standard_error == 0
    x, log_p = law(3)
    torch.testing.assert_close(
        log_p, torch.full((3,), -math.log(area) - (dim - 1) * math.log(level)).double()
    )
    torch.testing.assert_close(law.log_prob(x), log_p)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gauge", "dim", "area"),
    [
        (gauges.EllipsoidGauge(ELLIPSOID), 3, 10.1621385217635),
        (gauges.EllipsoidGauge(torch.tensor([3.0, 2.0, 0.5])), 3, 41.5548648103804),
        (gauges.LpGauge(2 / 3), 2, 6.0),
        (gauges.LpGauge(2 / 3), 3, 17 * math.pi / 12),
        (gauges.ImplicitGauge(lambda x: x.square().sum(1)), 3, 4 * math.pi),
    ],
)
def test_areas_by_average_within_four_standard_errors(gauge, dim, area):
    law = UniformOnSurface(gauge, dim=dim)
    assert abs(law.log_unit_mass - math.log(area)) < 4 * law.standard_error + 1e-12
    assert law.standard_error < 0.01


def test_the_standard_error_is_that_of_the_logarithm():
    """Forty independent averages scatter as they say: the variance ratio has error 0.23."""
    gauge = gauges.EllipsoidGauge(torch.tensor([3.0, 2.0, 0.5]))
    stretch = RadialSurface(gauge.double()).log_stretch
    law = UniformOnSurface(gauge, dim=3, num_directions=2000)
    logs = []
    for seed in range(40):
        u = uniform_directions(2000, 3, seed)
        # By the cone measure, as the law does: the image of a uniform direction.
        x = u * gauge.axes
        direction = x / x.norm(dim=1, keepdim=True)
        log_radius = gauge.log_radius(direction, torch.tensor(1.0).double())
        ratio = stretch(direction) - 3 * log_radius
        logs.append(ratio.logsumexp(0))
    scatter = float(torch.stack(logs).std())
    assert 0.5 < scatter / law.standard_error < 1.6


@pytest.mark.parametrize("p", [0.5, 1.0, 1.5, 3.0, math.inf])
@pytest.mark.parametrize("dim", [3, 10])
def test_cone_mass_is_d_times_the_volume_of_the_ball(p, dim):
    law = UniformOnSurface(gauges.LpGauge(p), 2.0, "cone", dim=dim)
    volume = dim * math.log(2 * math.gamma(1 + 1 / p)) - math.lgamma(1 + dim / p)
    assert law.standard_error == 0
    x, log_p = law(2)
    assert x.shape == (2, dim)
    expected = -(math.log(dim) + volume + dim * math.log(2))
    torch.testing.assert_close(log_p, torch.full((2,), expected))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gauge", "dim"),
    [
        (gauges.LpGauge(0.75, 0.1), 4),
        (gauges.LpGauge(1.3), 4),
        (gauges.LpGauge(3.0), 4),
        (
            gauges.EllipsoidGauge(
                torch.tensor([[2.0, 0.0, 0.3], [0.5, 1.0, 0.0], [0.0, 0.1, 0.5]])
            ),
            3,
        ),
        (gauges.ElasticNetGauge(1.0, 2.0), 4),
        (gauges.SlopeGauge(torch.tensor([3.0, 2.0, 0.5, 0.5])), 4),
        (gauges.GroupLassoGauge([[0, 3], [1, 2]]), 4),
        (gauges.HyperplaneGauge(torch.tensor([1.0, 2.0, 0.5])), 3),
    ],
)
@pytest.mark.parametrize("measure", ["hausdorff", "cone"])
@pytest.mark.filterwarnings("ignore::normflows_injective.errors.NumericalWarning")
def test_samples_follow_the_measure(gauge, dim, measure):
    """Means of three statistics beside importance sampling, within five standard errors."""
    count = 40_000
    law = UniformOnSurface(gauge, 1.5, measure, dim=dim).double()
    x, _ = law(count)
    u = uniform_directions(count, dim)
    u = u.abs() if gauge.domain == "orthant" else u
    points, log_stretch = RadialSurface(copy.deepcopy(gauge).double(), 1.5, measure)(u)
    weights = log_stretch.softmax(0)
    for statistic in (
        lambda s: s.abs().amax(1),
        lambda s: s[:, 0].abs(),
        lambda s: s.norm(dim=1) * (s[:, 0] * s[:, -1] > 0),
    ):
        drawn, proposed = statistic(x), statistic(points)
        mean = (weights * proposed).sum()
        error = math.sqrt(
            float(drawn.var() / count + (weights.square() * (proposed - mean).square()).sum())
        )
        assert abs(float(drawn.mean() - mean)) < 5 * error
    law.surface.encode(x)  # raises where a sample is off the surface


@pytest.mark.slow
def test_area_and_cone_measure_differ_as_published():
    """E max|x_k| at D = 3, p = 1/2: 0.299 by cone measure, 0.3578 by area (star-like flows)."""
    u = uniform_directions(400_000, 3)
    for measure, expected in (("cone", 0.2991), ("hausdorff", 0.3578)):
        x, log_stretch = RadialSurface(gauges.LpGauge(0.5), measure=measure)(u)
        weights = log_stretch.softmax(0)
        largest = x.abs().amax(1)
        mean = float((weights * largest).sum())
        error = float((weights.square() * (largest - mean).square()).sum().sqrt())
        assert abs(mean - expected) < 4 * error + 1e-4, measure


def test_a_missing_bound_is_said():
    manual_seed(3)
    law = UniformOnSurface(gauges.LpGauge(0.5), dim=3, num_directions=200)
    with pytest.warns(NumericalWarning, match="LpGauge with p < 1 has no bound"):
        law(2000)


def test_the_level_may_come_from_a_context():
    law = UniformOnSurface(gauges.LpGauge(1.0), dim=3, level_from_context=0)
    context = torch.tensor([[1.0], [2.0]])
    x, log_p = law(2, context)
    torch.testing.assert_close(x.abs().sum(1), context[:, 0])
    torch.testing.assert_close(log_p[0] - log_p[1], torch.tensor(2 * math.log(2.0)))
    with pytest.raises(OptionError, match="change their shape with the level"):
        UniformOnSurface(gauges.ElasticNetGauge(1.0, 1.0), dim=3, level_from_context=0)


def test_options_that_cannot_be_are_refused():
    with pytest.raises(OptionError, match="dim must be given"):
        UniformOnSurface(gauges.LpGauge(1.0))
    with pytest.raises(OptionError, match="got dim=4, and EllipsoidGauge has 3"):
        UniformOnSurface(gauges.EllipsoidGauge(ELLIPSOID), dim=4)
    with pytest.raises(OptionError, match="Freeze it with"):
        UniformOnSurface(gauges.EllipsoidGauge(ELLIPSOID, trainable=True))
    law = UniformOnSurface(gauges.LpGauge(1.0), dim=3)
    with pytest.raises(OffManifoldError, match="off the surface of LpGauge"):
        law.log_prob(torch.ones(1, 3))
    projecting = UniformOnSurface(gauges.LpGauge(1.0), dim=3, off_manifold="project")
    assert projecting.log_prob(torch.ones(1, 3)).isfinite()


def test_sampling_leaves_the_gauge_and_the_random_state_of_construction_alone():
    gauge = gauges.EllipsoidGauge(ELLIPSOID)
    state = torch.get_rng_state()
    law = UniformOnSurface(gauge, dim=3)
    assert torch.equal(state, torch.get_rng_state())
    x, log_p = law(5)
    assert gauge.axes.dtype == x.dtype == log_p.dtype == torch.float32
    assert law.double()(5)[0].dtype == torch.float64


@pytest.mark.parametrize("kind", ["cot", "stereographic", "angles"])
@pytest.mark.parametrize("dim", [2, 3, 10])
def test_a_law_seen_in_a_chart_is_pushed_back_to_itself(kind, dim):
    law = VonMisesFisher(torch.ones(dim).double(), 4.0)
    chart = SphereChart(dim, kind)
    base = Pullback(law, chart)
    z, log_q = base(50)
    torch.testing.assert_close(base.log_prob(z), log_q)
    x, log_volume = chart(z)
    torch.testing.assert_close(log_q - log_volume, law.log_prob(x))


def test_the_uniform_law_in_the_cotangent_chart_is_students():
    dim = 6
    z, log_q = Pullback(UniformSphere(dim).double(), SphereChart(dim))(20)
    degrees = torch.arange(dim - 1, 1, -1).double()
    expected = torch.distributions.StudentT(degrees).log_prob(z[:, :-1]).sum(1)
    torch.testing.assert_close(log_q, expected - math.log(2 * math.pi))


@pytest.mark.parametrize(
    "law",
    [
        UniformSphere(3),
        AngularCentralGaussian(torch.tensor([[1.0, 0.0, 0.0], [0.5, 2.0, 0.0], [0.0, 0.0, 1.0]])),
        VonMisesFisher(torch.tensor([0.0, 0.0, 1.0]), 5.0),
        UniformOnSurface(gauges.LpGauge(1.0), dim=3),
    ],
)
def test_each_law_serves_as_target_and_as_base(law):
    gauge = law.surface.gauge if isinstance(law, UniformOnSurface) else None
    model = nfi.flows.star_like_flow(3, gauge, num_layers=1, width=8, p=law)
    model.reverse_kld(16, beta=0.5).backward()
    model.reverse_alpha_div(16, alpha=0.5, beta=0.5).backward()
    model.reverse_alpha_div(16, alpha=2, dreg=True).backward()
    chart = (
        SphereChart(3)
        if gauge is None
        else InjectiveComposite([SphereChart(3), RadialSurface(gauge)])
    )
    based = nfi.InjectiveNormalizingFlow(
        Pullback(law, chart), [nf.flows.AffineConstFlow(2), SphereChart(3)]
    )
    if gauge is None:
        z, log_q = based.q0(10)
        torch.testing.assert_close(
            chart(z)[1] + law.log_prob(chart(z)[0]), log_q, atol=1e-4, rtol=0
        )

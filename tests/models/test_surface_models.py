"""Models on known surfaces: densities, training, what is refused, and what it is called."""

from __future__ import annotations

import math

import normflows as nf
import pytest
import torch
from support.dense import dense_log_volume
from support.points import on_sphere
from torch import nn

import normflows_injective as nfi
from normflows_injective.distributions import Pullback, UniformSphere
from normflows_injective.flows import (
    InChart,
    InjectiveComposite,
    RadialSurface,
    SphereChart,
    SphereLinear,
)
from normflows_injective.flows.gauges import (
    ElasticNetGauge,
    EllipsoidGauge,
    GroupLassoGauge,
    HyperplaneGauge,
    ImplicitGauge,
    LpGauge,
    NetworkRadius,
    SlopeGauge,
)

DOUBLE = {"atol": 1e-9, "rtol": 1e-9}


def uniform_base(dim):
    return Pullback(UniformSphere(dim), SphereChart(dim))


def moved(dim):
    """A layer that is not the identity."""
    layer = InChart(SphereLinear(dim, rotate=True), SphereChart(dim))
    nn.init.normal_(layer.flow.triangles, std=0.3)
    nn.init.normal_(layer.flow.log_diagonal, std=0.3)
    return layer


def surface_model(gauge, dim=4, likelihood=None, **options):
    flows = [moved(dim), SphereChart(dim), RadialSurface(gauge, **options)]
    return nfi.InjectiveNormalizingFlow(uniform_base(dim), flows, likelihood).double()


# Densities


@pytest.mark.slow
def test_density_is_that_of_the_base_and_the_closed_forms():
    gauge = LpGauge(1.3)
    model = surface_model(gauge, level=2.0)
    assert isinstance(model.likelihood, nfi.ExactLikelihood)
    mixing, chart, surface = model.flows
    x, log_q = model.sample(6)
    u, minus_stretch = surface.inverse(x)
    coordinates, minus_volume = chart.inverse(u)
    z, log_det = mixing.inverse(coordinates)
    expected = model.q0.log_prob(z) + log_det + minus_volume + minus_stretch
    torch.testing.assert_close(model.log_prob(x), expected, **DOUBLE)
    torch.testing.assert_close(log_q, expected, **DOUBLE)
    # The same by the formulas: an angular central Gaussian of directions, over the stretch.
    direction = torch.nn.functional.normalize(x)
    y, log_linear = mixing.flow.inverse(direction)
    area = math.log(2 * math.pi**2)
    log_radius, log_secant = gauge.radius_and_secant(direction, torch.tensor(2.0).double())
    expected = log_linear - area - 3 * log_radius - log_secant
    torch.testing.assert_close(model.log_prob(x), expected, **DOUBLE)
    volume = dense_log_volume(model.forward, z)
    torch.testing.assert_close(model.forward_and_log_det(z)[1], volume, **DOUBLE)


def test_training_loss_is_minus_the_mean_log_density():
    model = surface_model(EllipsoidGauge(torch.tensor([3.0, 2.0, 1.0, 0.5])))
    x = model.sample(8, log_prob=False)[0].detach()
    loss = model.forward_kld(x)
    torch.testing.assert_close(loss, -model.log_prob(x).mean(), **DOUBLE)
    loss.backward()
    by_loss = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (-model.log_prob(x).mean()).backward()
    for ours, expected in zip(by_loss, model.parameters(), strict=True):
        torch.testing.assert_close(ours, expected.grad, **DOUBLE)


@pytest.mark.slow
def test_composites_and_lists_are_the_same_model():
    gauge, mixing = SlopeGauge(torch.tensor([2.0, 1.0, 0.5])), moved(3)
    layers = [SphereChart(3), SphereLinear(3, True), RadialSurface(gauge)]
    stacks = [layers, [InjectiveComposite(layers)], [InjectiveComposite(layers[:2]), layers[2]]]
    models = [
        nfi.InjectiveNormalizingFlow(uniform_base(3), [mixing, *stack]).double()
        for stack in stacks
    ]
    x = models[0].sample(5, log_prob=False)[0].detach()
    for model in models[1:]:
        assert isinstance(model.likelihood, nfi.ExactLikelihood)
        torch.testing.assert_close(model.log_prob(x), models[0].log_prob(x), **DOUBLE)
        torch.testing.assert_close(model.forward_kld(x), models[0].forward_kld(x), **DOUBLE)


def test_a_host_container_sums_exact_log_dets():
    composite = InjectiveComposite([SphereChart(3), RadialSurface(LpGauge(3.0))])
    host = nf.NormalizingFlow(uniform_base(3), [moved(3), composite]).double()
    ours = nfi.InjectiveNormalizingFlow(host.q0, list(host.flows))
    x = ours.sample(5, log_prob=False)[0].detach()
    torch.testing.assert_close(host.log_prob(x).double(), ours.log_prob(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("measure", ["hausdorff", "cone"])
def test_densities_of_the_two_measures_differ_by_the_height_of_tangents(measure):
    gauge = LpGauge(1.5)
    model = surface_model(gauge, measure=measure)
    reference = surface_model(gauge)
    reference.load_state_dict(model.state_dict())
    x = model.sample(5, log_prob=False)[0].detach()
    height = torch.zeros(5).double()
    if measure == "cone":
        normal = torch.nn.functional.normalize(x.sign() * x.abs().sqrt())
        height = (x * normal).sum(1).log()
    torch.testing.assert_close(model.log_prob(x), reference.log_prob(x) - height, **DOUBLE)


def test_an_ambient_bijection_falls_back_to_the_joint_jacobian():
    flows = [SphereChart(4), RadialSurface(LpGauge(1.3)), nf.flows.LULinearPermute(4)]
    nn.init.normal_(flows[2].linear.lower_entries, std=0.5)
    nn.init.normal_(flows[2].linear.upper_entries, std=0.5)
    model = nfi.InjectiveNormalizingFlow(uniform_base(4), flows).double()
    z = uniform_base(4).double()(3)[0]
    x, log_det = model.forward_and_log_det(z)
    torch.testing.assert_close(log_det, dense_log_volume(model.forward, z), **DOUBLE)
    expected = model.q0.log_prob(z) - dense_log_volume(model.forward, z)
    torch.testing.assert_close(model.log_prob(x), expected, **DOUBLE)
    composite = InjectiveComposite(flows)
    torch.testing.assert_close(composite(z)[1], log_det, **DOUBLE)
    # normflows would answer another number.
    assert not torch.allclose(sum_of_log_dets(flows, z), log_det, atol=1e-2)


def sum_of_log_dets(flows, z):
    total = 0
    for flow in flows:
        z, log_det = flow(z)
        total = total + log_det
    return total


def test_training_with_an_ambient_bijection_follows_the_likelihood():
    """The encoder is exact, so no reconstruction error would tell of a biased gradient."""
    gauge = EllipsoidGauge(torch.tensor([2.0, 1.0, 1.0, 0.5]), trainable=True)
    flows = [SphereChart(4), RadialSurface(gauge), nf.flows.LULinearPermute(4)]
    nn.init.normal_(flows[2].linear.lower_entries, std=0.5)
    model = nfi.InjectiveNormalizingFlow(uniform_base(4), flows).double()
    if isinstance(model.likelihood, nfi.SurrogateLikelihood):
        model.likelihood.num_probes = 3  # all of them: the trace has no noise
    x = model.sample(64, log_prob=False)[0].detach()
    model.forward_kld(x).backward()
    by_loss = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (-model.log_prob(x).mean()).backward()
    for ours, expected in zip(by_loss, model.parameters(), strict=True):
        torch.testing.assert_close(ours, expected.grad, **DOUBLE)


def test_levels_from_the_context():
    by_column = surface_model(ElasticNetGauge(1.0, 1.0), level_from_context=1)
    x, log_q = by_column.sample(3, context=torch.tensor([[9, 1.0], [9, 2.0], [9, 5.0]]).double())
    value = x.abs().sum(1) + x.square().sum(1)
    torch.testing.assert_close(value, torch.tensor([1.0, 2.0, 5.0]).double(), **DOUBLE)
    for row, level in enumerate((1.0, 2.0, 5.0)):
        fixed = surface_model(ElasticNetGauge(1.0, 1.0), level=level)
        fixed.load_state_dict(by_column.state_dict())
        expected = fixed.log_prob(x[row : row + 1])
        torch.testing.assert_close(log_q[row : row + 1], expected, **DOUBLE)


class RadiusByContext(nn.Module):
    """A network of directions and a context."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(2, 8)
        self.last = nn.Linear(8, 1)

    def forward(self, u, context):
        return self.last(torch.tanh(self.first(u) + self.second(context)))


def test_a_network_of_the_context_works_in_inference_mode():
    model = surface_model(NetworkRadius(RadiusByContext()), dim=3)
    context = torch.randn(4, 2).double()
    x = model.sample(4, context=context, log_prob=False)[0].detach()
    expected = model.log_prob(x, context=context).detach()
    with torch.inference_mode():
        outside = model.log_prob(x, context=context)
        # A context that inference mode has made itself.
        inside = model.log_prob(x.clone(), context=context.clone())
        drawn = model.sample(4, context=context.clone())[1]
    torch.testing.assert_close(outside.clone(), expected, **DOUBLE)
    torch.testing.assert_close(inside.clone(), expected, **DOUBLE)
    assert bool(drawn.isfinite().all())


def test_save_and_load(tmp_path):
    gauge = EllipsoidGauge(torch.tensor([1.0, 2.0, 3.0]), trainable=True)
    model, twin = surface_model(gauge, dim=3), surface_model(EllipsoidGauge([1.0, 1, 1], True), 3)
    x = model.sample(4, log_prob=False)[0].detach()
    model.save(tmp_path / "model.safetensors")
    twin.load(tmp_path / "model.safetensors")
    assert torch.equal(twin.log_prob(x), model.log_prob(x))
    assert torch.equal(twin.flows[2].gauge.axes, gauge.axes)


# Training


def train(model, x, steps, rate):
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.forward_kld(x)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.slow
def test_a_learned_surface_finds_its_data():
    axes = torch.tensor([2.0, 1.0, 0.7]).double()
    x = RadialSurface(EllipsoidGauge(axes)).decode(on_sphere(256, 3))
    net = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 1))
    gauge = NetworkRadius(net, 0.3, 3.0, even=True)
    model = surface_model(gauge, 3, nfi.ExactLikelihood(beta=100.0), off_manifold="project")
    before = float(model.reconstruction_error(x).mean().detach())
    losses = train(model, x, 60, 0.02)
    after = float(model.reconstruction_error(x).mean().detach())
    assert losses[-1] < losses[0]
    assert after < 0.3 * before
    fresh = RadialSurface(EllipsoidGauge(axes)).decode(on_sphere(256, 3))
    assert float(model.reconstruction_error(fresh).mean().detach()) < 0.15 * before


def test_beta_weighs_the_reconstruction():
    gauge = LpGauge(2.0)
    x = 1.5 * on_sphere(5, 4)
    terms = {}
    for beta in (0.0, 3.0):
        model = surface_model(gauge, 4, nfi.ExactLikelihood(beta), off_manifold="project")
        nn.init.zeros_(model.flows[0].flow.triangles)
        nn.init.zeros_(model.flows[0].flow.log_diagonal)
        terms[beta] = model.loss_terms(x)
    error = terms[3.0].reconstruction_error
    torch.testing.assert_close(error, torch.full_like(error, 0.25))
    torch.testing.assert_close(terms[3.0].loss - terms[0.0].loss, 3 * error)
    density = torch.full_like(error, -math.log(2 * math.pi**2))
    torch.testing.assert_close(terms[0.0].loss, -density)


@pytest.mark.slow
def test_axes_of_an_ellipsoid_are_learned():
    x = RadialSurface(EllipsoidGauge(torch.tensor([2.0, 1.0, 0.5]).double())).decode(
        on_sphere(128, 3)
    )
    gauge = EllipsoidGauge(torch.ones(3), trainable=True)
    model = surface_model(gauge, 3, nfi.ExactLikelihood(beta=100.0), off_manifold="project")
    train(model, x, 150, 0.03)
    expected = torch.tensor([2.0, 1.0, 0.5]).double()
    torch.testing.assert_close(gauge.axes.detach(), expected, atol=0.03, rtol=0)


# Points off the manifold


def test_points_off_a_surface_are_rejected_by_name():
    model = surface_model(LpGauge(1.0), level=2.0)
    x = model.sample(3, log_prob=False)[0].detach()
    x[1] *= 1.5
    text = r"1 of 3 rows off the surface of LpGauge\(1\), the worst at index 1, whose distance"
    for call in (model.log_prob, model.encode, model.forward_kld, model.inverse):
        with pytest.raises(nfi.errors.OffManifoldError, match=text):
            call(x)
    with pytest.raises(nfi.errors.OffManifoldError, match="1.5 times that of the surface"):
        model.log_prob(x)
    x[1] /= 1.5 * (1 + 5e-5)
    assert bool(model.log_prob(x).isfinite().all())


def test_points_off_a_surface_are_projected_where_asked():
    model = surface_model(LpGauge(1.0), level=2.0, off_manifold="project")
    x = model.sample(3, log_prob=False)[0].detach()
    scaled = x * torch.tensor([[0.1], [7.0], [1.0]])
    torch.testing.assert_close(model.log_prob(scaled), model.log_prob(x), **DOUBLE)
    torch.testing.assert_close(model.project(scaled), x, **DOUBLE)
    with pytest.raises(nfi.errors.OffManifoldError, match="no direction to project to"):
        model.log_prob(torch.zeros_like(x))


def test_points_off_the_sphere():
    chart = SphereChart(3)
    with pytest.raises(nfi.errors.OffManifoldError, match="2 rows off the unit sphere"):
        chart.inverse(torch.full((2, 3), 1.0))
    project = SphereChart(3, off_manifold="project")
    x = torch.randn(4, 3).double()
    unit = torch.nn.functional.normalize(x)
    torch.testing.assert_close(project.inverse(x), chart.inverse(unit), **DOUBLE)
    surface = RadialSurface(LpGauge(1.0))
    for call in (surface.forward, surface.decode, surface.log_stretch):
        with pytest.raises(nfi.errors.OffManifoldError, match="z has 4 of 4 rows off"):
            call(3 * unit)
    layer = SphereLinear(3).double()
    with pytest.raises(nfi.errors.OffManifoldError, match="off the unit sphere"):
        layer(3 * unit)
    lenient = SphereLinear(3, off_manifold="project").double()
    torch.testing.assert_close(lenient(3 * unit), lenient(unit), **DOUBLE)


@pytest.mark.parametrize("kind", ["cot", "angles"])
def test_an_azimuth_of_another_turn_is_refused(kind):
    chart = SphereChart(3, kind)
    with pytest.raises(nfi.errors.OffManifoldError, match=r"within \[-pi, pi\], and 4 came"):
        chart(torch.tensor([[1.0, 0.5], [1.0, -4.0]]))
    assert bool(chart(torch.tensor([[1.0, math.pi], [1.0, -math.pi]]))[1].isfinite().all())


@pytest.mark.parametrize("angle", [-0.1, 0.0, 3.2])
def test_polar_angles_out_of_range_are_refused(angle):
    with pytest.raises(
        nfi.errors.OffManifoldError, match=r"Polar angles must lie within \(0, pi\)"
    ):
        SphereChart(3, "angles")(torch.tensor([[angle, 0.5]]))


def test_points_off_the_orthant_are_refused():
    flows = [SphereChart(3, "orthant"), RadialSurface(HyperplaneGauge(torch.ones(3)))]
    model = nfi.InjectiveNormalizingFlow(nfi.distributions.DiagGaussian(2), flows)
    x = torch.tensor([[0.2, 0.3, 0.5], [0.7, 0.5, -0.2], [1.0, 0.0, 0.0]])
    assert bool(model.log_prob(x[:1]).isfinite().all())
    with pytest.raises(
        nfi.errors.OffManifoldError, match="2 of 3 points lie outside the positive"
    ):
        model.log_prob(x)


def test_what_is_not_finite_is_named():
    surface = RadialSurface(LpGauge(1.0))
    x = torch.tensor([[0.5, 0.5], [math.nan, 1.0]])
    with pytest.raises(nfi.errors.NonFiniteError, match="x"):
        surface.inverse(x)
    with pytest.raises(nfi.errors.NonFiniteError, match="z"):
        surface(x[1:])


# What cannot stand where it does


def flat(dim=3):
    return nf.distributions.DiagGaussian(dim - 1, trainable=False)


def cone(**options):
    return RadialSurface(LpGauge(1.5), measure="cone", **options)


@pytest.mark.parametrize(
    ("flows", "text"),
    [
        (lambda: [SphereLinear(3)], "flows contains no injection"),
        (
            lambda: [SphereLinear(2), nfi.flows.Pad(2, 3)],
            "SphereLinear acts on the sphere of unit vectors, but the base leads to the space",
        ),
        (
            lambda: [nfi.flows.LinearInjection(2, 3), SphereLinear(3)],
            "SphereLinear acts on the sphere of unit vectors, but LinearInjection leads to the",
        ),
        (
            lambda: [SphereChart(3), RadialSurface(LpGauge(1.0)), SphereLinear(3)],
            "SphereLinear acts on the sphere of unit vectors, but RadialSurface leads to the surf",
        ),
        (
            lambda: [SphereChart(3), nf.flows.LULinearPermute(3), RadialSurface(LpGauge(1.0))],
            "RadialSurface acts on the sphere of unit vectors, but LULinearPermute leads to the",
        ),
        (
            lambda: [SphereChart(3), RadialSurface(HyperplaneGauge(torch.ones(3)))],
            "acts on the orthant of unit vectors, but SphereChart leads to the sphere. Put "
            "nfi.flows.SphereChart with kind='orthant' before it",
        ),
        (
            lambda: [SphereChart(3, "orthant"), SphereLinear(3), RadialSurface(LpGauge(1.0))],
            None,
        ),
        (
            lambda: [SphereChart(3), cone(), nf.flows.LULinearPermute(3)],
            "LULinearPermute stands behind RadialSurface with measure='cone', but log-volumes",
        ),
        (
            lambda: [InjectiveComposite([SphereChart(3), cone()]), nf.flows.LULinearPermute(3)],
            "stands behind InjectiveComposite with measure='cone'",
        ),
        (lambda: [SphereChart(3), cone()], None),
    ],
)
def test_where_maps_between_surfaces_can_stand(flows, text):
    if text is None:
        nfi.InjectiveNormalizingFlow(uniform_base(3), flows())
        return
    error = (
        nfi.errors.NotInjectiveError
        if "no injection" in text
        else (nfi.errors.UnsupportedLayerError)
    )
    with pytest.raises(error, match=text):
        nfi.InjectiveNormalizingFlow(flat(), flows())


def test_composites_check_their_surfaces_too():
    with pytest.raises(nfi.errors.UnsupportedLayerError, match="Put nfi.flows.SphereChart"):
        InjectiveComposite([nfi.flows.Pad(2, 3), RadialSurface(LpGauge(1.0))])


def test_a_chart_seen_in_another_surface_is_refused():
    with pytest.raises(nfi.errors.UnsupportedLayerError, match="All three must be the same"):
        InChart(SphereLinear(3), SphereChart(3, "orthant"))
    with pytest.raises(nfi.errors.UnsupportedLayerError, match="to the surface"):
        InChart(RadialSurface(LpGauge(1.0)), SphereChart(3))


def test_likelihoods_that_do_not_fit_are_refused():
    exact = [SphereChart(3), RadialSurface(LpGauge(1.0))]
    with pytest.raises(nfi.errors.OptionError, match="the surrogate's gradient would be biased"):
        nfi.InjectiveNormalizingFlow(uniform_base(3), exact, nfi.SurrogateLikelihood())
    with pytest.raises(nfi.errors.OptionError, match="forward_kld is the negative log-likelihood"):
        InjectiveComposite(exact, nfi.SurrogateLikelihood())
    free = [nfi.flows.FreeFormInjection(*nfi.nets.mlp_autoencoder(3, 2, (8,)))]
    with pytest.raises(
        nfi.errors.OptionError, match="ExactLikelihood is for a chart of a known surface"
    ):
        nfi.InjectiveNormalizingFlow(flat(), free, nfi.ExactLikelihood())
    with pytest.raises(
        nfi.errors.OptionError, match="a SurrogateLikelihood or an ExactLikelihood"
    ):
        nfi.InjectiveNormalizingFlow(flat(), free, nn.Identity())
    for beta in (-1.0, math.inf, "10"):
        with pytest.raises(nfi.errors.OptionError, match="beta must be a number"):
            nfi.ExactLikelihood(beta)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: SphereChart(1), "OptionError", "dim must be an integer of at least 2, got 1"),
        (lambda: SphereLinear(2.0), "OptionError", "dim must be a positive integer, got 2.0"),
        (lambda: SphereChart(3, "polar"), "OptionError", "kind must be one of cot, stereographic"),
        (lambda: SphereChart(3, off_manifold="no"), "OptionError", "off_manifold must be one of"),
        (lambda: RadialSurface(abs), "OptionError", r"becomes one by ImplicitGauge\(function\)"),
        (lambda: RadialSurface(LpGauge(1.0), 0.0), "OptionError", "level must be a positive"),
        (lambda: RadialSurface(LpGauge(1.0), measure="flat"), "OptionError", "hausdorff, cone"),
        (lambda: LpGauge(0.0), "OptionError", "p must be positive"),
        (
            lambda: LpGauge(1.0, -0.1),
            "OptionError",
            "eps must be .* not negative",
        ),
        (lambda: EllipsoidGauge(torch.ones(2, 3)), "ShapeError", r"got \(2, 3\)"),
        (lambda: EllipsoidGauge(torch.tensor([1.0, 0.0])), "OptionError", "axes must be positive"),
        (lambda: EllipsoidGauge(torch.zeros(2, 2)), "OptionError", "an invertible matrix"),
        (lambda: HyperplaneGauge(torch.ones(2, 2)), "ShapeError", r"must be of shape \(D,\)"),
        (lambda: HyperplaneGauge(torch.tensor([1.0, 0])), "OptionError", "must be positive"),
        (lambda: ElasticNetGauge(0.0, 0.0), "OptionError", "not negative and not both zero"),
        (lambda: GroupLassoGauge([[0, 1], [1]]), "ShapeError", "every index from 0 to D - 1"),
        (lambda: GroupLassoGauge([[0], [1]], [1.0]), "ShapeError", r"one per group, shape \(2,\)"),
        (lambda: GroupLassoGauge([[0], [1]], [1.0, 0]), "OptionError", "weights must be positive"),
        (lambda: SlopeGauge([1.0, 2.0]), "OptionError", "in descending order"),
        (lambda: SlopeGauge([0.0, 0.0]), "OptionError", "not all zero"),
        (lambda: SlopeGauge(torch.ones(2, 2)), "ShapeError", r"must be of shape \(D,\)"),
        (lambda: ImplicitGauge(abs, (1.0, 1.0)), "OptionError", "finite numbers with low < high"),
        (lambda: NetworkRadius(nn.Identity(), 2.0, 1.0), "OptionError", "0 < r_min < r_max"),
    ],
)
def test_options_that_cannot_be(build, error, text):
    with pytest.raises(getattr(nfi.errors, error), match=text):
        build()


def test_functions_that_do_not_fit_an_implicit_gauge():
    u = on_sphere(3, 4)
    level = torch.tensor(1.0).double()
    with pytest.raises(nfi.errors.ShapeError, match=r"one value per point, shape \(3,\)"):
        ImplicitGauge(lambda x: x).log_radius(u, level)
    with pytest.raises(nfi.errors.OffManifoldError, match="On 3 of 3 rays no point of the level"):
        ImplicitGauge(lambda x: 1 / x.square().sum(1)).log_radius(u, level)
    with pytest.raises(nfi.errors.OffManifoldError, match="widen log_bounds"):
        ImplicitGauge(lambda x: x.square().sum(1), (1.0, 2.0)).log_radius(u, level)
    with pytest.raises(nfi.errors.ShapeError, match=r"one value per direction, shape \(3,\) or"):
        NetworkRadius(nn.Identity()).log_radius(u, level)


def test_levels_that_do_not_fit():
    u, context = on_sphere(3, 4), torch.ones(3, 2).double()
    surface = RadialSurface(LpGauge(1.0), level_from_context=0)
    with pytest.raises(nfi.errors.ContextError, match="comes from the context, but none came"):
        surface(u)
    with pytest.raises(
        nfi.errors.ContextError, match="must be positive and finite, but the context gives -1"
    ):
        surface(u, -context)
    callable_level = RadialSurface(LpGauge(1.0), level_from_context=lambda c: c)
    with pytest.raises(nfi.errors.ShapeError, match=r"one level per sample, shape \(3,\), got"):
        callable_level(u, context)
    model = surface_model(LpGauge(1.0), level_from_context=0)
    with pytest.raises(nfi.errors.ContextError, match="was built with a context"):
        model.sample(2)


@pytest.mark.parametrize(
    "build",
    [
        lambda: SlopeGauge([3, 2, 1]),
        lambda: GroupLassoGauge([[0, 1], [2]], [1, 2]),
        lambda: HyperplaneGauge(torch.tensor([1, 2, 3])),
        lambda: EllipsoidGauge(torch.tensor([1, 2, 3])),
        lambda: EllipsoidGauge(torch.tensor([[2, 0, 0], [0, 1, 0], [0, 0, 1]])),
    ],
    ids=["slope", "group_lasso", "hyperplane", "ellipsoid", "ellipsoid_matrix"],
)
def test_whole_numbers_serve_as_weights(build):
    gauge = build().double()
    u = on_sphere(3, 3).abs()
    log_radius = gauge.log_radius(u, torch.tensor(1.0).double())
    assert log_radius.dtype == torch.float64
    assert gauge.log_cone_mass(3, torch.tensor(1.0).double()) is not None


def test_layers_say_what_they_are():
    shown = repr(RadialSurface(LpGauge(0.5, eps=0.1), level=2.0, measure="cone"))
    assert "measure='cone', off_manifold='reject'" in shown
    assert "LpGauge(0.5, eps=0.1)" in shown
    assert "Level(2)" in shown
    assert "kind='cot'" in repr(SphereChart(3))
    assert "r_min=0.1, r_max=10, even=False" in repr(NetworkRadius(nn.Linear(2, 1)))

"""Sites on known surfaces: charts, constraints, evidences, guides and measures."""

from __future__ import annotations

import math

import normflows as nf
import pytest
import torch
from torch.distributions import biject_to, transform_to

import normflows_injective as nfi
from normflows_injective.flows import RadialSurface, SimplexStickBreaking, SphereChart
from normflows_injective.flows.gauges import HyperplaneGauge, LpGauge
from tests.dense import dense_log_volume
from tests.registry import GAUGES

pyro = pytest.importorskip("pyro", reason="Pyro is not installed")
dist = pytest.importorskip("pyro.distributions")
infer = pytest.importorskip("pyro.infer")
autoguide = pytest.importorskip("pyro.infer.autoguide")
nfp = pytest.importorskip("normflows_injective.pyro")

KAPPA = 10.0
AXIS = torch.tensor([2.0, -1.0, -2.0]) / 3


@pytest.fixture(autouse=True)
def clean():
    pyro.clear_param_store()
    with pyro.validation_enabled(True):
        yield


def constraint(name, dim, level=1.3):
    torch.manual_seed(0)
    return nfp.StarLikeConstraint(GAUGES[name].build(dim).double(), level, dim=dim)


# Charts.


@pytest.mark.parametrize("dim", [2, 3, 7])
@pytest.mark.parametrize("name", GAUGES)
def test_registered_charts_have_the_volume_of_the_gram_determinant(name, dim):
    surface = constraint(name, dim)
    for registry in (biject_to, transform_to):
        chart = registry(surface)
        torch.manual_seed(1)
        z = torch.randn(6, dim - 1).double()
        x = chart(z)
        assert surface.check(x).all()
        assert not surface.check(1.01 * x).any()
        assert (chart.codomain.check(x)).all()
        # Corners and edges of a gauge are a null set.
        expected = dense_log_volume(chart, z)
        volume = chart.log_abs_det_jacobian(z, x)
        torch.testing.assert_close(volume, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(chart.inv(x), z, rtol=0, atol=1e-10)
        residual = surface.deviation(chart(chart.inv(x.clone())))
        assert residual.max() < 1e-11


@pytest.mark.parametrize("name", GAUGES)
def test_charts_cover_the_surface_once(name):
    """Uniform laws have mass one, by quadrature over the coordinates of a chart."""
    surface = constraint(name, 3, level=1.3)
    if GAUGES[name].domain == "orthant":
        ticks = torch.linspace(-30, 30, 601).double()
        z = torch.cartesian_prod(ticks, ticks)
        weight = torch.full((len(z),), float(ticks[1] - ticks[0]) ** 2).double()
    else:
        # Stereographic coordinates by radius r = tan(s / 2) and angle.
        s = (torch.arange(400).double() + 0.5) * (math.pi / 400)
        angle = torch.arange(400).double() * (2 * math.pi / 400) + 1e-3
        s, angle = torch.meshgrid(s, angle, indexing="ij")
        r = (s / 2).tan()
        z = torch.stack([r * angle.cos(), r * angle.sin()], dim=-1).view(-1, 2)
        weight = (r * (1 + r.square()) / 2 * (math.pi / 400) * (2 * math.pi / 400)).flatten()
    chart = biject_to(surface)
    with torch.no_grad():
        volume = chart.log_abs_det_jacobian(z, chart(z)).exp()
    area = float((volume * weight).sum())
    torch.manual_seed(0)
    gauge = surface.surface.gauge.requires_grad_(False)
    law = nfi.distributions.UniformOnSurface(gauge, 1.3, dim=3)
    uniform = nfp.SurfaceDistribution(law)
    expected = float(uniform.log_prob(chart(z[len(z) // 2 :][:1])).neg().exp().detach())
    # The chart's density is infinite at the cusps of this one, so that the grid is coarse.
    assert area == pytest.approx(expected, rel=6e-2 if name == "lp_0.5" else 1e-2)


def test_pyros_own_constraints_are_left_alone():
    with pytest.raises(NotImplementedError):
        biject_to(dist.constraints.sphere)
    stick_breaking = biject_to(dist.constraints.simplex)
    assert isinstance(stick_breaking, torch.distributions.transforms.StickBreakingTransform)


@pytest.mark.parametrize("cache_size", [0, 1])
def test_parameters_on_a_surface(cache_size):
    octahedron = nfp.StarLikeConstraint(LpGauge(1.0), dim=3)
    start = torch.tensor([0.2, 0.3, -0.5])
    target = torch.tensor([0.6, -0.3, 0.1])

    def model():
        x = pyro.param("x", start, constraint=octahedron)
        pyro.factor("near", -10 * (x - target).square().sum())

    svi = infer.SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.05}), infer.Trace_ELBO())
    torch.testing.assert_close(pyro.param("x", start, constraint=octahedron).detach(), start)
    for _ in range(150):
        svi.step()
    x = pyro.param("x").detach()
    assert octahedron.check(x)
    torch.testing.assert_close(x, target, atol=2e-2, rtol=0)


# Measures.


@pytest.mark.parametrize(("dim", "expected"), [(2, -1.837877), (3, -2.531024), (4, -2.982607)])
def test_uniform_laws_of_spheres_agree_with_pyros_projected_normal(dim, expected):
    x = nfi.distributions.UniformSphere(dim)(5)[0]
    pyros = dist.ProjectedNormal(torch.zeros(dim)).log_prob(x)
    ours = nfp.SurfaceDistribution(nfi.distributions.UniformSphere(dim)).log_prob(x)
    gauge = nfp.UniformOnSurface(LpGauge(2.0), dim=dim).log_prob(x)
    for found in (pyros, ours, gauge):
        torch.testing.assert_close(found, torch.full((5,), expected), atol=2e-6, rtol=0)


@pytest.mark.parametrize("dim", [2, 3, 7])
def test_measures_of_the_simplex_differ_by_half_the_log_of_its_dimension(dim):
    gauge = HyperplaneGauge(torch.ones(dim).double())
    x = dist.Dirichlet(torch.ones(dim).double()).sample((4,))
    lebesgue = nfp.UniformOnSurface(gauge).log_prob(x)
    hausdorff = nfp.UniformOnSurface(gauge, measure="hausdorff").log_prob(x)
    expected = torch.full((4,), math.log(dim) / 2, dtype=torch.float64)
    torch.testing.assert_close(lebesgue - hausdorff, expected, atol=1e-9, rtol=0)
    z = torch.randn(4, dim - 1).double()
    charts = [
        nfp.FlowTransform(SimplexStickBreaking(dim, measure=m)) for m in ("lebesgue", "hausdorff")
    ]
    volumes = [chart.log_abs_det_jacobian(z, chart(z)) for chart in charts]
    torch.testing.assert_close(volumes[1] - volumes[0], expected, atol=1e-9, rtol=0)
    first_rows = dense_log_volume(lambda t: charts[0](t)[:, :-1], z)
    torch.testing.assert_close(volumes[0], first_rows, atol=1e-11, rtol=0)


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: d.expand((2,)).to_event(1), "mask"])
def test_mixed_measures_are_refused(wrap):
    hausdorff = nfp.FlowTransform(SimplexStickBreaking(3, measure="hausdorff"))
    cone = nfp.FlowTransform(
        [SphereChart(3, "stereographic"), RadialSurface(LpGauge(1.0), measure="cone")]
    )
    cases = [
        (dist.Dirichlet(torch.ones(3)), hausdorff),
        (nfp.UniformOnSurface(LpGauge(1.0), dim=3), cone),
    ]
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    other = nfp.FlowTransform([SphereChart(3, "stereographic"), RadialSurface(LpGauge(1.0))])
    cases.append((dist.TransformedDistribution(normal, cone), other))
    for prior, chart in cases:
        wrapped = prior.to_event(0).mask(True) if wrap == "mask" else wrap(prior)
        reparam = nfp.ManifoldReparam(chart)
        with (
            pytest.raises(nfi.errors.OptionError, match="measure"),
            pyro.poutine.reparam(config={"x": reparam}),
        ):
            pyro.sample("x", wrapped)


def test_what_manifold_reparam_refuses():
    chart = nfp.FlowTransform(SphereChart(3, "stereographic"))
    observed = torch.tensor([1.0, 0.0, 0.0])
    with (
        pytest.raises(nfi.errors.UnsupportedModelError, match="'x' is observed"),
        pyro.poutine.reparam(config={"x": nfp.ManifoldReparam(chart)}),
    ):
        pyro.sample("x", dist.ProjectedNormal(torch.ones(3)), obs=observed)
    with pytest.raises(nfi.errors.OptionError, match="transform must be"):
        nfp.ManifoldReparam(SphereChart(3))
    with pytest.raises(nfi.errors.OptionError, match="angles"):
        nfp.ManifoldReparam(nfp.FlowTransform(SphereChart(3, "cot")))


# Guides, on sites with a registered chart and on others by reparameterisation.


def von_mises_fisher():
    """Evidence sinh(k) / k, with the uniform law as prior."""
    x = pyro.sample("x", nfp.SurfaceDistribution(nfi.distributions.UniformSphere(3)))
    pyro.factor("pull", KAPPA * (x * AXIS).sum(-1))


def bimodal():
    """Evidence 2 sinh(k) / k."""
    x = pyro.sample("x", nfp.SurfaceDistribution(nfi.distributions.UniformSphere(3)))
    cosine = KAPPA * (x * AXIS).sum(-1)
    pyro.factor("pull", torch.logaddexp(cosine, -cosine))


def dirichlet(counts=(23.0, 12.0, 5.0), alpha=0.8):
    counts = torch.tensor(counts)
    p = pyro.sample("x", dist.Dirichlet(torch.full((len(counts),), alpha)))
    pyro.sample("counts", dist.Multinomial(int(counts.sum()), p), obs=counts)


def dirichlet_evidence(counts, alpha):
    counts, a = torch.tensor(counts), torch.full((len(counts),), alpha)
    choose = (counts.sum() + 1).lgamma() - (counts + 1).lgamma().sum()
    beta = lambda v: v.lgamma().sum() - v.sum().lgamma()  # noqa: E731
    return float(choose + beta(counts + a) - beta(a))


EVIDENCE_VMF = math.log(math.sinh(KAPPA) / KAPPA)


def test_reference_evidences():
    assert pytest.approx(7.004268, abs=1e-6) == EVIDENCE_VMF
    assert dirichlet_evidence((23.0, 12.0, 5.0), 0.8) == pytest.approx(-6.916806, abs=1e-5)
    ten = (0.0, 0.0, 0.0, 2.0, 14.0, 10.0, 1.0, 4.0, 2.0, 7.0)
    assert dirichlet_evidence(ten, 0.8) == pytest.approx(-21.144403, abs=3e-5)


def reparametrised(model, chart):
    return pyro.poutine.reparam(model, config={"x": nfp.ManifoldReparam(chart)})


def gap(model, guide, evidence, steps, lr=0.03, count=500):
    """Evidence minus the bound after training, and its standard error."""
    pyro.set_rng_seed(0)
    optimizer = pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.05 ** (1 / steps)})
    loss = infer.Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0)
    svi = infer.SVI(model, guide, optimizer, loss)
    for _ in range(steps):
        svi.step()
    with torch.no_grad():
        many = infer.Trace_ELBO(num_particles=count, vectorize_particles=True, max_plate_nesting=0)
        losses = torch.tensor([many.loss(model, guide) for _ in range(8)])
    return evidence + float(losses.mean()), float(losses.std()) / math.sqrt(8)


def small_flow(model):
    splines = lambda dim: [  # noqa: E731
        layer
        for k in range(3)
        for layer in (
            nf.flows.CoupledRationalQuadraticSpline(dim, 1, 16, reverse_mask=bool(k % 2)),
            nf.flows.LULinearPermute(dim),
        )
    ]
    return nfp.AutoFlow(model, splines)


GUIDES = {
    "normal": (autoguide.AutoNormal, 0.3),
    "multivariate": (autoguide.AutoMultivariateNormal, 0.3),
    "flow": (small_flow, 0.1),
}


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("way", ["registered", "reparam"])
def test_von_mises_fisher_evidence_is_bounded_closely(guide, way):
    model = von_mises_fisher
    if way == "reparam":
        model = reparametrised(model, nfp.FlowTransform(SphereChart(3, "stereographic")))
    make, bound = GUIDES[guide]
    found, error = gap(model, make(model), EVIDENCE_VMF, 250)
    assert -4 * error < found < bound


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("way", ["stick_breaking", "star_like", "pyro"])
def test_dirichlet_evidence_is_bounded_closely(guide, way):
    layers = {
        "stick_breaking": [SimplexStickBreaking(3, measure="lebesgue")],
        "star_like": [
            SphereChart(3, "orthant"),
            RadialSurface(HyperplaneGauge(torch.ones(3))),
        ],
    }
    model = dirichlet
    if way == "stick_breaking":
        model = reparametrised(model, nfp.FlowTransform(layers[way]))
    elif way == "star_like":
        # In the surface's own measure the density is less by log sqrt(3).
        def model():
            uniform = nfp.UniformOnSurface(HyperplaneGauge(torch.ones(3)), measure="hausdorff")
            x = pyro.sample("x", uniform)
            prior = dist.Dirichlet(torch.full((3,), 0.8)).log_prob(x)
            pyro.factor("prior", prior - math.log(2))
            counts = torch.tensor([23.0, 12.0, 5.0])
            pyro.sample("counts", dist.Multinomial(40, x), obs=counts)

    make, bound = GUIDES[guide]
    found, error = gap(model, make(model), dirichlet_evidence((23.0, 12.0, 5.0), 0.8), 200)
    assert -4 * error < found < bound


@pytest.mark.slow
def test_a_flow_covers_two_modes_where_a_normal_guide_does_not():
    evidence = math.log(2 * math.sinh(KAPPA) / KAPPA)
    assert evidence == pytest.approx(7.697415, abs=1e-6)
    one, error = gap(bimodal, autoguide.AutoNormal(bimodal), evidence, 200)
    assert one > math.log(2) - 4 * error
    two, error = gap(bimodal, nfp.AutoFlow(bimodal, init_scale=1.0), evidence, 400, lr=0.01)
    assert -4 * error < two < 0.5


@pytest.mark.parametrize(
    "make",
    [
        autoguide.AutoDelta,
        autoguide.AutoDiagonalNormal,
        autoguide.AutoStructured,
        autoguide.AutoLaplaceApproximation,
        small_flow,
    ],
)
def test_every_guide_takes_batches_of_points(make):
    def model():
        with pyro.plate("points", 4):
            x = pyro.sample("x", nfp.SurfaceDistribution(nfi.distributions.UniformSphere(3)))
            pyro.sample("y", dist.Normal(x, 0.3).to_event(1), obs=AXIS.expand(4, 3))

    guide = make(model)
    svi = infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), infer.Trace_ELBO())
    losses = [svi.step() for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
    draws = infer.Predictive(model, guide=guide, num_samples=5)()["x"]
    assert draws.shape[-2:] == (4, 3)
    torch.testing.assert_close(draws.norm(dim=-1), torch.ones(draws.shape[:-1]))


def test_neutra_on_a_sphere():
    guide = small_flow(von_mises_fisher)
    svi = infer.SVI(von_mises_fisher, guide, pyro.optim.Adam({"lr": 0.02}), infer.Trace_ELBO())
    for _ in range(100):
        svi.step()
    neutra = infer.reparam.NeuTraReparam(guide.requires_grad_(False))
    model = neutra.reparam(von_mises_fisher)
    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    z = trace.nodes["x_shared_latent"]["value"]
    x = neutra.transform_sample(z)["x"]
    torch.testing.assert_close(trace.nodes["x"]["value"], x)
    # The density of the coordinates, by hand, up to the normal law that NeuTra puts before it.
    chart, flow = biject_to(nfp.StarLikeConstraint(LpGauge(2.0), dim=3)), guide.transform
    theta = flow(z)
    volume = flow.log_abs_det_jacobian(z, theta) + chart.log_abs_det_jacobian(theta, x)
    expected = KAPPA * (x * AXIS).sum() - math.log(4 * math.pi) + volume
    torch.testing.assert_close(trace.log_prob_sum(), expected, atol=1e-4, rtol=1e-4)

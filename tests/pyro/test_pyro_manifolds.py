"""Sites on known surfaces: charts, constraints, evidences, guides and measures."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from support.dense import dense_log_volume
from support.registry import GAUGES
from support.seeds import manual_seed
from torch.distributions import biject_to, transform_to

import normflows_injective as nfi
import normflows_injective.pyro as nfp
from normflows_injective.flows import RadialSurface, SimplexStickBreaking, SphereChart
from normflows_injective.flows.gauges import HyperplaneGauge, LpGauge


def constraint(name, dim, level=1.3):
    manual_seed(0)
    return nfp.StarLikeConstraint(GAUGES[name].build(dim).double(), level, dim=dim)


# Charts.


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 3, 7])
@pytest.mark.parametrize("name", GAUGES)
def test_registered_charts_have_the_volume_of_the_gram_determinant(name, dim):
    surface = constraint(name, dim)
    for registry in (biject_to, transform_to):
        chart = registry(surface)
        manual_seed(1)
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


@pytest.mark.slow
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
    manual_seed(0)
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


@pytest.mark.slow
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

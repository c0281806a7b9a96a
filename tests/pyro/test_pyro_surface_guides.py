"""Evidences and guides on known surfaces, with a registered chart and by reparameterisation."""

from __future__ import annotations

import math
from itertools import product

import normflows as nf
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from pyro.infer import autoguide
from support.seeds import shifted
from torch.distributions import biject_to

import normflows_injective as nfi
import normflows_injective.pyro as nfp
from normflows_injective.flows import SimplexStickBreaking, SphereChart
from normflows_injective.flows.gauges import HyperplaneGauge, LpGauge

KAPPA = 10.0
AXIS = torch.tensor([2.0, -1.0, -2.0]) / 3


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


def gap(model, guide, evidence, steps, lr=0.03, faster="none"):
    """Evidence minus the bound after training, and its standard error.

    A concentration is of the order of ten, and one parameter is named that learns so much faster.
    """
    pyro.set_rng_seed(shifted(0))
    rate = lambda name: 10 * lr if name.endswith(faster) else lr  # noqa: E731
    options = lambda name: {"lr": rate(name), "lrd": 0.05 ** (1 / steps)}  # noqa: E731
    optimizer = pyro.optim.ClippedAdam(options)
    loss = infer.Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0)
    svi = infer.SVI(model, guide, optimizer, loss)
    for _ in range(steps):
        svi.step()
    return measured_gap(model, guide, evidence)


def measured_gap(model, guide, evidence):
    """Evidence minus the bound, and its standard error."""
    many = infer.Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=0)
    with torch.no_grad():
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
    "flow": (small_flow, 0.5),
}


@pytest.mark.parametrize(
    "build", [nfi.distributions.VonMisesFisher, nfi.distributions.PowerSpherical]
)
def test_a_law_of_the_right_shape_is_a_guide(build):
    """Below the gap 0.014 of a projected normal guide, by draws that move."""
    pyro.set_rng_seed(shifted(0))
    law = build(torch.randn(3), 6.0, trainable=True)
    assert nfp.SurfaceDistribution(law).has_rsample

    def guide():
        pyro.module("law", law)
        pyro.sample("x", nfp.SurfaceDistribution(law))

    found, error = gap(von_mises_fisher, guide, EVIDENCE_VMF, 300, lr=0.05, faster="concentration")
    assert -4 * error < found < 0.014 - 4 * error


def test_draws_of_a_law_on_a_surface_move_where_it_says_so():
    law = nfp.SurfaceDistribution(nfi.distributions.VonMisesFisher([1.0, 0.0, 0.0], 2.0, True))
    assert law.rsample((4,)).requires_grad
    assert not law.sample((4,)).requires_grad
    still = nfp.UniformOnSurface(LpGauge(1.0), dim=3)
    assert not still.has_rsample
    with pytest.raises(nfi.errors.UnsupportedModelError, match="UniformOnSurface carry no grad"):
        still.rsample()


def test_laws_of_angles_are_priors_and_guides():
    """A posterior of two angles: product of von Mises laws, by conjugacy one of them again."""
    prior = nfi.distributions.VonMises([0.0, 3.0], [1.0, 2.0])

    def model():
        x = pyro.sample("x", nfp.SurfaceDistribution(prior))
        pyro.factor("pull", 3.0 * (x - 1.0).cos().sum(-1))

    log_i0 = lambda k: float(torch.special.i0e(torch.tensor(k)).log()) + k  # noqa: E731
    evidence = 0.0
    for mean, kappa in ((0.0, 1.0), (3.0, 2.0)):
        both = abs(
            kappa * complex(math.cos(mean), math.sin(mean))
            + 3 * complex(math.cos(1.0), math.sin(1.0))
        )
        evidence += log_i0(both) - log_i0(kappa)
    law = nfi.distributions.VonMises([0.0, 0.0], 1.0, trainable=True)

    def guide():
        pyro.module("law", law)
        pyro.sample("x", nfp.SurfaceDistribution(law))

    found, error = gap(model, guide, evidence, 250, lr=0.1)
    assert -4 * error - 1e-5 < found < 0.005
    found, error = gap(model, autoguide.AutoNormal(model), evidence, 100, lr=0.05)
    assert -4 * error - 1e-5 < found < 0.5


# Flows take seconds, and one way for each law.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "guide"),
    [*product(["registered", "reparam"], ["normal", "multivariate"]), ("registered", "flow")],
)
def test_von_mises_fisher_evidence_is_bounded_closely(guide, way):
    model = von_mises_fisher
    if way == "reparam":
        model = reparametrised(model, nfp.FlowTransform(SphereChart(3, "stereographic")))
    make, bound = GUIDES[guide]
    found, error = gap(model, make(model), EVIDENCE_VMF, 250)
    assert -4 * error < found < bound


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "guide"),
    [
        *product(["stick_breaking", "star_like", "pyro"], ["normal", "multivariate"]),
        ("star_like", "flow"),
    ],
)
def test_dirichlet_evidence_is_bounded_closely(guide, way):
    model = dirichlet
    if way == "stick_breaking":
        chart = nfp.FlowTransform(SimplexStickBreaking(3, measure="lebesgue"))
        model = reparametrised(model, chart)
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
    normal = autoguide.AutoNormal(bimodal)
    one, error = gap(bimodal, normal, evidence, 200)
    assert one > math.log(2) - 0.05 - 4 * error
    assert not 0.05 < share_of_one_mode(normal) < 0.95
    # Reverse divergences may lose a mode by chance, so the flow learns from draws of the law.
    guide = nfp.AutoFlow(bimodal, init_scale=1.0)
    guide()
    with torch.no_grad():
        x = nfi.distributions.VonMisesFisher(AXIS.tolist(), KAPPA)(20_000)[0]
        x = x * (1 - 2 * torch.randint(2, (20_000, 1)))
        z = biject_to(nfp.StarLikeConstraint(LpGauge(2.0), dim=3)).inv(x)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.01)
    for _ in range(150):
        loss = -guide.get_posterior().log_prob(z[torch.randint(20_000, (256,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    two, error = measured_gap(bimodal, guide, evidence)
    assert two > -4 * error
    assert 0.3 < share_of_one_mode(guide) < 0.7


def share_of_one_mode(guide):
    """One half under the law; of 400 draws the standard error is 0.025."""
    x = infer.Predictive(bimodal, guide=guide, num_samples=400)()["x"]
    return float((x @ AXIS > 0).double().mean())


@pytest.mark.slow
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
    svi = infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), infer.Trace_ELBO())
    svi.step()
    first = torch.tensor([svi.evaluate_loss() for _ in range(20)])
    for _ in range(100):
        svi.step()
    last = torch.tensor([svi.evaluate_loss() for _ in range(20)])
    # The gain is 12 nats and more, and its standard error 0.9 at most.
    assert float(last.mean()) < float(first.mean()) - 8
    draws = infer.Predictive(model, guide=guide, num_samples=5)()["x"]
    assert draws.shape[-2:] == (4, 3)
    torch.testing.assert_close(draws.norm(dim=-1), torch.ones(draws.shape[:-1]))


@pytest.mark.slow
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

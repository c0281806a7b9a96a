"""The guide on a curved sheet: exactness, bounds, gradients, and its life inside Pyro."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.infer.reparam import NeuTraReparam
from support.seeds import manual_seed, seeded_generator
from torch import nn

import normflows_injective as nfi
from normflows_injective.pyro.guides.auto_injective import AutoInjective
from normflows_injective.pyro.laws.thickened import Thickened

pytestmark = pytest.mark.usefixtures("float64_by_default")
NOISES = ["mvn", "diagonal", "low_rank"]
VECTORIZED = {"num_particles": 5, "vectorize_particles": True, "max_plate_nesting": 0}


def normals(dim=5):
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1))

    return model


def mixed_sites():
    """Sites of different shapes and supports, one of whose charts lowers the dimension."""
    location = pyro.sample("location", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
    scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("rows", 2):
        inner = pyro.sample("inner", dist.Normal(0.0, 1.0))
    mean = location.sum((-1, -2)) * weights[..., 0] + inner.sum(-1)
    pyro.sample("y", dist.Normal(mean, scale), obs=torch.tensor(0.5))


def perturbed(guide, size=0.3):
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += size * torch.randn_like(parameter)
    return guide


def covariance_of(noise, dim):
    return torch.linalg.inv(noise.gram(torch.eye(dim)))


def train(guide, model, steps=1, elbo=None, lr=0.01, decay=1.0):
    """Steps of Adam, whose step size ends at a fraction of the first."""
    optimizer = pyro.optim.ClippedAdam({"lr": lr, "lrd": decay ** (1 / steps)})
    svi = SVI(model, guide, optimizer, elbo or Trace_ELBO())
    return [svi.step() for _ in range(steps)]


# What the density is


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("num_aux", [0, 4])
def test_a_linear_guide_is_the_normal_distribution_per_sample(noise, num_aux):
    """For drawn values, for others, and from any start of the reverse model."""
    guide = AutoInjective(normals(6), 2, noise=noise, decoder="linear", num_aux=num_aux)
    guide = perturbed(guide.build())
    law, scale = guide.get_posterior(), guide.frame.scale
    spread = guide.decoder.weight.mT @ guide.decoder.weight + covariance_of(guide.noise, 6)
    exact = dist.MultivariateNormal(guide.frame.loc, scale[:, None] * spread * scale)
    drawn, others = law.rsample((4, 3)), 0.3 * torch.randn(7, 6)
    for value in (drawn, others):
        assert law.log_prob(value).shape == value.shape[:-1]
        assert torch.allclose(law.log_prob(value), exact.log_prob(value), rtol=0, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 3])
def test_tangents_in_closed_form_are_the_jacobian(rank):
    guide = perturbed(AutoInjective(normals(5), rank).build())
    u = torch.randn(7, rank)
    value, tangents = guide.decoder.linearise(u)
    expected = nfi.volume.jacobian(guide.decoder, u)
    assert torch.allclose(value, expected.value, atol=1e-12)
    assert torch.allclose(tangents.mT, expected.jacobian, atol=1e-12)


def test_the_reverse_law_is_drawn_from_its_density():
    """Second moments of 100 000 draws within five standard errors."""
    guide = perturbed(AutoInjective(normals(5), 3).build())
    with torch.no_grad():
        law = guide.reverse(torch.randn(1, 5), guide.decoder, guide.noise)
        draws = law.rsample(100_000)[:, 0]
        precision = law.root[0] @ law.root[0].mT
        exact = dist.MultivariateNormal(law.mean[0], precision_matrix=precision)
        moments = (draws - law.mean).mT @ (draws - law.mean) / len(draws)
    assert torch.allclose(law.log_prob(draws[:9, None])[:, 0], exact.log_prob(draws[:9]))
    spread = exact.covariance_matrix
    error = ((spread.square() + torch.outer(spread.diag(), spread.diag())) / len(draws)).sqrt()
    assert ((moments - spread).abs() < 5 * error).all()


@pytest.mark.parametrize("noise", NOISES)
def test_noise_is_drawn_from_the_covariance_that_it_is_scored_with(noise):
    """Second moments of 200 000 draws within five standard errors."""
    guide = perturbed(AutoInjective(normals(4), 1, noise=noise).build())
    covariance = covariance_of(guide.noise, 4)
    count = 200_000
    with torch.no_grad():
        draws = guide.noise.rsample(torch.Size([count]))
    diagonal = covariance.diagonal()
    error = ((covariance.square() + torch.outer(diagonal, diagonal)) / count).sqrt()
    assert ((draws.mT @ draws / count - covariance).abs() < 5 * error).all()
    exact = dist.MultivariateNormal(torch.zeros(4), covariance)
    points = torch.randn(3, 4)
    assert torch.allclose(guide.noise.log_prob(points), exact.log_prob(points), atol=1e-10)


def marginal_log_prob(guide, value):
    """log q of a guide of rank one, by the trapezoid rule over u."""
    u = torch.linspace(-8, 8, 1001)[:, None]
    e = guide.frame.standardise(value)
    residual = e[:, None] - guide.decoder(u)
    log_joint = dist.Normal(0.0, 1.0).log_prob(u[:, 0]) + guide.noise.log_prob(residual)
    step = float(u[1, 0] - u[0, 0])
    return log_joint.logsumexp(1) + math.log(step) - guide.frame.scale.log().sum()


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISES)
def test_scores_bound_the_marginal_density_from_both_sides(noise):
    """Drawn values from above, others from below, closer with more draws.

    Means over 1000 values, within four standard errors.
    """
    guide = AutoInjective(normals(3), 1, noise=noise, decoder=lambda r, d: Bend(0.7))
    perturbed(guide.build(), 0.1)
    gaps = {}
    with torch.no_grad():
        for count in (0, 3, 30):
            guide.num_aux = count
            law = guide.get_posterior()
            value = law.sample((1000,))
            exact = marginal_log_prob(guide, value)
            for name, scored in (("drawn", value), ("other", value.clone())):
                gap = law.log_prob(scored) - exact
                gaps[name, count] = float(gap.mean()), float(gap.std()) / math.sqrt(1000)
    assert gaps["drawn", 0][0] > 4 * gaps["drawn", 0][1], "the reverse model is exact here"
    for (name, _), (gap, error) in gaps.items():
        assert (gap if name == "drawn" else -gap) > -4 * error
    for name in ("drawn", "other"):
        assert abs(gaps[name, 0][0]) > abs(gaps[name, 30][0])


class Bend(nn.Module):
    """u -> (u, b u^2, sin(2 u) / 2)."""

    def __init__(self, bend):
        super().__init__()
        self.bend = nn.Parameter(torch.tensor(bend))

    def forward(self, u):
        return torch.cat([u, self.bend * u**2, torch.sin(2 * u) / 2], dim=1)


def spline_flows(rank):
    import normflows as nf

    return [nf.flows.CoupledRationalQuadraticSpline(rank, 1, 4, num_bins=3)]


def reverse_network(rank, latent_dim):
    return nn.Sequential(nn.Linear(latent_dim, 8), nn.Tanh(), nn.Linear(8, 2 * rank))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"noise": "mvn"},
        {"noise": "diagonal", "num_aux": 2},
        {"noise": "low_rank", "noise_rank": 2},
        {"noise": "mvn", "decoder": "linear"},
        {"noise": "diagonal", "latent_flows": spline_flows},
        {
            "noise": "mvn",
            "decoder": lambda r, d: nn.Sequential(
                nn.Linear(r, 4), nn.Tanh(), nn.Linear(4, d), nn.Softmax(-1)
            ),
        },
        {"noise": "low_rank", "reverse": reverse_network, "num_aux": 1},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_gradients_of_the_objective_by_every_parameter(options):
    """Central differences with common random numbers; the reverse model is not detached."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x[..., 1] - x[..., 0] ** 2, 0.3), obs=torch.tensor(0.4))

    guide = perturbed(AutoInjective(model, 2, **options).build(), 0.2)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=0)

    def loss():
        manual_seed(1)
        return elbo.differentiable_loss(model, guide)

    parameters = dict(guide.named_parameters())
    gradients = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
    step = 1e-5
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        assert gradient is not None, name
        flat = parameter.data.view(-1)
        for index in range(0, len(flat), max(1, len(flat) // 2)):
            kept = flat[index].item()
            sides = []
            for side in (step, -step):
                flat[index] = kept + side
                sides.append(float(loss().detach()))
            flat[index] = kept
            slope = (sides[0] - sides[1]) / (2 * step)
            assert float(gradient.view(-1)[index]) == pytest.approx(slope, rel=1e-5, abs=2e-6), (
                name
            )


# What the objective bounds


def linear_gaussian(dim=4):
    generator = seeded_generator(7)
    design = torch.randn(6, dim, generator=generator)
    observed = torch.randn(6, generator=generator)

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
        mean = (design @ w.unsqueeze(-1)).squeeze(-1)
        pyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=observed)

    law = dist.MultivariateNormal(torch.zeros(6), design @ design.mT + 0.25 * torch.eye(6))
    return model, float(law.log_prob(observed))


def elbo_of(guide, model, count=4000):
    """The objective and its standard error."""
    elbo = Trace_ELBO(num_particles=count // 20, vectorize_particles=True, max_plate_nesting=0)
    with torch.no_grad():
        values = torch.tensor([-elbo.loss(model, guide) for _ in range(20)])
    return float(values.mean()), float(values.std()) / math.sqrt(20)


@pytest.mark.slow
def test_the_objective_is_below_the_evidence_and_grows_with_extra_draws():
    model, evidence = linear_gaussian()
    guide = AutoInjective(
        model, 1, noise="diagonal", decoder=lambda r, d: nn.Sequential(Bend(1.5), nn.Linear(3, d))
    )
    train(guide, model, 200, Trace_ELBO(**VECTORIZED), lr=0.02)
    with torch.no_grad():
        guide.decoder.module[0].bend.fill_(3.0)
    values = []
    for count in (0, 5, 50):
        guide.num_aux = count
        value, error = elbo_of(guide, model, 40_000)
        assert value <= evidence + 4.5 * error
        values.append((value, error))
    for (low, low_error), (high, high_error) in zip(values, values[1:], strict=False):
        assert high > low - 4.5 * math.hypot(low_error, high_error)
    assert values[2][0] > values[0][0] + 2 * math.hypot(values[0][1], values[2][1])


@pytest.mark.slow
def test_the_evidence_is_reached_where_the_posterior_is_normal():
    """The gap of full noise after training: below 0.1 nats, and not below 0 by 3 errors."""
    model, evidence = linear_gaussian()
    guide = AutoInjective(model, 1)
    train(guide, model, 800, Trace_ELBO(**VECTORIZED), lr=0.05, decay=0.02)
    value, error = elbo_of(guide, model)
    assert -4.5 * error < evidence - value < 0.1


@pytest.mark.slow
def test_a_curved_posterior_is_met_where_no_normal_guide_can():
    """log Z is zero; the best normal guide of any covariance stays 1.66 nats below.

    That is log 1.5 - log s + s^2 / 4.5 + 100 s^4 - 1/2 at its least, s = 0.2236, with the normal
    distribution centred, of standard deviation s in z_0.
    """

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.5))
        pyro.sample("x", dist.Normal(z**2, 0.1))

    guide = AutoInjective(model, 1)
    train(guide, model, 1000, Trace_ELBO(**VECTORIZED), lr=0.02, decay=0.05)
    value, error = elbo_of(guide, model)
    assert -1.1 < value < 4.5 * error


@pytest.mark.slow
def test_without_noise_the_objective_would_exceed_the_evidence():
    r"""Why ``noise=None`` is refused: the optimum of a line in four dimensions, log Z = 0.

    Against its own length, the line of direction a has the objective
    :math:`-\tfrac12 a^\top \Lambda^{-1} a - \tfrac12 \sum \log 2\pi\lambda_i + \log |a|
    + \tfrac12 \log 2\pi e`, greatest at :math:`-\tfrac12 \sum_{i > 1} \log 2\pi\lambda_i = 3`.
    """
    variances = torch.tensor([1.0, 0.05, 0.02, 0.01])
    direction = torch.full((4,), 0.3, requires_grad=True)
    optimizer = torch.optim.Adam([direction], lr=0.01)
    target = dist.Normal(torch.zeros(4), variances.sqrt())
    constant = target.log_prob(torch.zeros(4)).sum() + 0.5 * math.log(2 * math.pi * math.e)
    for _ in range(2000):
        fit = -0.5 * (direction.square() / variances).sum()
        loss = -(fit + direction.norm().log() + constant)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predicted = -0.5 * (2 * math.pi * variances[1:]).log().sum()
    assert float(predicted) == pytest.approx(2.9996, abs=1e-4)
    assert -loss.item() == pytest.approx(float(predicted), abs=1e-6)


# What is remembered


def test_only_the_last_value_is_recognised_and_by_identity():
    law = perturbed(AutoInjective(normals(3), 1).build()).get_posterior()
    first = law.rsample()
    second = law.rsample()
    assert law._generating(first) is None
    assert law._generating(second) is not None
    for other in (second.detach(), second.clone(), second.view(3), second.expand(1, 3)):
        assert law._generating(other) is None
    assert law.expand((2,))._generating(second) is None
    for copied in (copy.deepcopy(law), pickle.loads(pickle.dumps(law))):
        assert copied._drawn is None
        assert copied.log_prob(second.detach()).shape == ()


@pytest.mark.slow
def test_what_is_remembered_keeps_no_graph_alive():
    import gc
    import weakref

    law = AutoInjective(normals(3), 1).build().get_posterior()
    value = law.rsample((2,))
    watched = weakref.ref(value)
    assert value.requires_grad
    assert not law._drawn[1].requires_grad
    del value
    gc.collect()
    assert watched() is None


def test_scores_follow_parameters_that_change_after_the_draw():
    guide = perturbed(AutoInjective(normals(3), 1, decoder="linear").build())
    law = guide.get_posterior()
    with torch.no_grad():
        value = law.rsample((4,))
        before = law.log_prob(value)
        perturbed(guide)
        after = law.log_prob(value)
        fresh = guide.get_posterior().log_prob(value)
    assert not torch.allclose(before, after)
    assert torch.allclose(after, fresh, atol=1e-10)  # exact for a linear guide, from either u


@pytest.mark.slow
def test_a_value_drawn_without_gradients_has_the_score_of_its_pair():
    """The gradient at a fixed value has mean zero, as that of any density has.

    Means over 20 000 values within five standard errors, for the parameters of a curved guide.
    """
    guide = perturbed(
        AutoInjective(normals(3), 1, noise="diagonal", decoder=lambda r, d: Bend(0.7)).build(), 0.2
    )
    law = guide.get_posterior()
    value = law.sample((20_000,))
    assert not value.requires_grad
    u = law._generating(value)
    e = guide.frame.standardise(value)
    joint = guide.noise.log_prob(e - guide.decoder(u)) - guide.frame.scale.log().sum()
    reverse = guide.reverse(e, guide.decoder, guide.noise).log_prob(u)
    log_u = dist.Normal(0.0, 1.0).log_prob(u).sum(-1)
    assert torch.allclose(law.log_prob(value), joint + log_u - reverse, atol=1e-10)
    for parameter in (guide.frame.loc, guide.noise.log_scale, guide.decoder.module.bend):
        batches = torch.stack(
            [
                torch.autograd.grad(part.mean(), parameter, retain_graph=True)[0].reshape(-1)
                for part in joint.chunk(20)
            ]
        )
        assert (batches.mean(0).abs() < 5 * batches.std(0) / math.sqrt(20)).all()


# Its life inside Pyro


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(
    "objective",
    [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, RenyiELBO, TraceEnum_ELBO, JitTrace_ELBO],
)
@pytest.mark.parametrize("particles", [{}, {"num_particles": 2}, VECTORIZED])
def test_every_objective_moves_every_parameter(noise, objective, particles):
    model = normals(4)
    guide = AutoInjective(model, 1, noise=noise, num_aux=1).build()
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's and the host's, of tracing
        losses = train(guide, model, 2, objective(**{"max_plate_nesting": 0, **particles}))
    assert all(math.isfinite(loss) for loss in losses)
    for name, parameter in guide.named_parameters():
        assert not torch.equal(before[name], parameter), name


def test_tracing_is_refused_where_it_would_fail():
    model = normals()
    guide = AutoInjective(model, 1, decoder=lambda r, d: nn.Linear(r, d))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(nfi.errors.UnsupportedLayerError, match="Use Trace_ELBO"):
            train(guide, model, 1, JitTrace_ELBO())


@pytest.mark.slow
def test_objectives_agree_on_one_guide():
    model, _ = linear_gaussian()
    guide = perturbed(AutoInjective(model, 2).build(), 0.1)
    values = {}
    for objective in (Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO):
        elbo = objective(num_particles=2000, vectorize_particles=True, max_plate_nesting=0)
        manual_seed(3)
        values[objective] = elbo.loss(model, guide)
    reference = values.pop(Trace_ELBO)
    sequential = Trace_ELBO(num_particles=100).loss(model, guide)
    assert list(values.values()) == pytest.approx([reference] * 2, rel=1e-9)
    assert sequential == pytest.approx(reference, rel=0.2)


def test_sites_of_several_shapes_and_supports():
    guide = AutoInjective(mixed_sites, 2)
    train(guide, mixed_sites, 3)
    train(guide, mixed_sites, 1, Trace_ELBO(**{**VECTORIZED, "max_plate_nesting": 1}))
    draws = guide.sample_posterior(6)
    shapes = {name: tuple(draw.shape) for name, draw in draws.items()}
    assert shapes == {"location": (6, 2, 2), "scale": (6,), "weights": (6, 3), "inner": (6, 2)}
    assert (draws["scale"] > 0).all()
    assert torch.allclose(draws["weights"].sum(-1), torch.ones(6))
    for parallel in (False, True):
        predictive = Predictive(mixed_sites, guide=guide, num_samples=7, parallel=parallel)
        predicted = predictive()
        assert predicted["weights"].shape[0] == 7
        assert torch.isfinite(predicted["inner"]).all()


def test_medians_and_quantiles_are_those_of_the_law():
    guide = AutoInjective(normals(3), 1, decoder="linear", init_scale=0.2).build()
    with torch.no_grad():
        guide.frame.loc.copy_(torch.tensor([1.0, -2.0, 3.0]))
    median = guide.median()["x"]
    low, high = guide.quantiles([0.1, 0.9])["x"]
    assert torch.allclose(median, guide.frame.loc, atol=0.1)
    assert (low < median).all()
    assert (median < high).all()


def test_in_a_list_of_guides():
    guide = AutoGuideList(mixed_sites)
    guide.append(AutoInjective(pyro.poutine.block(mixed_sites, hide=["scale", "y"]), 2))
    guide.append(AutoNormal(pyro.poutine.block(mixed_sites, expose=["scale"])))
    losses = train(guide, mixed_sites, 3)
    assert all(math.isfinite(loss) for loss in losses)


def test_neutra_is_refused():
    model = normals()
    guide = AutoInjective(model, 1)
    train(guide, model)
    reparameterised = NeuTraReparam(guide).reparam(model)
    with pytest.raises(ValueError, match="only supports guides that implement"):
        reparameterised()


@pytest.mark.slow
def test_a_state_dict_comes_back_through_build():
    model = normals()
    guide = AutoInjective(model, 2, noise="low_rank", latent_flows=spline_flows)
    train(guide, model, 3)
    state = copy.deepcopy(guide.state_dict())
    assert not any("options" in name for name in state)
    pyro.clear_param_store()
    manual_seed(99)
    fresh = AutoInjective(model, 2, noise="low_rank", latent_flows=spline_flows)
    with pytest.raises(RuntimeError, match="Unexpected"):
        fresh.load_state_dict(state)
    fresh.build().load_state_dict(state)
    value = torch.randn(3, 5)
    scores = []
    for each in (guide, fresh):
        manual_seed(0)
        scores.append(each.get_posterior().log_prob(value))
    assert torch.equal(*scores)


def picklable_model():
    pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))])
def test_copies_after_a_step_and_the_live_guide_keeps_its_model(duplicate):
    guide = AutoInjective(picklable_model, 2, decoder="linear")
    train(guide, picklable_model, 2)
    copied = duplicate(guide)
    value = torch.randn(3, 4)
    scores = [each.get_posterior().log_prob(value) for each in (guide, copied)]
    assert torch.allclose(*scores, atol=1e-12)
    assert callable(guide.model)
    before = guide.frame.loc.detach().clone()
    train(guide, picklable_model)
    assert not torch.equal(before, guide.frame.loc)
    assert torch.equal(before, copied.frame.loc)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_parameters_have_the_dtype_of_the_model(dtype, noise, default):
    torch.set_default_dtype(default)
    loc = torch.zeros(4, dtype=dtype)

    def model():
        pyro.sample("x", dist.Normal(loc, torch.ones_like(loc)).to_event(1))

    guide = AutoInjective(model, 2, noise=noise, latent_flows=spline_flows, num_aux=1)
    train(guide, model)
    assert {p.dtype for p in guide.parameters()} == {dtype}
    law = guide.get_posterior()
    value = law.rsample((2,))
    assert value.dtype == law.log_prob(value).dtype == dtype


def test_it_starts_where_it_is_told_and_nearly_linear():
    guide = AutoInjective(
        normals(50),
        3,
        init_loc_fn=pyro.infer.autoguide.init_to_value(values={"x": torch.ones(50)}),
    )
    draws = guide.sample_posterior(4000)["x"]
    assert torch.allclose(draws.mean(0), torch.ones(50), atol=0.02)
    assert float(draws.var(0).mean().sqrt()) == pytest.approx(0.1, rel=0.15)
    u = torch.randn(100, 3)
    curved = guide.decoder(u) - guide.decoder.linear(u)
    assert float(curved.detach().abs().max()) < 0.1


@pytest.mark.parametrize("num_aux", [0, 2])
def test_shapes_in_plates_batches_and_wrappers(num_aux):
    law = AutoInjective(normals(3), 1, num_aux=num_aux).build().get_posterior()
    assert isinstance(law, Thickened)
    wide = law.expand((4, 2))
    value = wide.rsample((5,))
    assert value.shape == (5, 4, 2, 3)
    assert wide.log_prob(value).shape == (5, 4, 2)
    assert wide.log_prob(torch.zeros(3)).shape == (4, 2)
    event = law.expand((2,)).to_event(1)
    assert event.log_prob(event.rsample((6,))).shape == (6,)
    masked = law.expand((2,)).mask(torch.tensor([True, False]))
    assert masked.log_prob(masked.rsample())[1] == 0
    assert not law.sample().requires_grad
    with pytest.raises(ValueError, match="Expected value"):
        law.expand(()).log_prob(torch.full((3,), float("nan")))


# What is refused


@pytest.mark.parametrize("noise", [None, "none", 0, 0.0])
def test_a_guide_without_noise_is_refused(noise):
    with pytest.raises(ValueError, match="not a bound on the evidence") as caught:
        AutoInjective(normals(), 1, noise=noise)
    assert isinstance(caught.value, nfi.errors.OptionError)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"rank": 1.5}, "rank must be a positive integer"),
        ({"noise": "full"}, "one of mvn, diagonal, low_rank, got 'full'"),
        ({"noise": ["mvn"]}, "noise must be one of"),
        ({"noise_rank": 2}, "belongs to noise='low_rank'"),
        ({"noise": "low_rank", "noise_rank": 0}, "noise_rank must be a positive integer"),
        ({"num_aux": -1}, "num_aux must be a non-negative integer, got -1"),
        ({"init_scale": 0.0}, "singular"),
        ({"init_scale": -1.0}, "init_scale must be a positive number"),
        ({"init_scale": float("nan")}, "init_scale must be a positive number"),
        ({"decoder": "curved"}, "decoder must be 'linear', None, a module"),
        ({"reverse": "exact"}, "reverse must be 'laplace', a module"),
        ({"reverse": None}, "reverse must be 'laplace', a module"),
        ({"latent_flows": [1]}, "latent_flows must be a callable"),
    ],
)
def test_options_that_are_refused(options, text):
    with pytest.raises(nfi.errors.OptionError, match=text):
        AutoInjective(normals(), **{"rank": 1, **options})


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"rank": 5}, nfi.errors.OptionError, "less than the number of latents, 5, got 5"),
        (
            {"decoder": nn.Linear(1, 3).double()},
            nfi.errors.ShapeError,
            r"decoder must map \(2, 1\) to",
        ),
        (
            {"reverse": nn.Linear(5, 3).double()},
            nfi.errors.ShapeError,
            r"reverse must map \(2, 5\) to",
        ),
        ({"decoder": nn.Linear(1, 5).float()}, nfi.errors.DtypeError, "decoder must have"),
    ],
)
def test_what_only_the_model_can_show(options, error, text):
    model = normals()
    guide = AutoInjective(model, **{"rank": 1, **options})
    for _ in range(2):
        with pytest.raises(error, match=text):
            train(guide, model)


def test_a_module_of_the_callers_is_trained_itself():
    module = nn.Linear(1, 5)
    before = module.weight.detach().clone()
    model = normals()
    train(AutoInjective(model, 1, decoder=module), model)
    assert not torch.equal(before, module.weight)

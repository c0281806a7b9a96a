"""What Pyro asks of a distribution, of every distribution that the package offers."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from support.pyro_registry import LAWS, build
from support.seeds import shifted

ELBOS = {
    "trace": infer.Trace_ELBO,
    "mean_field": infer.TraceMeanField_ELBO,
    "graph": infer.TraceGraph_ELBO,
    "renyi": infer.RenyiELBO,
    "enum": infer.TraceEnum_ELBO,
}
BATCH = 3
pytestmark = pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")


@pytest.fixture(params=LAWS)
def name(request):
    return request.param


def near(a, b, tol=5e-3):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def draws(law, draw, shape=()):
    """One of the three ways by which Pyro draws; calls go by way of an expanded law."""
    if draw == "call":
        return law.expand(torch.Size(shape) + law.batch_shape)()
    return getattr(law, draw)(shape)


# Shapes.


@pytest.mark.slow
@pytest.mark.parametrize("draw", ["rsample", "sample", "call"])
@pytest.mark.parametrize("wrap", ["plain", "expand", "to_event", "mask"])
def test_shapes_of_draws_and_scores(name, draw, wrap):
    case = LAWS[name]
    law = case.law(build(name))
    assert (law.batch_shape, law.event_shape) == (case.batch_shape, case.event_shape)
    assert law.has_rsample == case.has_rsample
    if (draw == "rsample" and not case.has_rsample) or not (
        draw == "rsample" or case.scores_others
    ):
        return
    law = law.expand((BATCH,))
    batch, event = (BATCH,), case.event_shape
    if wrap == "expand":
        batch = (2, BATCH)
        law = law.expand(batch)
    elif wrap == "to_event":
        batch, event = (), (BATCH, *event)
        law = law.to_event(1)
    elif wrap == "mask":
        law = law.mask(torch.tensor([True, False, True]))
    assert (law.batch_shape, law.event_shape) == (batch, event)
    for shape in [(), (2,), (4, 1)]:
        x = draws(law, draw, shape)
        assert x.shape == (*shape, *batch, *event)
        assert x.requires_grad == (
            draw != "sample" and case.has_rsample and any(True for _ in build(name).parameters())
        )
        score = law.log_prob(x)
        assert score.shape == (*shape, *batch)
        assert score.isfinite().all()
        if case.scores_others:
            # A draw near a pole loses digits on its way back.
            near(law.log_prob(x.detach().clone()), score, 5e-2)


def test_scores_broadcast_the_value_against_the_batch(name):
    case = LAWS[name]
    if not case.scores_others:
        return
    law = case.law(build(name)).expand((BATCH,))
    x = law.sample()
    one = law.log_prob(x[0])
    assert one.shape == (BATCH,)
    near(one[0], law.log_prob(x)[0])
    many = law.log_prob(x[:, None, None])
    assert many.shape == (BATCH, 1, BATCH)
    near(many[:, 0].diagonal(), law.log_prob(x))
    near(law.expand((2, BATCH)).log_prob(x), law.log_prob(x).expand(2, BATCH))


def test_values_of_another_event_shape_are_refused(name):
    law = LAWS[name].law(build(name))
    if law.event_dim != 1:
        return
    wide = torch.zeros(BATCH, law.event_shape[0] + 1)
    with pyro.validation_enabled(False):
        for value in [wide, wide[..., :1], torch.tensor(0.0)]:
            with pytest.raises((ValueError, RuntimeError, IndexError)):
                LAWS[name].law(build(name)).log_prob(value)


# Inference.


def programs(name, condition=True):
    """A model with the law as prior, and a guide by the same law with other parameters."""
    case = LAWS[name]
    ours, theirs = build(name, 1), build(name, 2)

    def model():
        with pyro.plate("rows", BATCH, dim=-1):
            x = pyro.sample("x", case.law(theirs) if case.scores_others else ambient(case))
            total = x.reshape(*x.shape[: x.dim() - len(case.event_shape)], -1).sum(-1)
            pyro.sample("y", dist.Normal(total, 1.0), obs=torch.ones(BATCH) if condition else None)

    def guide():
        pyro.module("ours", ours)
        with pyro.plate("rows", BATCH, dim=-1):
            pyro.sample("x", case.law(ours))

    return model, guide, ours


def ambient(case):
    """A law of all of space, for values on a manifold that nothing else scores."""
    return dist.Normal(torch.zeros(case.event_shape), 1.0).to_event(len(case.event_shape))


def trained(module):
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


@pytest.mark.slow
@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("elbo", ELBOS)
def test_as_prior_and_guide_under_every_objective(name, elbo, vectorized):
    model, guide, ours = programs(name)
    if elbo == "mean_field" and not LAWS[name].has_rsample:
        return  # Pyro asks for reparameterised guides there.
    loss = ELBOS[elbo](num_particles=2, vectorize_particles=vectorized, max_plate_nesting=1)
    for parameter in ours.parameters():
        parameter.grad = None
    pyro.set_rng_seed(shifted(0))
    value = loss.loss_and_grads(model, guide)
    assert math.isfinite(value)
    # The decoder of a learned manifold alone is on the way from the base to a draw.
    missing = [n for n, p in trained(ours) if p.grad is None and "encoder" not in n]
    assert not missing
    assert all(p.grad.isfinite().all() for _, p in trained(ours) if p.grad is not None)
    svi = infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss)
    before = [p.detach().clone() for _, p in trained(ours)]
    svi.step()
    changed = [not torch.equal(a, p) for a, (_, p) in zip(before, trained(ours), strict=True)]
    assert any(changed) or not changed


@pytest.mark.slow
@pytest.mark.parametrize("vectorized", [False, True])
def test_objectives_agree_with_the_sum_of_log_densities(name, vectorized):
    model, guide, _ = programs(name)
    losses = {}
    for elbo in ["trace", "graph", "enum"]:
        pyro.set_rng_seed(shifted(0))
        particles = ELBOS[elbo](
            num_particles=2, vectorize_particles=vectorized, max_plate_nesting=1
        )
        losses[elbo] = particles.loss(model, guide)
    pyro.set_rng_seed(shifted(0))
    by_hand = []
    for _ in range(1 if vectorized else 2):
        with pyro.plate("particles", 2 if vectorized else 1, dim=-2):
            trace = pyro.poutine.trace(guide).get_trace()
            replayed = pyro.poutine.trace(pyro.poutine.replay(model, trace)).get_trace()
        difference = trace.log_prob_sum() - replayed.log_prob_sum()
        by_hand.append(float(difference.detach()) / (2 if vectorized else 1))
    expected = sum(by_hand) / len(by_hand)
    for value in losses.values():
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("elbo", ELBOS)
def test_as_a_likelihood(name, elbo, vectorized):
    case = LAWS[name]
    if not case.scores_others:
        return
    ours = build(name, 1)
    data = case.law(build(name, 2)).expand((BATCH,)).sample()

    def model():
        pyro.module("ours", ours)
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        pyro.factor("pull", -(shift**2))
        with pyro.plate("rows", BATCH, dim=-1):
            pyro.sample("x", case.law(ours), obs=data)

    def guide():
        pyro.sample("shift", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0))

    loss = ELBOS[elbo](num_particles=2, vectorize_particles=vectorized, max_plate_nesting=1)
    assert math.isfinite(loss.loss_and_grads(model, guide))
    assert not [n for n, p in trained(ours) if p.grad is None]
    # The same tensor of data in every step.
    svi = infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss)
    assert all(math.isfinite(svi.step()) for _ in range(2))


def test_in_nested_plates(name):
    case = LAWS[name]
    law = case.law(build(name))

    def model():
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", BATCH, dim=-1):
            return pyro.sample("x", law)

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["x"]["value"].shape == (2, BATCH, *case.event_shape)
    assert trace.nodes["x"]["log_prob"].shape == (2, BATCH)
    flat = trace.nodes["x"]["value"].flatten(0, -1 - len(case.event_shape))
    assert len(flat.unique(dim=0)) == 2 * BATCH


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_draws(name, parallel):
    case = LAWS[name]
    model, guide, _ = programs(name, condition=False)
    prior = infer.Predictive(model, num_samples=4, parallel=parallel)()
    posterior = infer.Predictive(model, guide=guide, num_samples=4, parallel=parallel)()
    for found in (prior, posterior):
        assert found["y"].shape == (4, BATCH)
    assert prior["x"].shape == (4, BATCH, *case.event_shape)

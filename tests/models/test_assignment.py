"""Assignment flows as models: losses, samples, masks, contexts, files and training."""

from __future__ import annotations

import math

import pytest
import torch
from support.assignment_flows import HORIZONS, WAYS, dense_flow, logits, path_of
from support.assignment_oracles import DOUBLE, FieldOf, Law, centres, coupled, exact_flow, ragged
from support.comparison import close
from support.seeds import manual_seed
from torch import nn

import normflows_injective as nfi
from normflows_injective.errors import CheckpointError, ContextError, UnsupportedModelError
from normflows_injective.flows import SimplexLift
from normflows_injective.flows.assignment import (
    AssignmentField,
    Classifier,
    FiniteHorizon,
    InfiniteHorizon,
    Velocity,
)
from normflows_injective.nets.fields import DenseField

# --- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("parametrisation", ["velocity", "classifier"])
@pytest.mark.parametrize("horizon", HORIZONS)
def test_losses_do_not_see_constants(horizon, parametrisation):
    counts = (2, 4, 3)
    path = path_of(counts, horizon)
    kind = {"velocity": Velocity, "classifier": Classifier}[parametrisation]()
    labels = torch.stack([torch.randint(c, (6,)) for c in counts], 1)
    start, t = logits(path.simplices, 6, 1.0), 0.9 * torch.rand(6, dtype=DOUBLE)
    output = torch.randn(6, 3, 4, dtype=DOUBLE)
    moved = output + 10 * torch.randn(6, 3, 1, dtype=DOUBLE)
    moved[~path.simplices.valid.expand_as(moved)] = 1e6
    v = path.logits(labels, start, t)
    expected = kind.loss(output, v, t, labels, start, path)
    close(kind.loss(moved, v, t, labels, start, path), expected, 1e-12)
    close(kind.field(moved, v, t, path), kind.field(output, v, t, path), 1e-12)


@pytest.mark.parametrize("horizon", HORIZONS)
def test_losses_by_their_definitions(horizon):
    counts = (2, 3)
    path = path_of(counts, horizon)
    labels = torch.tensor([[0, 2], [1, 1], [1, 0]])
    start, t = logits(path.simplices, 3, 1.0), torch.tensor([0.0, 0.4, 0.8], dtype=DOUBLE)
    output = torch.randn(3, 2, 3, dtype=DOUBLE)
    field = AssignmentField(FieldOf(lambda x, at: output[: len(x)]), path, Velocity())
    v = path.logits(labels, start, t)
    error = output - path.velocity(labels, start)
    by_rows = path.simplices.replicator(path.simplices.weights(v), error)
    close(field.loss(labels, start, t), (error * by_rows).sum((1, 2)), 1e-12)
    field = AssignmentField(FieldOf(lambda x, at: output[: len(x)]), path, Classifier())
    s = 1 - path.horizon.contraction * t.view(-1, 1, 1)
    distances = (v.unsqueeze(2) - centres(path.horizon, counts, t)).square().sum(-1)
    scores = output - 0.5 * distances / s**2
    expected = sum(
        nn.functional.cross_entropy(scores[:, i, :c], labels[:, i], reduction="none")
        for i, c in enumerate(counts)
    )
    close(field.loss(labels, start, t), expected, 1e-12)


@pytest.mark.parametrize("parametrisation", ["velocity", "classifier"])
def test_the_exact_field_minimises_the_loss(parametrisation):
    law = coupled()
    flow = exact_flow(law, "infinite", parametrisation)
    labels = law.states[law.probabilities.multinomial(20_000, replacement=True)]
    manual_seed(1)
    best = flow.loss_terms(labels)
    for factor in (0.6, 1.6):
        inner = flow.field.net
        flow.field.net = FieldOf(lambda x, t, f=factor, net=inner: f * net(x, t))
        manual_seed(1)
        excess = flow.loss_terms(labels) - best
        flow.field.net = inner
        # Paired by equal noise: more than four of its standard errors above.
        assert float(excess.mean()) > 4 * float(excess.std()) / math.sqrt(20_000)


def test_times_of_training():
    like = torch.zeros((), dtype=DOUBLE)
    t = InfiniteHorizon(time_shape=1.0, time_rate=0.25).draw_times(40_000, like)
    # Gamma(1, .25) has mean 4 and deviation 4: a standard error of .02.
    assert abs(float(t.mean()) - 4) < 0.08
    t = FiniteHorizon(end=0.8).draw_times(40_000, like)
    assert 0.799 < float(t.max()) <= 0.8
    # Uniform to .8: a deviation of .23, a standard error of .0012.
    assert abs(float(t.mean()) - 0.4) < 0.005
    assert t.dtype == DOUBLE


# --- samples -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("horizon", "parametrisation", "features"), WAYS)
def test_samples_of_the_exact_field_have_the_law(horizon, parametrisation, features):
    law = ragged() if parametrisation == "classifier" else coupled()
    flow = exact_flow(law, horizon, parametrisation, features=features, behind=1e6)
    labels = flow.sample(4000, steps=20)
    assert labels.shape == (4000, 2)
    assert labels.dtype == torch.long
    # Pearson's statistic at the floor of sampling; an error of .01 in total would add 10 and more.
    assert law.chi_square(labels) < law.chi_square_limit()


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "steps"), [("euler", 400), ("midpoint", 60), ("rk4", 15)])
def test_solvers_reproduce_the_law(solver, steps):
    law = coupled()
    flow = exact_flow(law, parametrisation="velocity")
    labels = flow.sample(10_000, steps, solver)
    assert law.chi_square(labels) < law.chi_square_limit()
    shares = law.histogram(labels)
    divergence = float((shares * (shares / law.probabilities).log()).sum())
    # 2 N KL is about chi-square with three degrees of freedom: a mean of 3, a deviation of 2.4.
    assert divergence < 13 / (2 * 10_000)


@pytest.mark.slow
def test_a_single_variable_recovers_its_law():
    law = Law((4,), [0.1, 0.2, 0.3, 0.4])
    labels = exact_flow(law, parametrisation="velocity").sample(10_000, steps=20)
    assert law.chi_square(labels) < law.chi_square_limit()


def test_the_default_number_of_steps_follows_the_horizon():
    def steps(horizon, num_classes=2):
        flow = nfi.AssignmentFlow(DenseField(2, num_classes, (4,)), 2, num_classes, horizon)
        assert flow.layer().times == flow.path.times()
        return len(flow.path.times()) - 1

    assert steps("infinite") == steps("finite") == 50
    # 75 deviations in steps of half of one; with more classes the others are nearer.
    assert steps(InfiniteHorizon(scale=5.0)) == 150
    assert steps(InfiniteHorizon(scale=5.0), 50) == math.ceil(150 * math.sqrt(50 / 98))
    # The noise shrinks to a thousandth of what it was.
    assert steps(FiniteHorizon(end=0.999)) == 1998


def test_the_loss_of_other_models_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"flow_matching_loss\(labels\)"):
        dense_flow().forward_kld(torch.zeros(4, 2))


@pytest.mark.slow
def test_times_of_the_steps_may_be_given():
    law = coupled()
    flow = exact_flow(law, parametrisation="velocity")
    times = 15 * torch.linspace(0, 1, 21, dtype=DOUBLE) ** 1.5
    assert law.chi_square(flow.sample(5000, times)) < law.chi_square_limit()
    assert torch.equal(*(_seeded(flow, steps=steps) for steps in (3, [0.0, 5.0, 10.0, 15.0])))


def _seeded(flow, seed=3, **options):
    manual_seed(seed)
    return flow.sample(50, **options)


@pytest.mark.slow
@pytest.mark.parametrize("horizon", [InfiniteHorizon(end=4.0), FiniteHorizon(end=0.5)])
def test_readings_of_weights_that_are_not_decided(horizon):
    law = ragged()
    flow = exact_flow(law, horizon, "velocity")
    # By simulation of the channel: labels first, then their logits at the end.
    rows = law.probabilities.multinomial(200_000, replacement=True)
    start = flow.path.draw_start(200_000, law.probabilities)
    end = torch.full((200_000,), horizon.end, dtype=DOUBLE)
    v = flow.path.logits(law.states[rows], start, end)
    weights = flow.simplices.weights(v)
    mixture = torch.stack([weights[:, [0, 1], s].prod(1).mean() for s in law.states])
    rounded = law.histogram(flow.simplices.round(v))
    for reading, p in (("mixture", mixture), ("rounding", rounded)):
        shares = law.histogram(flow.sample(8000, 30, reading=reading))
        # Standard errors of at most sqrt(.25 / 8000) = .0056.
        close(shares, p, 0.02)
    assert float((mixture - law.probabilities).abs().max()) > 0.03


def test_samples_are_reproducible():
    flow = dense_flow()
    assert torch.equal(_seeded(flow, steps=3), _seeded(flow, steps=3))
    assert not torch.equal(_seeded(flow, steps=3), _seeded(flow, 4, steps=3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The . steps of the solver are too few")
@pytest.mark.parametrize(("solver", "cost"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_evaluations_of_the_network(solver, cost):
    flow = exact_flow(coupled(), leave_one_out=True)
    net = flow.field.net
    net.counted[0] = 0
    flow.sample(3, 7, solver)
    assert net.calls == 7 * cost
    net.counted[0] = 0
    # One draw in five is followed again in half as many steps and, as that changes much, in twice
    # as many, in each part of the paths.
    flow.log_prob(coupled().states, 5, steps=7, solver=solver)
    assert net.calls == (7 + 4 + 14) * cost
    net.counted[0] = 0
    flow.log_prob(coupled().states, 5, steps=7, solver=solver, max_rows=10)
    assert net.calls == 2 * (7 + 4 + 14) * cost
    net.counted[0] = 0
    flow.flow_matching_loss(coupled().states)
    assert net.calls == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The . steps of the solver are too few")
def test_progress_is_shown_on_demand_only(capsys):
    flow = dense_flow()
    labels = torch.zeros(1, 2, dtype=torch.long)
    flow.sample(2, 3)
    flow.log_prob(labels, 2, steps=2)
    shown = capsys.readouterr()
    assert shown.err == shown.out == ""
    flow.sample(2, 3, progress=True)
    assert "3/3" in capsys.readouterr().err
    flow.log_prob(labels, 2, steps=2, progress=True)
    shown = capsys.readouterr()
    assert "2/2" in shown.err
    assert shown.out == ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The . steps of the solver are too few")
def test_dtypes_are_those_of_the_network():
    for dtype in (torch.float32, DOUBLE):
        flow = dense_flow().to(dtype)
        assert flow.field.dtype == dtype
        labels = flow.sample(4, 2)
        assert flow.flow_matching_loss(labels).dtype == dtype
        assert {part.dtype for part in flow.log_prob(labels, 2, steps=2)} == {dtype}
        narrow = labels.to(torch.uint8)
        assert flow.flow_matching_loss(narrow).dtype == dtype


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The . steps of the solver are too few")
def test_inputs_are_not_mutated():
    flow = nfi.AssignmentFlow(DenseField(2, 2, (4,), 1, True), 2, 2, missing=True).double()
    labels, mask = torch.tensor([[0, 1], [7, 0]]), torch.tensor([[True, True], [False, True]])
    context = torch.randn(2, 1, dtype=DOUBLE)
    copies = [x.clone() for x in (labels, mask, context)]
    flow.flow_matching_loss(labels, context, mask)
    flow.log_prob(labels, 2, steps=2, context=context, mask=mask)
    flow.sample(2, 2, context=context)
    for given, before in zip((labels, mask, context), copies, strict=True):
        assert torch.equal(given, before)


# --- masks and contexts --------------------------------------------------------------------------


@pytest.mark.parametrize("parametrisation", ["velocity", "classifier"])
@pytest.mark.parametrize("value", [-1, 1, 99])
def test_labels_of_missing_variables_are_never_read(parametrisation, value):
    net = DenseField(3, 3, hidden=(8,), missing=True)
    flow = nfi.AssignmentFlow(net, 3, 3, parametrisation=parametrisation, missing=True).double()
    mask = torch.tensor([[True, False, True], [False, False, True]])
    labels = torch.tensor([[2, 0, 1], [0, 0, 2]])
    results = []
    for given in (labels, labels.masked_fill(~mask, value)):
        manual_seed(2)
        flow.zero_grad()
        loss = flow.flow_matching_loss(given, mask=mask)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in net.parameters())])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    # Outputs of a variable that is missing everywhere get no gradient.
    last = [p.grad for p in net.parameters() if p.dim() == 1][-1].view(3, 3)
    assert not bool(last[1].any())
    assert bool(last[[0, 2]].any())


@pytest.mark.parametrize("features", ["posterior", "scaled_logits", "weights"])
def test_missing_variables_are_shown_as_such(features):
    seen = []
    path = path_of((3, 3))
    net = FieldOf(lambda x, t: seen.append(x) or x[..., :3])
    field = AssignmentField(net, path, Velocity(), features, missing=True)
    v, t = logits(path.simplices, 2), torch.ones(2, dtype=DOUBLE)
    mask = torch.tensor([[True, False], [True, True]])
    moved = field(v, t, mask=mask)
    shown = seen[-1]
    assert torch.equal(shown[..., 3], (~mask).double())
    assert bool((shown[0, 1, :3] == 0).all())
    assert bool((shown[mask][:, :3] != 0).any(1).all())
    assert bool((moved[0, 1] == 0).all())
    field(v, t)
    assert bool((seen[-1][..., 3] == 0).all())


@pytest.mark.slow
def test_samples_by_context():
    laws = [coupled(), Law((2, 2), [0.1, 0.5, 0.3, 0.1])]
    both = Law((2, 2), torch.stack([law.probabilities for law in laws]))
    flow = exact_flow(both, parametrisation="velocity", by_context=True)
    context = torch.arange(2).repeat_interleave(4000).view(-1, 1)
    labels = flow.sample(8000, 20, context=context.double())
    for law, part in zip(laws, labels.chunk(2), strict=True):
        assert law.chi_square(part) < law.chi_square_limit()


def test_contexts_that_are_missing_or_wrong():
    labels = torch.zeros(3, 2, dtype=torch.long)
    plain, flow = (
        nfi.AssignmentFlow(DenseField(2, 2, (4,), context_dim=dim), 2, 2) for dim in (0, 2)
    )
    calls = (
        lambda model, context: model.flow_matching_loss(labels, context),
        lambda model, context: model.sample(3, 2, context=context),
        lambda model, context: model.log_prob(labels, 2, steps=2, context=context),
    )
    for call in calls:
        with pytest.raises(ContextError, match="was built with a context, but none came"):
            call(flow, None)
        with pytest.raises(ContextError, match="no base, flow or network of this model takes one"):
            call(plain, torch.zeros(3, 2))
        with pytest.raises(ContextError, match="context must have one row per sample, 3 in all"):
            call(flow, torch.zeros(4, 2))
        with pytest.raises(ContextError, match="DenseField with context_dim=2 takes a context"):
            call(flow, torch.zeros(3, 5))


# --- checkpoints and training --------------------------------------------------------------------


def test_save_and_load(tmp_path):
    file = tmp_path / "flow.safetensors"
    saved, loaded = dense_flow(), dense_flow()
    saved.save(file)
    loaded.load(file)
    assert torch.equal(*(_seeded(flow, steps=3) for flow in (saved, loaded)))
    other = nfi.AssignmentFlow(DenseField(2, 2, hidden=(9,)), 2, 2)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(CheckpointError):
        other.load(file)
    for key, value in other.state_dict().items():
        assert torch.equal(value, before[key])


def test_shown_options():
    shown = repr(nfi.AssignmentFlow(DenseField(2, 3, (4,)), 2, [2, 3], "finite"))
    assert "parametrisation=Classifier, features='posterior', missing=False" in shown
    assert "num_variables=2, num_classes=(2, 3)" in shown
    assert "FiniteHorizon(smoothing=0.01, end=0.9)" in shown
    assert "measure='lebesgue'" in repr(SimplexLift(1, 2))


@pytest.mark.slow
def test_training_learns_the_coupling():
    law = coupled()
    flow = nfi.AssignmentFlow(DenseField(2, 2, hidden=(64,)), 2, 2)
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    for _ in range(1000):
        labels = law.states[law.probabilities.multinomial(256, replacement=True)]
        loss = flow.flow_matching_loss(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    shares = law.histogram(flow.sample(20_000, steps=20))
    # Samples of the law itself are .004 apart from it in the mean.
    assert float((shares - law.probabilities).abs().sum() / 2) < 0.03
    found = flow.log_prob(law.states, 64, steps=20).log_prob.exp()
    close(found, law.probabilities.to(found), 0.03)

"""Probabilities of labels under assignment flows, by importance sampling."""

from __future__ import annotations

import math

import pytest
import torch
from support.assignment_oracles import DOUBLE, Law, Scaled, coupled, exact_flow, ising, ragged
from support.comparison import close
from support.seeds import manual_seed
from torch import nn

import normflows_injective as nfi
from normflows_injective.errors import NumericalWarning
from normflows_injective.flows.assignment import FiniteHorizon, InfiniteHorizon
from normflows_injective.models.assignment_likelihood import summarise
from normflows_injective.nets.fields import DenseField, LeaveOneOutField

LAWS = {"coupled": coupled(), "ragged": ragged()}
# Errors of the steps in logarithms of probabilities, with 30 of rk4.
STEPS = {"infinite": 3e-3, "finite": 2e-2}


def wrong_flow(law=None, factor=0.9, **options):
    """The exact field of a law, multiplied: a model of another law."""
    flow = exact_flow(law or coupled(), InfiniteHorizon(end=8.0), "velocity", **options)
    flow.field.net = Scaled(flow.field.net, factor)
    return flow


def channel(law, horizon, reading, num=200_000):
    """Probabilities of labels read at the end of the path, and their errors, by simulation."""
    flow = exact_flow(law, horizon)
    rows = law.probabilities.multinomial(num, replacement=True)
    end = torch.full((num,), flow.path.horizon.end, dtype=DOUBLE)
    start = flow.path.draw_start(num, law.probabilities)
    v = flow.path.logits(law.states[rows], start, end)
    if reading == "rounding":
        p = law.histogram(flow.simplices.round(v))
        return p, (p / num).sqrt()
    weights = flow.simplices.weights(v)
    each = torch.stack([weights[:, range(law.n), state].prod(1) for state in law.states])
    return each.mean(1), each.std(1) / math.sqrt(num)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize(
    ("horizon", "parametrisation", "features", "leave_one_out"),
    [
        ("infinite", "velocity", "scaled_logits", False),
        ("infinite", "classifier", "posterior", False),
        ("finite", "velocity", "weights", False),
        ("finite", "classifier", "scaled_logits", False),
        ("infinite", "classifier", "weights", True),
        ("infinite", "classifier", "posterior", True),
        ("finite", "classifier", "posterior", True),
    ],
)
def test_the_exact_field_gives_the_law(name, horizon, parametrisation, features, leave_one_out):
    law = LAWS[name]
    flow = exact_flow(
        law,
        horizon,
        parametrisation,
        features=features,
        leave_one_out=leave_one_out,
        behind=1e6,
    )
    found = flow.log_prob(law.states, 16, steps=20)
    # The proposal is the exact conditional law, so the error of the steps alone is left.
    close(found.log_prob, law.probabilities.log(), STEPS[horizon])
    close(found.log_prob.exp().sum(), 1.0, STEPS[horizon])
    assert bool((found.effective_sample_size > 0.99).all())
    assert bool((found.standard_error < 0.02).all())


@pytest.mark.slow
def test_the_exact_field_gives_the_law_to_four_digits():
    law = coupled()
    flow = exact_flow(law, leave_one_out=True)
    found = flow.log_prob(law.states, 100, steps=150).log_prob
    close(found, law.probabilities.log(), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("reading", ["rounding", "mixture"])
@pytest.mark.parametrize(
    "horizon", ["infinite", "finite", InfiniteHorizon(end=4.0), FiniteHorizon(end=0.5)], ids=str
)
@pytest.mark.parametrize("name", LAWS)
def test_readings_of_the_exact_field(name, horizon, reading):
    law = LAWS[name]
    flow = exact_flow(law, horizon, leave_one_out=True)
    found = flow.log_prob(law.states, 300, steps=40, reading=reading)
    p = found.log_prob.exp()
    expected, simulated = channel(law, horizon, reading)
    # Both are estimates; that of the labels comes with its own error, beside that of the steps.
    error = ((p * found.standard_error).square() + simulated.square()).sqrt()
    assert bool(((p - expected).abs() < 4 * error + 1e-3 * p).all())
    total = (p * found.standard_error).square().sum().sqrt()
    assert abs(p.sum() - 1) < 4 * total + 1e-3
    # Where the end is undecided, a share of the rare labels comes from other corners.
    decided = reading == "rounding" and isinstance(horizon, str)
    assert bool((found.effective_sample_size > (0.99 if decided else 0.1)).all())


@pytest.mark.slow
def test_the_mixture_counts_labels_that_are_read_off_other_corners():
    # At the end of the finite horizon a weight of .0085 is left for the other class, so that
    # rare labels gain .45 * 2 * .0085 from the frequent ones.
    flow = exact_flow(coupled(), "finite", leave_one_out=True)
    labels = torch.tensor([[0, 1], [1, 0]])
    found = flow.log_prob(labels, 4000, steps=30, reading="mixture")
    gap = 0.9 * math.log1p(0.99 / 0.01 * 2)
    other = 1 / (1 + math.exp(gap))
    expected = 0.05 * (1 - other) ** 2 + 0.05 * other**2 + 0.9 * other * (1 - other)
    assert expected > 0.056
    # The noise, of deviation .1, raises the small weight by a hundredth of it.
    close(found.log_prob, torch.full((2,), math.log(expected)), 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("end", [0.99, 0.999])
def test_the_end_of_the_finite_horizon_costs_no_accuracy(end):
    law = coupled()
    flow = exact_flow(law, FiniteHorizon(end=end), leave_one_out=True)
    found = flow.log_prob(law.states, 16, steps=50)
    close(found.log_prob, law.probabilities.log(), 2e-3)


FAST = [
    InfiniteHorizon(scale=4.0),
    InfiniteHorizon(scale=10.0, end=3.0),
    InfiniteHorizon(scale=1.0, end=60.0),
    FiniteHorizon(end=0.995),
    FiniteHorizon(smoothing=1e-12),
]


@pytest.mark.slow
@pytest.mark.parametrize("horizon", FAST, ids=str)
@pytest.mark.parametrize("name", LAWS)
def test_the_default_number_of_steps_follows_the_horizon(name, horizon):
    law = LAWS[name]
    found = exact_flow(law, horizon, leave_one_out=True).log_prob(law.states, 16)
    close(found.log_prob, law.probabilities.log(), 1e-2)
    assert bool((found.standard_error < 2e-2).all())


@pytest.mark.slow
@pytest.mark.parametrize(("divergence", "closed"), [("exact", True), ("hutchinson", False)])
@pytest.mark.parametrize(("solver", "steps"), [("rk4", 22), ("midpoint", 40), ("euler", 250)])
def test_the_stated_error_holds_that_of_the_steps(solver, steps, divergence, closed):
    law = coupled()
    flow = exact_flow(law, InfiniteHorizon(scale=2.0), leave_one_out=closed)
    options = {"solver": solver, "divergence": divergence, "num_probes": 1}
    # Paths are the same for one draw, so that nothing but the steps is wrong with closed ones.
    with pytest.warns(NumericalWarning, match="steps of the solver are too few: with twice as"):
        found = flow.log_prob(law.states, 64, steps=steps, **options)
    wrong = (found.log_prob - law.probabilities.log()).abs()
    assert bool((wrong > 0.02).any())
    assert bool((wrong < 4 * found.standard_error).all())
    # With so large an error the draws count as few.
    fewer = 1 / (1 + 63 * found.standard_error.square())
    assert bool((found.effective_sample_size <= fewer + 1e-6).all())


@pytest.mark.slow
def test_a_coarse_horizon_is_not_silent():
    law = coupled()
    flow = exact_flow(law, InfiniteHorizon(scale=10.0), leave_one_out=True)
    text = r"worst by [\d.]+\. The stated errors hold that"
    with pytest.warns(NumericalWarning, match=text) as caught:
        found = flow.log_prob(law.states, 64, steps=50)
    assert caught[0].filename == __file__
    error = (found.log_prob.exp() * found.standard_error).square().sum().sqrt()
    assert abs(found.log_prob.exp().sum() - 1) < 4 * error
    assert bool((found.effective_sample_size < 0.2).any())


@pytest.mark.slow
def test_a_single_variable():
    law = Law((4,), [0.1, 0.2, 0.3, 0.4])
    found = exact_flow(law, leave_one_out=True).log_prob(law.states, 8, steps=30)
    close(found.log_prob, law.probabilities.log(), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("horizon", ["infinite", "finite"])
def test_the_closed_divergence_agrees_with_the_exact_one(horizon):
    results = []
    for leave_one_out in (True, False):
        manual_seed(3)
        net = LeaveOneOutField(3, 3, (6,), 6).double()
        for parameter in net.parameters():
            parameter.data.mul_(1.5)
        net.leave_one_out = leave_one_out
        flow = nfi.AssignmentFlow(net, 3, [3, 2, 3], horizon)
        assert flow.field.knows_divergence == leave_one_out
        labels = torch.tensor([[0, 1, 2], [2, 0, 1]])
        results.append(flow.log_prob(labels, 4, steps=16))
    for closed, exact in zip(*results, strict=True):
        close(closed, exact, 1e-8)


@pytest.mark.slow
def test_the_bias_of_hutchinsons_noise_is_taken_off():
    # Noise of known variance in the logarithm of equal weights.
    law = ising(0.4)
    flow = exact_flow(law, InfiniteHorizon(end=6.0), "velocity")
    labels = law.states[[0, 200]]
    exact = flow.log_prob(labels, 40, steps=12).log_prob
    two = flow.log_prob(labels, 400, "hutchinson", steps=12, num_probes=2)
    for row in range(2):
        assert abs(two.log_prob[row] - exact[row]) < 5 * two.standard_error[row] + 0.01
    # One probe cannot tell its noise, which raises the mean of the weights by 0.044 where the
    # standard error is 0.008.
    one = flow.log_prob(labels[1:], 1600, "hutchinson", steps=12, num_probes=1)
    assert float(one.log_prob - exact[1]) > 0


@pytest.mark.slow
def test_errors_are_honest_for_a_wrong_field():
    # The same labels over and over: the spread of estimates is what the errors say.
    flow = wrong_flow()
    num = 200
    found = flow.log_prob(torch.tensor([[0, 1]]).expand(num, -1), 64, steps=10)
    assert bool((found.effective_sample_size < 0.999).all())
    spread, stated = (
        float(found.log_prob.std()),
        float(found.standard_error.square().mean().sqrt()),
    )
    # A spread of 200 has a relative error of 5 percent, that of stated errors is smaller.
    assert 0.75 < spread / stated < 1.25


@pytest.mark.slow
@pytest.mark.parametrize("reading", ["rounding", "mixture"])
@pytest.mark.parametrize("name", LAWS)
def test_a_wrong_field_is_another_law_of_which_these_are_the_probabilities(name, reading):
    law = LAWS[name]
    flow = wrong_flow(law)
    labels = flow.sample(20_000, 12, reading=reading)
    shares = law.histogram(labels)
    num = 300 if reading == "rounding" else 800
    found = flow.log_prob(law.states, num, steps=12, reading=reading)
    p = found.log_prob.exp()
    error = ((p * found.standard_error).square() + p / 20_000).sqrt()
    # The weights of a mixture have heavy tails, and no stated error holds those that no draw met.
    allowed = 4.5 if reading == "rounding" else 7.0
    assert bool(((p - shares).abs() < allowed * error + 1e-3 * p).all())
    total = float((p * found.standard_error).square().sum().sqrt())
    assert abs(p.sum() - 1) < allowed * total + 1e-3


@pytest.mark.slow
def test_probabilities_of_a_random_network_are_those_of_its_samples():
    net = DenseField(2, 3, hidden=(8,)).double()
    for parameter in net.parameters():
        parameter.data.mul_(1.5)
    horizon = InfiniteHorizon(scale=1.0, end=4.0)
    flow = nfi.AssignmentFlow(net, 2, [2, 3], horizon)
    law = ragged()
    shares = law.histogram(flow.sample(20_000, 12))
    found = flow.log_prob(law.states, 200, steps=12)
    p = found.log_prob.exp()
    error = ((p * found.standard_error).square() + p / 20_000).sqrt()
    assert bool(((p - shares).abs() < 5 * error + 2e-3).all())


@pytest.mark.slow
def test_probabilities_by_context():
    laws = [coupled(), Law((2, 2), [0.1, 0.5, 0.3, 0.1])]
    both = Law((2, 2), torch.stack([law.probabilities for law in laws]))
    flow = exact_flow(both, leave_one_out=True, by_context=True)
    context = torch.tensor([[0.0], [1.0]], dtype=DOUBLE).repeat_interleave(4, 0)
    found = flow.log_prob(both.states.repeat(2, 1), 8, steps=30, context=context, max_rows=20)
    close(found.log_prob, torch.cat([law.probabilities for law in laws]).log(), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("reading", ["rounding", "mixture"])
@pytest.mark.parametrize("leave_one_out", [True, False])
def test_probabilities_of_observed_variables_are_marginal(leave_one_out, reading):
    law = ragged()
    flow = exact_flow(law, leave_one_out=leave_one_out, missing=True, behind=1e6)
    table = law.probabilities.view(2, 3)
    labels = torch.tensor([[1, 2], [1, -1], [9, 0], [-1, -1]])
    mask = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]]).bool()
    expected = torch.stack([table[1, 2], table[1].sum(), table[:, 0].sum(), table.sum()])
    found = flow.log_prob(labels, 32, steps=20, mask=mask, max_rows=50, reading=reading)
    # The mixture has .0001 less in the corners; few draws may miss those at others, of a share of
    # .05.
    slack = 0 if reading == "rounding" else 5 * found.standard_error + 0.06
    assert bool(((found.log_prob - expected.log()).abs() < 2e-3 + slack).all())
    assert abs(float(found.log_prob[3])) < 1e-9


@pytest.mark.slow
def test_draws_in_parts_are_the_same_estimate():
    law = coupled()
    flow = wrong_flow()
    whole, parts = (flow.log_prob(law.states, 50, steps=10, max_rows=r) for r in (200, 37))
    error = (whole.standard_error.square() + parts.standard_error.square()).sqrt()
    assert bool(((whole.log_prob - parts.log_prob).abs() < 5 * error).all())


def test_labels_that_no_draw_reaches_have_no_probability():
    # A corner so near to the faces that most of 100 classes are read otherwise.
    net = DenseField(1, 100, hidden=(4,))
    flow = nfi.AssignmentFlow(net, 1, 100, InfiniteHorizon(end=1e-3))
    found = flow.log_prob(torch.zeros(4, 1, dtype=torch.long), 1, steps=1)
    none = found.log_prob.isneginf()
    assert bool(none.any())
    assert bool((found.effective_sample_size[none] == 0).all())
    assert bool(found.standard_error.isinf().all())


def test_summaries_of_weights():
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0], [4.0, 0.0, 0.0, 0.0], [1.0, 3.0, 0.0, 0.0]])
    found = summarise(weights.double().log())
    close(found.log_prob, torch.zeros(3), 1e-15)
    close(found.effective_sample_size, torch.tensor([1.0, 0.25, 0.4]).double(), 1e-7)
    # The deviation of the mean, over the mean, which is one.
    close(found.standard_error, weights.double().std(1) / 2, 1e-7)
    none = summarise(torch.full((1, 3), -torch.inf))
    assert none.log_prob.isneginf()
    assert none.standard_error.isinf()
    assert none.effective_sample_size == 0
    assert summarise(torch.zeros(1, 1)).standard_error.isinf()


def test_summaries_of_random_weights_state_their_errors():
    draws = torch.randn(4000, 200, dtype=DOUBLE)
    found = summarise(draws)
    # The mean of exp is exp(.5); the deviation of an estimate of 4000 is known to .011.
    stated = float(found.standard_error.square().mean().sqrt())
    assert float(found.log_prob.std()) == pytest.approx(stated, rel=0.06)
    assert float(found.log_prob.exp().mean()) == pytest.approx(math.exp(0.5), rel=0.01)


@pytest.mark.slow
def test_no_graph_is_kept_and_modes_stay():
    net = nn.Sequential()
    flow = nfi.AssignmentFlow(DenseField(2, 2, (4,)), 2, 2)
    found = flow.log_prob(torch.zeros(1, 2, dtype=torch.long), 2, steps=15)
    assert not found.log_prob.requires_grad
    assert flow.training == net.training
    assert torch.is_grad_enabled()

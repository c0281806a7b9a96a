"""Averaged weights, codes at unit scale, and the weight of the reconstruction."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from support.models import base, mlp_injection
from support.seeds import manual_seed
from torch import nn

import normflows_injective as nfi
from normflows_injective.models.parts import stack_of
from normflows_injective.training import AveragedWeights
from normflows_injective.training.clock import Clock
from normflows_injective.training.codes import scale_codes
from normflows_injective.training.losses import MeanLoss
from normflows_injective.training.phases import Joint, Phase, Score, beta_of
from normflows_injective.training.processes import Processes
from normflows_injective.training.rows import Rows
from normflows_injective.training.run import Options, Run

DOUBLE = {"dtype": torch.float64}


def test_averages_are_those_of_their_weights():
    weight = torch.zeros(3, requires_grad=True, **DOUBLE)
    averages = AveragedWeights([weight])
    values = torch.randn(40, 3, **DOUBLE)
    for value in values:
        weight.data.copy_(value)
        averages.update()
    step = torch.arange(1, 41, **DOUBLE)
    shares = (step**8 - (step - 1) ** 8) / 40**8
    with averages.applied():
        torch.testing.assert_close(weight.detach(), shares @ values)
    assert torch.equal(weight.detach(), values[-1])


@pytest.mark.parametrize("context_dim", [0, 1])
def test_codes_get_unit_scale_and_the_same_reconstruction(context_dim):
    model = nfi.InjectiveNormalizingFlow(base(2), [mlp_injection(5, 2, context_dim)]).double()
    rows = Rows(torch.randn(200, 5, **DOUBLE), torch.randn(200, context_dim, **DOUBLE))
    context = rows.context if context_dim else None
    before = model.project(rows.x, context)
    assert scale_codes(stack_of(model), Rows(rows.x, context))
    codes = model.encode(rows.x, context)
    torch.testing.assert_close(codes.mean(0), torch.zeros(2, **DOUBLE), atol=1e-9, rtol=0)
    torch.testing.assert_close(codes.std(0), torch.ones(2, **DOUBLE))
    torch.testing.assert_close(model.project(rows.x, context), before)


class Bounded(nn.Module):
    """A network whose last linear map is not the last thing that happens."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 2)

    def forward(self, x):
        return self.linear(x).tanh()


def test_networks_that_do_not_end_linearly_are_left_alone():
    injection = nfi.flows.FreeFormInjection(Bounded(), nn.Linear(2, 5))
    model = nfi.InjectiveNormalizingFlow(base(2), [injection])
    before = copy.deepcopy(model.state_dict())
    assert not scale_codes(stack_of(model), Rows(torch.randn(100, 5)))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_beta_is_the_precision_of_the_residuals():
    """For a linear map it is that of probabilistic PCA, whose noise is a mean of eigenvalues."""
    scales = torch.tensor([3.0, 2.0, 0.3, 0.2, 0.1], **DOUBLE)
    x = torch.linalg.qr(torch.randn(5, 5, **DOUBLE))[0]
    rows = Rows((torch.randn(4000, 5, **DOUBLE) * scales) @ x)
    model = nfi.InjectiveNormalizingFlow(base(2), [nfi.flows.LinearInjection(2, 5)]).double()
    residual = float((scales[2:] ** 2).sum())
    noise = residual / 3
    assert beta_of(stack_of(model), rows, residual) == pytest.approx(3 / (2 * noise))
    assert math.isfinite(beta_of(stack_of(model), rows, 0.0))


def test_the_score_of_a_tube_is_its_density_up_to_a_constant():
    r"""With the best :math:`\sigma` the normal tube has the score, whatever the manifold."""
    manual_seed(2)
    x = torch.randn(500, 5, **DOUBLE)
    differences = []
    for seed in (3, 4):
        manual_seed(seed)
        model = nfi.InjectiveNormalizingFlow(base(2), [nfi.flows.LinearInjection(2, 5)]).double()
        phase = Joint(model, Rows(x), Rows(x))
        error = model.reconstruction_error(x).detach()
        variance = error.mean() / 3
        tube = -model.log_prob(x) + error / (2 * variance)
        tube = tube + 1.5 * (2 * math.pi * variance).log()
        differences.append(float(tube.mean().detach()) - phase.score(500).value)
    assert differences[0] == pytest.approx(differences[1])


def test_a_reconstruction_that_is_given_up_counts_as_the_worst():
    model = nfi.InjectiveNormalizingFlow(base(2), [nfi.flows.LinearInjection(2, 5)])
    rows = Rows(torch.randn(50, 5))
    phase = Joint(model, rows, rows)
    error = float(model.reconstruction_error(rows.x).mean().detach())
    phase.floor = 0.98 * error
    assert phase.score(50).value < math.inf
    phase.floor = 0.9 * error
    assert phase.score(50).value == math.inf


def test_a_warm_up_counts_as_done_in_the_joint_phase():
    likelihood = nfi.SurrogateLikelihood(warmup_steps=(10, 20))
    model = nfi.InjectiveNormalizingFlow(base(2), [mlp_injection()], likelihood)
    rows = Rows(torch.randn(20, 5))
    Joint(model, rows, rows).begin()
    assert likelihood.likelihood_weight() == 1


class Tossed(Phase):
    """A phase whose weights change held-out numbers by chance, and their mean by a hundredth."""

    name = "tossed"

    def begin(self):
        self.module = MeanLoss(lambda x, context: self.model(x).square(), [self.model])
        self.start = self.model.weight.detach().clone()

    def score(self, max_rows):
        moved = float((self.model.weight - self.start).abs().sum() > 0)
        rows = torch.tensor([1.0, -1.0] * 50, **DOUBLE) * moved - 0.01 * moved
        return Score(float(rows.mean()), rows=rows)


@pytest.mark.parametrize(("margin", "is_kept"), [(-math.inf, True), (0.05, True), (2.0, False)])
def test_an_end_that_is_better_by_chance_is_undone(margin, is_kept):
    """The mean moves by .01, and its standard error over 100 rows is .1."""
    model = nn.Linear(1, 1)
    before = model.weight.detach().clone()
    rows = Rows(torch.randn(10, 1))
    phase = Tossed(model, rows, rows)
    phase.margin = margin
    options = Options(
        5, None, 0.0, 0, {}, lambda m: m, nullcontext, lambda c: None, lambda t: None
    )
    run = Run(model, [phase], Clock(20, is_time=False), Processes(torch.device("cpu")), options)
    (result,) = run.complete().phases
    assert result.is_kept is is_kept
    assert torch.equal(model.weight.detach(), before) is not is_kept
    assert result.after == (pytest.approx(-0.01) if is_kept else 0)


def test_how_clearly_numbers_are_above_zero():
    values, one = torch.randn(50, **DOUBLE) + 0.5, Processes(torch.device("cpu"))
    by_mean = float(values.mean() / values.std()) * 50**0.5
    by_sign = (2 * int((values > 0).sum()) - 50) / 50**0.5
    assert one.errors_above_zero(values) == pytest.approx(max(by_mean, by_sign))
    # One that is far off decides the mean, and not the signs.
    values[0] = -1e6
    assert one.errors_above_zero(values) > by_sign - 0.3
    assert one.errors_above_zero(values[:0]) == math.inf
    assert one.errors_above_zero(torch.ones(3)) == math.inf
    assert one.errors_above_zero(-torch.ones(3)) < 0

"""What counts as a training step, which weights a loss has, and weights of samples."""

from __future__ import annotations

import copy
import math

import normflows as nf
import numpy as np
import pytest
import torch
from support.models import base, mlp_injection, model, pickled
from support.seeds import manual_seed
from torch.utils._python_dispatch import TorchDispatchMode

import normflows_injective as nfi

STEPS = 5


class CountsReads(TorchDispatchMode):
    """Count the reads of single values, each of which waits for an accelerator."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


class SharpnessAware(torch.optim.SGD):
    """An optimiser that asks for a second loss, at other parameters, in every step."""

    def step(self, closure):
        moves = [0.01 * p.grad for group in self.param_groups for p in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            torch._foreach_add_(parameters, moves)
        self.zero_grad()
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            torch._foreach_sub_(parameters, moves)
        return super().step()


def data():
    return torch.randn(16, 5)


def with_optimizer(build):
    def train(ours, x):
        optimizer = build(ours.parameters())
        for _ in range(STEPS):
            optimizer.zero_grad()
            ours.forward_kld(x).backward()
            optimizer.step()

    return train


def by_loss_terms(ours, x):
    optimizer = torch.optim.Adam(ours.parameters(), 1e-3)
    for _ in range(STEPS):
        loss = ours.loss_terms(x).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def beside_logging(ours, x):
    optimizer = torch.optim.SGD(ours.parameters(), 1e-3)
    for _ in range(STEPS):
        ours.loss_terms(x)
        optimizer.zero_grad()
        ours.forward_kld(x).backward()
        ours.loss_terms(x)
        optimizer.step()


def accumulating(build):
    def train(ours, x):
        optimizer = build(ours.parameters())
        for _ in range(STEPS):
            for part in x.split(4):
                (ours.forward_kld(part) / 4).backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


def by_hand(update):
    def train(ours, x):
        for _ in range(STEPS):
            ours.forward_kld(x).backward()
            for parameter in ours.parameters():
                update(parameter)
                parameter.grad = None

    return train


def in_place(parameter):
    with torch.no_grad():
        parameter -= 1e-3 * parameter.grad


def through_data(parameter):
    parameter.data.sub_(1e-3 * parameter.grad)


def replacing_data(parameter):
    parameter.data = parameter.data - 1e-3 * parameter.grad


def with_closures(**options):
    def train(ours, x):
        optimizer = torch.optim.LBFGS(ours.parameters(), lr=1e-2, max_iter=4, **options)

        def closure():
            optimizer.zero_grad()
            loss = ours.forward_kld(x)
            loss.backward()
            return loss

        for _ in range(STEPS):
            optimizer.step(closure)
        evaluations = optimizer.state[next(ours.parameters())]["func_evals"]
        assert (evaluations > STEPS) == ("tolerance_grad" not in options)

    return train


def with_a_loss_before_the_closure(ours, x):
    optimizer = SharpnessAware(ours.parameters(), 1e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        ours.forward_kld(x).backward()
        optimizer.step(lambda: ours.forward_kld(x).backward())


def skipping_batches(ours, x):
    optimizer = torch.optim.SGD(ours.parameters(), 1e-3)
    done = 0
    while done < STEPS:
        with pytest.raises(nfi.errors.NonFiniteError):
            ours.forward_kld(x * math.inf)
        optimizer.zero_grad()
        ours.forward_kld(x).backward()
        optimizer.step()
        done += 1


def without_gradients_between(ours, x):
    optimizer = torch.optim.SGD(ours.parameters(), 1e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        ours.forward_kld(x).backward()
        optimizer.step()
        ours.eval()
        ours.forward_kld(x)
        ours.train()
        with torch.no_grad():
            ours.forward_kld(x)
        with torch.inference_mode():
            ours.loss_terms(x.clone())


def counted_by_the_user(ours, x):
    optimizer = torch.optim.SGD(ours.parameters(), 1e-3)
    optimizer.register_step_post_hook(lambda *_: ours.likelihood.advance())
    for _ in range(STEPS):
        for _ in range(2):  # Two updates of one part of the loss, say.
            optimizer.zero_grad()
            ours.forward_kld(x).backward()
        optimizer.step()


LOOPS = {
    "adam": with_optimizer(torch.optim.Adam),
    "sgd": with_optimizer(lambda p: torch.optim.SGD(p, 1e-3)),
    "fused": with_optimizer(lambda p: torch.optim.Adam(p, 1e-3, fused=True)),
    "loss_terms": by_loss_terms,
    "logging": beside_logging,
    "accumulating": accumulating(lambda p: torch.optim.SGD(p, 1e-3)),
    "accumulating, fused": accumulating(lambda p: torch.optim.Adam(p, 1e-3, fused=True)),
    "in place": by_hand(in_place),
    "through .data": by_hand(through_data),
    "replacing .data": by_hand(replacing_data),
    "lbfgs": with_closures(),
    "lbfgs with line search": with_closures(line_search_fn="strong_wolfe"),
    "lbfgs at its optimum": with_closures(tolerance_grad=1e9),
    "sharpness-aware": with_a_loss_before_the_closure,
    "skipping": skipping_batches,
    "evaluating": without_gradients_between,
    "advance": counted_by_the_user,
}


# torch 2.8's own, in its LBFGS.
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_every_loop_counts_its_updates(loop):
    ours = model(likelihood=nfi.SurrogateLikelihood(warmup_steps=(1, 3)))
    loop(ours, data())
    assert int(ours.likelihood.step) == STEPS
    assert ours.likelihood.likelihood_weight() == 1


@pytest.mark.slow
def test_all_losses_of_a_step_have_the_same_weights():
    betas = []

    def beta(step):
        betas.append(step)
        return 10.0

    ours = model(likelihood=nfi.SurrogateLikelihood(beta))
    beside_logging(ours, data())
    assert betas == [step for step in range(STEPS) for _ in range(3)]
    betas.clear()
    with_closures()(model(likelihood=nfi.SurrogateLikelihood(beta)), data())
    assert sorted(set(betas)) == list(range(STEPS))
    assert betas == sorted(betas)


def test_an_optimiser_that_ran_a_closure_is_left_as_it_was():
    ours, x = model(), data()
    optimizer = torch.optim.LBFGS(ours.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = ours.forward_kld(x)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    ours.forward_kld(x)
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.slow
def test_a_closure_that_fails_ends_no_count():
    """A batch that is not finite stops one step, and the next steps are counted as ever."""
    ours, x = model(), data()
    optimizer = SharpnessAware(ours.parameters(), 1e-3)

    def step(*batches):
        ours.zero_grad()
        ours.q0.zero_grad()
        losses = [lambda b=b: ours.forward_kld(b).backward() for b in batches]
        losses[0]()
        optimizer.step(losses[1])

    with pytest.raises(nfi.errors.NonFiniteError):
        step(x, x * math.nan)
    assert int(ours.likelihood.step) == 1
    for count in (2, 3, 4):
        step(x, x)
        assert int(ours.likelihood.step) == count
    with_optimizer(lambda p: torch.optim.SGD(p, 1e-3))(ours, x)
    assert int(ours.likelihood.step) == 4 + STEPS


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [{}, {"warmup_steps": (2, 4)}, {"beta": lambda step: 10.0}])
def test_counting_reads_no_value_beside_those_that_the_checks_read(schedule):
    ours, x = model(likelihood=nfi.SurrogateLikelihood(**schedule)), data()
    optimizer = torch.optim.SGD(ours.parameters(), 1e-3)  # Adam reads its own steps.

    def step(loss):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    def reads(loss):
        step(loss)  # A loaded step is read once.
        with CountsReads() as counted:
            for _ in range(STEPS):
                step(loss)
        return counted.count / STEPS

    assert reads(lambda: ours.forward_kld(x)) <= 2
    assert reads(lambda: ours.loss_terms(x).loss.mean()) <= 2


def test_the_host_follows_a_step_that_is_loaded_or_written():
    ours = model(likelihood=nfi.SurrogateLikelihood(warmup_steps=(4, 8)))
    x = data()
    LOOPS["adam"](ours, x)
    state = ours.state_dict()
    other = model(likelihood=nfi.SurrogateLikelihood(warmup_steps=(4, 8)))
    assert other.likelihood.likelihood_weight() == 0
    other.load_state_dict(state)
    assert other.likelihood.likelihood_weight() == ours.likelihood.likelihood_weight() == 2 / 5
    other.likelihood.step.fill_(7)
    assert other.likelihood.likelihood_weight() == 4 / 5
    other.likelihood.step = torch.tensor(3)
    assert other.likelihood.likelihood_weight() == 0
    other.double()
    assert other.likelihood.likelihood_weight() == 0
    other.float()
    LOOPS["adam"](other, x)
    assert int(other.likelihood.step) == 3 + STEPS


@pytest.mark.slow
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_counts_for_itself(copied):
    ours = model(likelihood=nfi.SurrogateLikelihood(warmup_steps=(2, 4)))
    x = data()
    LOOPS["adam"](ours, x)
    other = copied(ours)
    LOOPS["sgd"](other, x)
    assert int(ours.likelihood.step) == STEPS
    assert int(other.likelihood.step) == 2 * STEPS
    LOOPS["adam"](ours, x)
    assert int(ours.likelihood.step) == 2 * STEPS


def test_functional_parameters_count_every_update():
    """Functional updates make new parameters in every step."""
    ours, x = model(), data()
    names = dict(ours.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(_Loss(ours), parameters, (x,))

    parameters = {f"model.{name}": p.detach() for name, p in names.items()}
    for _ in range(3):
        parameters = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        loss(parameters).backward()
    assert int(ours.likelihood.step) == 3


class _Loss(torch.nn.Module):
    def __init__(self, ours):
        super().__init__()
        self.model = ours

    def forward(self, x):
        return self.model.forward_kld(x)


@pytest.mark.slow
def test_a_container_of_the_host_counts_as_well():
    likelihood = nfi.SurrogateLikelihood(lambda step: 10.0 + step)
    composite = nfi.flows.InjectiveComposite([mlp_injection()], likelihood)
    host = nf.NormalizingFlow(base(2), [composite])
    accumulating(lambda p: torch.optim.SGD(p, 1e-3))(host, data())
    assert int(likelihood.step) == STEPS


def test_evaluation_has_the_weights_at_the_end_of_the_warm_up():
    ours = model(likelihood=nfi.SurrogateLikelihood(warmup_steps=(100, 200)))
    plain = model(likelihood=nfi.SurrogateLikelihood())
    plain.load_state_dict(ours.state_dict())
    x = data()

    def loss(which):
        manual_seed(0)
        return which.forward_kld(x)

    ours.eval()
    plain.eval()
    torch.testing.assert_close(loss(ours), loss(plain), atol=0, rtol=0)
    terms = ours.loss_terms(x)
    expected = terms.surrogate - terms.log_prob_latent + 10 * terms.reconstruction_error
    torch.testing.assert_close(terms.loss, expected)
    assert ours.likelihood.likelihood_weight() == 0  # That of the next training loss.
    ours.train()
    assert not torch.equal(loss(ours), loss(plain))


@pytest.mark.parametrize(("window", "expected"), [(None, 13.0), ((2, 8), 18.0), ((1, 2), 13.0)])
def test_evaluation_takes_a_schedule_of_beta_at_the_end_of_the_warm_up_at_least(window, expected):
    ours = model(likelihood=nfi.SurrogateLikelihood(lambda step: 10.0 + step, warmup_steps=window))
    ours.likelihood.step.fill_(3)
    ours.eval()
    terms = ours.loss_terms(data())
    without = terms.surrogate - terms.log_prob_latent
    torch.testing.assert_close(terms.loss - without, expected * terms.reconstruction_error)


@pytest.mark.parametrize(
    "window",
    [(0.1, 0.4), (math.inf, math.inf), (0, math.inf), (math.nan, 3), (10.5, 20), ("a", "b")]
    + [(True, 3), (-1, 3), (5, 2), (1,), 3, "ab", {1: 2, 3: 4}, (None, 3), np.arange(2)],
)
def test_windows_that_are_no_two_whole_numbers(window):
    with pytest.raises(nfi.errors.OptionError, match="warmup_steps must be"):
        nfi.SurrogateLikelihood(warmup_steps=window)


@pytest.mark.parametrize(
    "window", [(np.int64(2), np.int32(4)), [2, 4], tuple(torch.tensor([2, 4]))]
)
def test_windows_of_whole_numbers_of_any_kind(window):
    likelihood = nfi.SurrogateLikelihood(warmup_steps=window)
    assert likelihood.warmup_steps == (2, 4)
    assert all(type(step) is int for step in likelihood.warmup_steps)


def test_weights_of_samples(dtype):
    likelihood = nfi.SurrogateLikelihood(num_probes=2)
    ours, x = model(likelihood=likelihood).to(dtype), data().to(dtype)
    losses = ours.loss_terms(x).loss
    weights = torch.rand(16, dtype=dtype)
    weights[3] = 0
    expected = (weights * losses).sum() / weights.sum()
    torch.testing.assert_close(ours.forward_kld(x, weights=weights), expected)
    torch.testing.assert_close(ours.forward_kld(x, weights=1e3 * weights), expected)
    torch.testing.assert_close(nfi.ForwardKLD(ours)(x, weights=weights), expected)
    chosen = (torch.arange(16) < 4).to(dtype)
    torch.testing.assert_close(ours.forward_kld(x, weights=chosen), losses[:4].mean())
    torch.testing.assert_close(ours.forward_kld(x, weights=torch.ones(16)), losses.mean())


def test_weights_reach_a_model_on_a_known_surface():
    ours = nfi.flows.star_like_flow(3, num_layers=1, width=8)
    x = torch.nn.functional.normalize(torch.randn(6, 3), dim=1)
    weights = torch.tensor([1.0, 0, 0, 0, 0, 3.0])
    log_prob = ours.log_prob(x)
    expected = -(log_prob[0] + 3 * log_prob[5]) / 4
    torch.testing.assert_close(ours.forward_kld(x, weights=weights), expected)


@pytest.mark.parametrize(
    ("weights", "error", "text"),
    [
        (torch.ones(3), nfi.errors.ShapeError, r"shape \(16,\), got \(3,\)"),
        (torch.ones(16, 1), nfi.errors.ShapeError, r"got \(16, 1\)"),
        (-torch.ones(16), nfi.errors.OptionError, "must not be negative, got -1"),
        (torch.zeros(16), nfi.errors.OptionError, "must have a sum above zero"),
        (torch.full((16,), math.nan), nfi.errors.NonFiniteError, "16 of 16 values NaN"),
        (torch.full((16,), math.inf), nfi.errors.NonFiniteError, "16 of 16 values NaN or inf"),
        (torch.full((16,), 3e38), nfi.errors.OptionError, "finite in torch.float32"),
        (torch.ones(16, dtype=torch.cfloat), nfi.errors.DtypeError, "got torch.complex64"),
        ([1.0] * 16, nfi.errors.DtypeError, "got list"),
    ],
)
def test_weights_that_are_refused(weights, error, text):
    ours = model()
    with pytest.raises(error, match=text):
        ours.forward_kld(data(), weights=weights)
    assert int(ours.likelihood.step) == 0


def test_a_model_of_the_host_has_no_weights():
    loss = nfi.ForwardKLD(nf.NormalizingFlow(base(2), []))
    with pytest.raises(nfi.errors.OptionError, match="takes no weights"):
        loss(torch.zeros(3, 2), weights=torch.ones(3))


class Watched(torch.nn.Module):
    """A network that counts how often somebody looks for the modules in it."""

    def __init__(self, net):
        super().__init__()
        self.looks = 0
        self.net = net

    @property
    def _modules(self):
        self.__dict__["looks"] = self.__dict__.get("looks", 0) + 1
        return self.__dict__["_modules"]

    @_modules.setter
    def _modules(self, modules):
        self.__dict__["_modules"] = modules

    def forward(self, x):
        return self.net(x)


def watched_model():
    encoder, decoder = Watched(torch.nn.Linear(3, 2)), Watched(torch.nn.Linear(2, 3))
    flows = [nfi.flows.FreeFormInjection(encoder, decoder)]
    return nfi.InjectiveNormalizingFlow(base(2), flows), encoder, decoder


def test_a_training_step_looks_once_behind_every_module():
    ours, encoder, decoder = watched_model()
    x = torch.randn(8, 3)
    ours.forward_kld(x).backward()
    encoder.looks = decoder.looks = 0
    ours.forward_kld(x).backward()
    assert (encoder.looks, decoder.looks) == (1, 1)


def test_what_a_user_changes_between_two_steps_is_seen():
    ours, encoder, _ = watched_model()
    x = torch.randn(8, 3)
    ours.forward_kld(x)
    encoder.net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    with pytest.raises(nfi.errors.UnsupportedLayerError, match="BatchNorm1d"):
        ours.forward_kld(x)
    encoder.net[1].eval()
    ours.forward_kld(x)
    ours.double()
    with pytest.raises(nfi.errors.DtypeError, match="float64"):
        ours.forward_kld(x)
    assert torch.isfinite(ours.forward_kld(x.double()))

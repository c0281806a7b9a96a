"""Nothing that other threads see is changed, not even for a moment."""

from __future__ import annotations

import ast
import functools
import threading
from pathlib import Path

import normflows as nf
import pytest
import torch
from support.models import base
from support.seeds import seeded_generator
from torch import nn

import normflows_injective as nfi
from normflows_injective.host.copies import in_evaluation, on_trial
from normflows_injective.modules.random_numbers import OwnRandomNumbers
from normflows_injective.nets.fields import DenseField

PACKAGE = Path(nfi.__file__).parent


class Watch(nn.Module):
    """Looks, whenever it is called, at what the caller handed over."""

    def __init__(self, net, seen):
        super().__init__()
        self.net, self.dropout, self.seen = net, nn.Dropout(0.5), seen

    def forward(self, *args, **kwargs):
        self.seen.look()
        return self.dropout(self.net(*args, **kwargs))


class Seen:
    """Modes, flags and values of modules and the global random state, at the start and later."""

    def __init__(self):
        self.modules, self.random, self.calls = [], None, 0

    def start(self, *modules, random=False):
        self.modules = list(modules)
        self.random = torch.get_rng_state() if random else None
        self.before = self.state()

    def state(self):
        parts = [part for module in self.modules for part in module.modules()]
        tensors = [t for m in self.modules for t in [*m.parameters(), *m.buffers()]]
        return (
            [part.training for part in parts],
            [(id(t), t.requires_grad, t._version) for t in tensors],
        )

    def look(self):
        self.calls += 1
        if self.modules:
            assert self.state() == self.before
        if self.random is not None:
            assert torch.equal(torch.get_rng_state(), self.random)


def watched_pair(seen):
    encoder, decoder = nfi.nets.mlp_autoencoder(5, 2, (8,))
    return Watch(encoder, seen), Watch(decoder, seen)


def watched_flow(seen):
    return nfi.AssignmentFlow(Watch(DenseField(3, 3, (8,)), seen), 3, 3)


class NoisyBase(nf.distributions.DiagGaussian):
    """A base that draws by many of torch's functions."""

    def forward(self, num_samples=1):
        z, log_p = super().forward(num_samples)
        draws = [
            torch.rand(2),
            torch.rand_like(z),
            torch.randn_like(z),
            torch.randint(5, (2,)),
            torch.randint_like(z, 2, 5),
            torch.randperm(4),
            torch.multinomial(torch.ones(3), 2),
            torch.bernoulli(torch.full((3,), 0.5)),
            torch.normal(torch.zeros(2), 1.0),
            torch.empty(2).uniform_(),
            nn.functional.dropout(z),
            nn.functional.rrelu(z, training=True),
            torch.distributions.Gamma(torch.ones(2), 1.0).sample(),
            torch.distributions.Dirichlet(torch.ones(2)).sample(),
            torch.distributions.Poisson(torch.ones(2)).sample(),
            torch.distributions.StudentT(torch.ones(2)).sample(),
        ]
        return z + sum(0.0 * draw.double().mean() for draw in draws).to(z), log_p


def test_building_a_model_changes_nothing_meanwhile():
    seen = Seen()
    encoder, decoder = watched_pair(seen)
    flows = [nf.flows.ActNorm((2,)), nfi.flows.FreeFormInjection(encoder, decoder)]
    q0 = NoisyBase(2)
    seen.start(q0, *flows, random=True)
    model = nfi.InjectiveNormalizingFlow(q0, flows)
    assert seen.calls >= 2
    seen.look()
    assert model.training


def test_building_a_field_changes_nothing_meanwhile():
    seen = Seen()
    net = Watch(DenseField(3, 3, (8,)), seen)
    seen.start(net, random=True)
    nfi.AssignmentFlow(net, 3, 3)
    assert seen.calls > 0
    seen.look()


@pytest.mark.parametrize("build", [lambda: nfi.flows.gauges.LpGauge(1.5)])
def test_the_mass_of_a_surface_draws_nothing_of_the_callers(build):
    gauge = build()
    before = torch.get_rng_state()
    nfi.distributions.UniformOnSurface(gauge, dim=3, num_directions=4096)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::normflows_injective.errors.NumericalWarning")
def test_sampling_and_scoring_an_assignment_flow_changes_nothing_meanwhile():
    seen = Seen()
    flow = watched_flow(seen).train()
    labels = torch.randint(3, (2, 3))
    for call in (
        lambda: flow.sample(4, steps=2),
        lambda: flow.log_prob(labels, num_importance_samples=2, steps=2),
    ):
        seen.start(flow)
        called = seen.calls
        call()
        assert seen.calls > called
        seen.look()


def test_a_network_is_evaluated_without_dropout():
    flow = watched_flow(Seen()).train()
    noise = torch.zeros(64, 3, 3)
    rate = in_evaluation(flow.field)
    first, second = rate(noise, torch.ones(64)), rate(noise, torch.ones(64))
    assert torch.equal(first, second)
    assert not torch.equal(flow.field(noise, torch.ones(64)), first)


def test_path_gradients_change_nothing_meanwhile():
    seen = Seen()
    encoder, decoder = watched_pair(seen)
    model = nfi.InjectiveNormalizingFlow(
        nf.distributions.DiagGaussian(2), [nfi.flows.FreeFormInjection(encoder, decoder)]
    ).eval()

    class Target(nn.Module):
        on_manifold = True

        def log_prob(self, x):
            return -x.square().sum(1)

    model.p = Target()
    seen.start(model)
    model.reverse_kld(8, score_fn=False).backward()
    seen.look()


def test_two_threads_that_sample_at_once_leave_the_mode():
    barrier = threading.Barrier(2, timeout=60)

    class Meeting(nn.Module):
        def __init__(self):
            super().__init__()
            self.field, self.dropout, self.meets = DenseField(3, 3, (8,)), nn.Dropout(0.5), False

        def forward(self, features, t):
            if self.meets:
                barrier.wait()
            return self.dropout(self.field(features, t))

    net = Meeting()
    flow = nfi.AssignmentFlow(net, 3, 3).train()
    net.meets = True
    threads = [threading.Thread(target=flow.sample, args=(4, 2)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(module.training for module in flow.modules())


@pytest.mark.slow
def test_building_models_repeats_no_numbers_of_another_thread():
    stop, draws = threading.Event(), []

    def load():
        while not stop.is_set():
            draws.append(tuple(torch.randn(4).tolist()))

    thread = threading.Thread(target=load)
    thread.start()
    pair = nfi.nets.mlp_autoencoder(6, 2, (8,))
    for _ in range(20):
        nfi.InjectiveNormalizingFlow(base(2), [nfi.flows.FreeFormInjection(*pair)])
    stop.set()
    thread.join()
    assert len(set(draws)) == len(draws)


def test_own_random_numbers_are_those_of_a_generator_and_leave_the_global_one():
    before = torch.get_rng_state()
    q0 = NoisyBase(2)
    with OwnRandomNumbers(3):
        first = q0(4)[0]
        given = torch.randn(2, generator=seeded_generator(1))
    with OwnRandomNumbers(3):
        assert torch.equal(q0(4)[0], first)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(given, torch.randn(2, generator=seeded_generator(1)))


def test_own_random_numbers_go_into_each_other():
    """Some operators take a generator by place."""
    concentration = torch.ones(2)
    with OwnRandomNumbers(3), OwnRandomNumbers(4):
        inner = torch._standard_gamma(concentration), torch.randn(2)
    with OwnRandomNumbers(4):
        assert torch.equal(torch._standard_gamma(concentration), inner[0])
        assert torch.equal(torch.randn(2), inner[1])


# Copies of modules.


class Linked(nn.Module):
    """Refers to its parts in every way that a module may."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Dropout(0.9)
        self.listed = [self.second]
        self.named = {"second": (self.second,)}
        self.bound = self.second.forward
        self.part = functools.partial(nn.Module.__call__, self.second)
        second = self.second
        self.closed = lambda x: second(x)
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.first.weight
        self.rnn = nn.LSTM(2, 2, dropout=0.5, num_layers=2)

    def forward(self, x):
        x = self.tied(self.first(x))
        for call in (self.second, self.listed[0], self.named["second"][0], self.bound, self.part):
            x = call(x)
        return self.rnn(self.closed(x))[0]


def test_a_copy_in_evaluation_mode_reaches_all_that_is_registered():
    net, x = Linked(), torch.ones(8, 2)
    copy = in_evaluation(net)
    assert torch.equal(copy(x), copy(x))
    assert net.training
    copy(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert copy.tied.weight is copy.first.weight is net.first.weight
    net.eval()
    torch.testing.assert_close(copy(x), net(x))
    assert in_evaluation(net) is net


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_copy_of_what_torch_made_of_a_network():
    def net():
        return nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))

    in_place = net()
    in_place.compile(backend="eager")
    parametrised = net()
    torch.nn.utils.parametrizations.weight_norm(parametrised[0])
    made = [
        torch.compile(net(), backend="eager"),
        in_place,
        torch.jit.script(net()),
        parametrised,
        torch.nn.Sequential(torch.jit.script(net())),
    ]
    x = torch.ones(16, 2)
    for module in made:
        copy = in_evaluation(module)
        assert torch.equal(copy(x), copy(x)), type(module)
        assert module.training
        copy(x).sum().backward()
        assert all(p.grad is not None for p in module.parameters()), type(module)
        module.eval()
        torch.testing.assert_close(module(x), copy(x))


def test_a_trial_leaves_no_trace():
    net = nn.Sequential(nf.flows.ActNorm((2,)), nn.BatchNorm1d(2), nn.Linear(2, 2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    copy = on_trial([net])[0].train()
    copy[2](copy[1](copy[0](3 + torch.randn(8, 2))[0]))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not torch.equal(copy[0].s, net[0].s)
    assert not torch.equal(copy[1].running_mean, net[1].running_mean)
    assert copy[2].weight is net[2].weight


# What the package may not call, and where it acts on what it has made itself.
FORBIDDEN = {
    "fork_rng", "set_rng_state", "manual_seed", "manual_seed_all", "seed", "eval", "train",
    "requires_grad_", "set_default_dtype", "set_grad_enabled",
}  # fmt: skip
ASSIGNED = {"training", "requires_grad"}
OWN = {
    "autodiff/recording.py": {"requires_grad_"},
    "diagnostics/dimension/codes.py": {"requires_grad_"},
    "layerwise/block.py": {"requires_grad_"},
    "layerwise/regression.py": {"requires_grad_"},
    "models/divergences.py": {"requires_grad_"},
    "modules/copying.py": {"train"},
    "flows/guides/factories.py": {"eval"},
    "flows/guides/pathfinder.py": {"requires_grad_"},
    "pyro/guides/log_joint.py": {"requires_grad_"},
    "testing/gauges.py": {"requires_grad_"},
    "testing/layers.py": {"requires_grad_"},
    # What trains a model switches it, and what goes on with a training sets its random numbers.
    "training/fitting.py": {"training"},
    "training/run.py": {"eval", "train"},
    "training/state.py": {"set_rng_state"},
    "volume/lanczos.py": {"requires_grad_"},
}


def touched(source):
    """Names of what a module calls or assigns that others could see."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            # A generator of the package's own may be seeded.
            own = node.func.attr == "manual_seed" and isinstance(node.func.value, ast.Call)
            yield node.func.attr if node.func.attr in FORBIDDEN and not own else None
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                named = isinstance(target, ast.Attribute) and target.attr in ASSIGNED
                yield target.attr if named else None


@pytest.mark.slow
def test_the_package_sets_no_modes_flags_or_global_random_states():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        found = set(touched(path.read_text())) - {None}
        assert found <= OWN.get(name, set()), name


def test_the_search_for_it_finds_it():
    source = "net.eval(); net.training = 0; torch.random.manual_seed(0)\np.requires_grad_(False)"
    assert set(touched(source)) - {None} == {"eval", "training", "manual_seed", "requires_grad_"}

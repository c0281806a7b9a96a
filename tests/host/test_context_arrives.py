"""A context arrives at whatever says that it takes one, or is refused: it is never dropped."""

from __future__ import annotations

import functools

import normflows as nf
import pytest
import torch
from torch import nn

import normflows_injective as nfi
from normflows_injective.errors import ContextError
from normflows_injective.host.context import context_arguments, needs_context, takes_context


def scaled(forward):
    @functools.wraps(forward)
    def call(*args, **kwargs):
        return 1.0 * forward(*args, **kwargs)

    return call


class Net(nn.Module):
    """Adds the sum of its context to the first coordinates."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def answer(self, x, context):
        shift = 0.0 if context is None else context.sum(1, keepdim=True)
        return x.repeat(1, self.out)[:, : self.out] + shift


class Keyword(Net):
    def forward(self, x, context=None):
        return self.answer(x, context)


class KeywordOnly(Net):
    def forward(self, x, *, context=None):
        return self.answer(x, context)


class Label(Net):
    def forward(self, x, y=None):
        return self.answer(x, y)


class Options(Net):
    def forward(self, x, **options):
        return self.answer(x, options.get("context"))


class DeclaredOptions(Options):
    takes_context = True


class ArgumentsAndOptions(Net):
    takes_context = True

    def forward(self, x, *args, **options):
        return self.answer(x, options.get("context"))


class Wrapped(Net):
    @scaled
    def forward(self, x, context=None):
        return self.answer(x, context)


class Undecorated(Net):
    forward = (lambda call: lambda self, *args, **kwargs: call(self, *args, **kwargs))(
        Keyword.forward
    )


class OtherName(Net):
    takes_context = True

    def forward(self, x, condition=None):
        return self.answer(x, condition)


class PositionalOnly(Net):
    def forward(self, x, context=None, /):
        return self.answer(x, context)


class Nothing(Net):
    takes_context = True

    def forward(self, x):
        return self.answer(x, None)


class ScriptedNet(nn.Module):
    """What torch.jit.script can read."""

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None):
        if context is None:
            return x[:, :2]
        return x[:, :2] + context.sum(1, keepdim=True)


def replaced(out):
    net = Net(out)
    net.forward = lambda x, context=None: net.answer(x, context)
    return net


ARRIVES = {
    "keyword": Keyword,
    "keyword only": KeywordOnly,
    "label": Label,
    "options": Options,
    "declared options": DeclaredOptions,
    "arguments and options": ArgumentsAndOptions,
    "wrapped": Wrapped,
    "wrapped without its signature": Undecorated,
    "distributed": lambda out: nn.DataParallel(Keyword(out), device_ids=[]),
    "compiled": lambda out: torch.compile(Keyword(out), backend="eager"),
    "scripted": lambda out: torch.jit.script(ScriptedNet()),
    "call of the instance": replaced,
}
REFUSED = {"other name": OtherName, "positional only": PositionalOnly, "nothing": Nothing}


@pytest.mark.parametrize("build", ARRIVES.values(), ids=ARRIVES)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_a_context_arrives_at_a_network(build):
    net, x, context = build(2), torch.randn(4, 3), torch.randn(4, 2)
    injection = nfi.flows.FreeFormInjection(net, nn.Linear(2, 3))
    moved = injection.encode(x, context) - injection.encode(x)
    torch.testing.assert_close(moved, context.sum(1, keepdim=True).expand(4, 2))


@pytest.mark.parametrize("build", REFUSED.values(), ids=REFUSED)
def test_a_network_without_the_keyword_is_refused_where_it_is_built_in(build):
    with pytest.raises(ContextError, match="forward has no keyword by which it could arrive"):
        nfi.flows.FreeFormInjection(build(2), nn.Linear(2, 3))
    with pytest.raises(ContextError, match="has no keyword"):
        nfi.flows.FreeFormInjection(nn.Linear(3, 2), build(3))
    with pytest.raises(ContextError, match="has no keyword"):
        nfi.flows.GraphSurface(build(1))


class Layer(nf.flows.Flow):
    """Shifts by its context in one direction, and back in the other."""

    def forward(self, z, context=None):
        return z if context is None else z + context, z.new_zeros(len(z))

    def inverse(self, x, context=None):
        return x if context is None else x - context, x.new_zeros(len(x))


class InverseWithout(Layer):
    def inverse(self, x):
        return x, x.new_zeros(len(x))


class ForwardWithout(Layer):
    def forward(self, z):
        return z, z.new_zeros(len(z))


class LayerOfOptions(Layer):
    def forward(self, z, **options):
        return super().forward(z, options.get("context"))

    def inverse(self, x, **options):
        return super().inverse(x, options.get("context"))


class Base(nf.distributions.DiagGaussian):
    """A base around its context, whose methods call it by two names."""

    takes_context = True

    def forward(self, num_samples=1, context=None):
        z, log_p = super().forward(num_samples)
        return (z if context is None else z + context), log_p

    def log_prob(self, z, y=None):
        return super().log_prob(z if y is None else z - y)


class BaseWithout(Base):
    def log_prob(self, z):
        return super().log_prob(z)


def conditional_model(layer=None, q0=None):
    q0 = nf.distributions.DiagGaussian(2, trainable=False) if q0 is None else q0
    return nfi.InjectiveNormalizingFlow(q0, [*([layer] if layer else []), nfi.flows.Pad(2, 3)])


@pytest.mark.parametrize("layer", [Layer, LayerOfOptions])
def test_a_context_arrives_at_a_layer_in_both_directions(layer):
    model, z, context = conditional_model(layer()), torch.randn(4, 2), torch.randn(4, 2)
    x = model.forward(z, context)
    torch.testing.assert_close(x[:, :2], z + context)
    torch.testing.assert_close(model.inverse(x, context), z)
    torch.testing.assert_close(model.log_prob(x, context), model.q0.log_prob(z))


@pytest.mark.parametrize(
    ("layer", "method"), [(InverseWithout, "inverse"), (ForwardWithout, "forward")]
)
def test_a_layer_that_takes_it_in_one_direction_alone_is_refused(layer, method):
    with pytest.raises(ContextError, match=f"{layer.__name__} takes a context, but {method} has"):
        conditional_model(layer())


def test_a_base_may_call_it_by_two_names_but_must_have_both():
    q0 = Base(2, trainable=False)
    model, context = conditional_model(q0=q0), torch.full((4, 2), 9.0)
    x = model.sample(4, context)[0]
    assert bool((x[:, :2] > 0).all())
    assert bool((model.log_prob(x, context) > model.log_prob(x)).all())
    with pytest.raises(ContextError, match="log_prob has no keyword"):
        conditional_model(q0=BaseWithout(2, trainable=False))


def test_a_target_that_says_so_must_have_the_keyword():
    class Target(nn.Module):
        on_manifold = takes_context = True

        def log_prob(self, x):
            return -x.square().sum(1)

    model = conditional_model(Layer())
    model.p = Target()
    with pytest.raises(ContextError, match="log_prob has no keyword"):
        model.reverse_kld(4, context=torch.zeros(4, 2))


def test_targets_of_normflows_take_a_context():
    target = nf.distributions.target.ConditionalDiagGaussian()
    assert context_arguments(target, torch.zeros(1, 4), "log_prob").keys() == {"context"}


def test_what_a_subclass_inherits_from_normflows_takes_no_context():
    class Own(nf.distributions.DiagGaussian):
        def forward(self, num_samples=1):
            return super().forward(num_samples)

    assert not takes_context(Own(2))


def test_an_injection_is_called_by_keyword():
    class Shifted(nfi.flows.Injection):
        takes_context = True

        def encode(self, x, scale=1.0, context=None):
            return scale * (x[:, :2] - (0.0 if context is None else context))

        def decode(self, z, *, context=None, scale=1.0):
            return nn.functional.pad(scale * z + (0.0 if context is None else context), (0, 1))

    q0 = nf.distributions.DiagGaussian(2, trainable=False)
    model = nfi.InjectiveNormalizingFlow(q0, [Layer(), Shifted()])
    z, context = torch.randn(4, 2), torch.randn(4, 2)
    torch.testing.assert_close(model.forward(z, context)[:, :2], z + 2 * context)
    torch.testing.assert_close(model.inverse(model.forward(z, context), context), z)


def test_partials_and_bound_methods():
    net = Keyword(2)
    for call in (net.forward, functools.partial(net.forward), lambda x, **options: x):
        assert takes_context(call)
        assert context_arguments(call, torch.zeros(1, 1)).keys() == {"context"}
    assert not needs_context(functools.partial(lambda x, context: x, context=1.0))
    assert needs_context(functools.partial(lambda scale, x, context: x, 1.0))
    assert not takes_context(torch.tanh)

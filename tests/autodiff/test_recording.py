"""Recorded passes: products with first layers against dense Jacobians."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from support.dense import dense_jacobian
from support.gradients import gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

import normflows_injective as nfi
from normflows_injective.autodiff.recording import record, record_first_layers

# Contractions against dense Jacobians.


class Encoder(nn.Module):
    """Modules by name for the functions below."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(6, 8)
        self.last = nn.Sequential(nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 2))
        self.conv = nn.Conv1d(2, 4, 2, padding=1)
        self.transposed = nn.ConvTranspose1d(2, 4, 2)
        self.square = nn.Linear(6, 6)
        self.narrow = nn.Linear(3, 4)
        self.hyper = nn.Linear(6, 48)
        self.context_arguments = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.rand(6))
        self.vector = nn.Parameter(torch.randn(8))


def in_place_before(net, x):
    x.mul_(2)
    x += 1
    return net.last(net.first(x))


def in_place_between(net, x):
    h = net.first(x)
    view = x.view(len(x), 6)
    view.exp_()
    return net.last(net.second(x) + h.detach().tanh())


def in_place_on_a_view(net, x):
    flat = x.reshape(len(x), 2, 3).flatten(1)
    x.mul_(3)
    return net.last(net.first(flat))


def in_place_activation(net, x):
    return net.last(F.relu(net.first(x), inplace=True) + 1)


def context_arguments(net, x):
    context = torch.linspace(0, 1, 2, dtype=x.dtype).expand(len(x), 2)
    return net.last(net.context_arguments(torch.cat([x, context], 1)))


def weight_from_the_data(net, x):
    rows = [F.linear(row[None], net.hyper(row[None]).view(8, 6)) for row in x]
    return net.last(torch.cat(rows) + net.first(x))


def weight_from_the_batch(net, x):
    """The first sample of the batch makes the weight; x is one sample in this test."""
    weight = net.hyper(x[:1]).view(8, 6)
    return net.last(F.linear(x, weight, net.vector))


def gate_without_gradient(net, x):
    with torch.no_grad():
        gate = net.second(x).mean(1, keepdim=True)
    return net.last(net.first(x)) * gate


def gradient_of_a_potential(net, x):
    x = x if x.requires_grad else x.requires_grad_()
    potential = F.silu(net.first(x)).square().sum() + x.square().sum()
    return torch.autograd.grad(potential, x, create_graph=True)[0][:, :2]


def functional_gradient(net, x):
    def potential(s):
        return net.last(net.first(s)).square().sum() + s.square().sum()

    return torch.func.grad(potential)(x)[:, :2]


FIRST_LAYERS = {
    "linear": lambda net, x: net.last(net.first(x)),
    "linear without bias": lambda net, x: net.last(F.linear(x, net.first.weight)),
    "bias by keyword": lambda net, x: net.last(F.linear(x, net.first.weight, bias=net.first.bias)),
    "linear after nothing else": lambda net, x: net.first(x)[:, :2],
    "conv": lambda net, x: net.last(net.conv(x.view(-1, 2, 3)).flatten(1)[:, :8]),
    "conv with stride by keyword": lambda net, x: net.last(
        F.conv1d(x.unflatten(1, (2, 3)), net.conv.weight, stride=1, padding=1).flatten(1)[:, :8]
    ),
    "transposed conv": lambda net, x: net.last(
        net.transposed(torch.unflatten(x, 1, (2, 3))).flatten(1)[:, :8]
    ),
    "flatten": lambda net, x: net.last(net.first(x.view(len(x), 3, 2).flatten(1))),
    "reshape and clone": lambda net, x: net.last(
        net.first(x.clone().reshape(len(x), 2, -1).contiguous().reshape(len(x), -1))
    ),
    "torch's functions": lambda net, x: net.last(
        net.first(torch.flatten(torch.clone(torch.reshape(x, (-1, 3, 2))), 1))
    ),
    "axes kept": lambda net, x: net.last(net.narrow(x.view(-1, 2, 3)).flatten(1)),
    "axes merged with the batch": lambda net, x: net.last(
        net.narrow(x.view(-1, 3)).view(len(x), 8)
    ),
    "permuted": lambda net, x: net.last(net.narrow(x.view(-1, 3, 2).permute(0, 2, 1)).flatten(1)),
    "skip connection": lambda net, x: net.last((net.square(x) + x) @ net.first.weight.T),
    "residual": lambda net, x: net.last(net.first(x + F.silu(net.square(x)))),
    "two heads": lambda net, x: net.last(torch.cat([net.first(x), net.second(x)], 1)[:, 4:12]),
    "a product of two": lambda net, x: net.last(net.first(x) * net.second(x)),
    "weight used twice": lambda net, x: net.last(net.first(x) * net.first(x.view(-1, 6))),
    "weight used again later": lambda net, x: net.last(
        net.first(net.square(net.square(x).tanh()))
    ),
    "weight from the data": weight_from_the_data,
    "parametrised weight": lambda net, x: net.last(
        F.linear(x, net.first.weight * net.scale, net.first.bias)
    ),
    "nonlinearity first": lambda net, x: net.last(net.first(x.tanh())),
    "slices": lambda net, x: net.last(torch.cat([net.narrow(x[:, :3]), net.narrow(x[:, 3:])], 1)),
    "raw product": lambda net, x: net.last(x @ net.first.weight.T),
    "in place before": in_place_before,
    "in place between": in_place_between,
    "in place on a view": in_place_on_a_view,
    "in place activation": in_place_activation,
    "context": context_arguments,
    "without gradient": gate_without_gradient,
    "gradient of a potential": gradient_of_a_potential,
    "functional gradient": functional_gradient,
    "func.jvp": lambda net, x: torch.func.jvp(
        lambda s: net.last(net.first(s)), (x,), (torch.ones_like(x),)
    )[1],
    "vmap": lambda net, x: torch.func.vmap(lambda s: net.last(net.first(s)))(x),
    "checkpoint": lambda net, x: checkpoint(
        lambda s: net.last(net.first(s)), x, use_reentrant=False
    ),
    "checkpoint after the first": lambda net, x: checkpoint(
        net.last, net.first(x), use_reentrant=False
    ),
    "norm of a parameter": lambda net, x: net.last(net.first(x) * F.layer_norm(net.vector, (8,))),
}


def check_contraction(function, net, x, count, recorder=record_first_layers):
    before = x.clone()
    z = function(net, x.clone())
    cotangents = torch.randn(count, *z.shape, dtype=x.dtype)
    tangents = torch.randn(count, *x.shape, dtype=x.dtype)
    point = x.detach().requires_grad_()
    recorded = recorder(lambda s: function(net, s), point)
    actual = recorded.contract(cotangents, tangents)

    dense = dense_jacobian(lambda s: function(net, s.clone()), x)
    expected = torch.einsum("kbi,bij,kbj->kb", cotangents.flatten(2), dense, tangents.flatten(2))
    assert actual.shape == expected.shape
    torch.testing.assert_close(recorded.value, z)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    weights, ends = torch.randn_like(expected), list(net.parameters())
    torch.testing.assert_close(
        gradients((actual * weights).sum(), ends),
        gradients((expected * weights).sum(), ends),
    )
    # The value keeps its graph, too.
    torch.testing.assert_close(
        gradients(recorded.value.square().sum(), ends),
        gradients(function(net, x.clone()).square().sum(), ends),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST_LAYERS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("recorder", [record, record_first_layers])
def test_contractions_equal_the_dense_ones(name, count, recorder):
    x = torch.randn(4, 6, dtype=torch.float64)
    check_contraction(FIRST_LAYERS[name], third_derivative_safe(name), x, count, recorder)


def third_derivative_safe(name):
    """Where the Jacobian is itself of second order, torch's layer norm is no oracle."""
    net = Encoder().double()
    if "gradient" in name or name == "func.jvp":
        net.last[0] = nn.Identity()
    return net


@pytest.mark.parametrize("name", ["linear", "axes merged with the batch", "weight from the batch"])
@pytest.mark.parametrize("count", [1, 3])
def test_batches_of_one(name, count):
    """Products of merged axes must not be broadcast over the one sample."""
    function = FIRST_LAYERS.get(name, weight_from_the_batch)
    check_contraction(function, Encoder().double(), torch.randn(1, 6).double(), count)


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
def test_frozen_first_layers(frozen):
    net = Encoder().double()
    for name in frozen:
        getattr(net.first, name).requires_grad_(False)
    x, function = torch.randn(4, 6, dtype=torch.float64), FIRST_LAYERS["linear"]
    recorded = record_first_layers(lambda s: function(net, s), x.clone().requires_grad_())
    assert len(recorded.first_layers) == ("weight" not in frozen)
    u, v = torch.randn_like(x)[None], torch.randn(1, 4, 2, dtype=torch.float64)
    dense = dense_jacobian(lambda s: function(net, s), x)
    ends = [p for p in net.parameters() if p.requires_grad]
    torch.testing.assert_close(
        gradients(recorded.contract(v, u).square().sum(), ends),
        gradients(torch.einsum("kbi,bij,kbj->kb", v, dense, u).square().sum(), ends),
    )


def test_how_many_first_layers_are_found():
    net, x = Encoder().double(), torch.randn(4, 6, dtype=torch.float64)
    one = [
        "linear",
        "conv",
        "transposed conv",
        "flatten",
        "reshape and clone",
        "skip connection",
        "residual",
        "bias by keyword",
        "axes kept",
        "torch's functions",
        "in place activation",
    ]
    two = ["two heads", "weight used twice", "a product of two"]
    none = [
        "nonlinearity first",
        "in place before",
        "in place on a view",
        "raw product",
        "axes merged with the batch",
        "context",
        "vmap",
        "checkpoint",
        "gradient of a potential",
    ]
    for names, number in ((one, 1), (two, 2), (none, 0)):
        for name in names:
            point = x.clone().requires_grad_()
            recorded = record_first_layers(lambda s, f=FIRST_LAYERS[name]: f(net, s), point)
            assert len(recorded.first_layers) == number, name


def test_a_map_that_ignores_its_data_is_an_error():
    weight = torch.randn(2, 6, requires_grad=True)
    point = torch.randn(4, 6).requires_grad_()
    recorded = record_first_layers(lambda x: F.linear(x.detach(), weight), point)
    with pytest.raises(nfi.errors.NotInjectiveError, match="does not depend on its input"):
        recorded.contract(torch.randn(1, 4, 2), torch.randn(1, 4, 6))
    recorded = record_first_layers(lambda x: x.detach(), point)
    with pytest.raises(nfi.errors.NotInjectiveError, match="does not depend on its input"):
        recorded.contract(torch.randn(1, 4, 6), torch.randn(1, 4, 6))


@pytest.mark.parametrize("count", [1, 2])
def test_empty_batches_where_torch_takes_them(count):
    for net in (
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.SiLU()),
        nn.Sequential(nn.Conv1d(2, 4, 1), nn.GroupNorm(2, 4), nn.SiLU()),
    ):
        x = torch.zeros(0, 4) if isinstance(net[0], nn.Linear) else torch.zeros(0, 2, 3)
        recorded = record_first_layers(net, x.requires_grad_())
        assert recorded.value.shape == net(x).shape
        cotangents = torch.zeros(count, *recorded.value.shape)
        product = recorded.contract(cotangents, torch.zeros(count, *x.shape))
        assert product.shape == (count, 0)
        pushed = nfi.autodiff.products.jvp(net, x, torch.zeros(count, *x.shape))[1]
        assert pushed.shape == cotangents.shape


def test_activations_in_place_are_left_in_place():
    x = torch.randn(3, 4, dtype=torch.float64)
    linear = nn.Linear(4, 4).double()

    def encode(s):
        h = linear(s)
        out = F.silu(h, inplace=True)
        assert out is h
        return out

    recorded = record_first_layers(encode, x.clone().requires_grad_())
    torch.testing.assert_close(recorded.value, F.silu(linear(x)))


def test_a_view_before_the_first_layer_and_a_tangent_that_lies_otherwise_in_memory():
    encode = torch.nn.Linear(12, 2).double()
    decode = torch.nn.Linear(2, 12).double()
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    for num_probes in (1, 2):
        terms = nfi.SurrogateLikelihood(num_probes=num_probes)(
            x,
            lambda x: encode(x.view(len(x), -1)),
            lambda z: decode(z).view(-1, 2, 2, 3).permute(0, 3, 1, 2),
        )
        assert bool(torch.isfinite(terms.volume).all())


@pytest.mark.slow
def test_threads_leave_the_settings_of_the_process_as_they_were():
    """Each of them makes the setting and takes it back, at overlapping times."""
    backends = (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.math_sdp_enabled)
    before = [enabled() for enabled in backends]
    interval = sys.getswitchinterval()

    def train():
        encoder, decoder = torch.nn.Linear(4, 2), torch.nn.Linear(2, 4)
        for _ in range(30):
            likelihood(torch.randn(5, 4), encoder, decoder).volume.sum().backward()

    likelihood = nfi.SurrogateLikelihood()
    threads = [threading.Thread(target=train) for _ in range(3)]
    try:
        sys.setswitchinterval(1e-6)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert [enabled() for enabled in backends] == before
    assert torch.autograd.forward_ad._current_level == -1

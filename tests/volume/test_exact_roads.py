"""Exact log-volumes in pieces, latents that are numbers, attention, and fields of flows."""

from __future__ import annotations

import warnings
from functools import partial

import normflows as nf
import pytest
import torch
from support.dense import dense_log_volume
from support.seeds import manual_seed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import normflows_injective as nfi
from normflows_injective.errors import ForwardModeError, NumericalWarning
from normflows_injective.flows import gauges
from normflows_injective.modules import precision
from normflows_injective.volume import (
    decode_and_log_volume,
    exact,
    jacobian,
    log_volume,
)

LATENT, DATA, ROWS = 3, 6, 20


def decoder(dtype):
    return nn.Sequential(nn.Linear(LATENT, 8), nn.Tanh(), nn.Linear(8, DATA)).to(dtype)


@pytest.fixture
def few_rows(monkeypatch):
    """Jacobians of seven samples fit at a time."""
    monkeypatch.setattr(exact, "_JACOBIAN_BYTES", 7 * LATENT * DATA * 4 * 8)


def test_pieces_give_what_the_whole_batch_gives(few_rows, dtype):
    net, z = decoder(dtype), torch.randn(ROWS, LATENT, dtype=dtype)
    seen = []

    def decode(s):
        seen.append(len(s))
        return net(s)

    with torch.no_grad():
        x, volume = decode_and_log_volume(decode, z)
    assert {7, 6} <= set(seen)  # 20 rows in pieces of seven
    torch.testing.assert_close(x, net(z))
    torch.testing.assert_close(volume.double(), dense_log_volume(net, z), rtol=1e-5, atol=1e-5)


def test_a_context_is_cut_with_the_rows(few_rows, dtype):
    net = nn.Linear(LATENT, DATA).to(dtype)
    z, context = torch.randn(ROWS, LATENT, dtype=dtype), torch.randn(ROWS, 1, dtype=dtype)

    def decode(s, context):
        return net(s * context.exp())

    with torch.no_grad():
        whole = decode_and_log_volume(partial(decode, context=context), z)
        pieces = decode_and_log_volume(decode, z, context=context)
        expected = [
            log_volume(partial(decode, context=c), s)
            for s, c in zip(z.split(1), context.split(1), strict=True)
        ]
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(pieces.log_volume, torch.cat(expected))


def test_callables_that_belong_to_the_rows_of_a_batch_are_not_cut(few_rows, dtype):
    net = nn.Linear(LATENT, DATA).to(dtype)
    z, held = torch.randn(ROWS, LATENT, dtype=dtype), torch.randn(ROWS, 1, dtype=dtype)
    expected = dense_log_volume(net, z * 0) + LATENT * held[:, 0].double()
    for decode in (lambda s: net(s * held.exp()), lambda s: net(s * held[: len(s)].exp())):
        with torch.no_grad():
            actual = log_volume(decode, z).double()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_deficient_ranks_of_all_pieces_are_counted_once(few_rows, dtype):
    z = torch.ones(ROWS, LATENT, dtype=dtype)
    z[[3, 12, 19]] = -1.0
    net = decoder(dtype)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        log_volume(lambda s: net(s * s[:, :1].relu()), z)
    (warning,) = [w for w in caught if issubclass(w.category, NumericalWarning)]
    assert "3 of 20 decoder Jacobians" in str(warning.message)
    assert "first at index 3" in str(warning.message)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "orthonormal", "sphere"])
@pytest.mark.parametrize("estimator", nfi.volume.estimators.ESTIMATORS)
def test_latents_that_are_one_number_per_sample(kind, estimator, dtype):
    x = torch.randn(3, 2, dtype=dtype)
    likelihood = nfi.SurrogateLikelihood(probes=kind, estimator=estimator)
    numbers = likelihood(x, lambda s: s[:, 0].sin(), lambda z: torch.stack([z, z.sin()], 1))
    assert numbers.z.shape == numbers.volume.shape == (3,)
    if kind != "gaussian":  # all others have one value up to the sign
        rows = likelihood(x, lambda s: s[:, :1].sin(), lambda z: torch.cat([z, z.sin()], 1))
        torch.testing.assert_close(numbers.volume, rows.volume)


def test_volumes_of_latents_that_are_numbers(dtype):
    z = torch.randn(5, dtype=dtype)
    circle = lambda s: 2 * torch.stack([s.cos(), s.sin()], 1)  # noqa: E731
    expected = torch.full_like(z, 2.0).log()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(log_volume(circle, z), expected)
            torch.testing.assert_close(
                log_volume(circle, z, method="lanczos", num_probes=2).log_volume, expected
            )


class Attention(nn.Module):
    """A function of vectors by self-attention over two tokens."""

    def __init__(self, dim):
        super().__init__()
        self.input, self.output = nn.Linear(dim, 8), nn.Linear(8, 1)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        h = self.norm(self.input(x).view(-1, 2, 4))
        return self.output(self.attention(h, h, h, need_weights=False)[0].flatten(1))


class Increasing(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Attention(3)

    def forward(self, x):
        radius = x.norm(dim=1)
        return radius * (1 + 0.1 * self.net(x / radius[:, None])[:, 0].tanh())


SURFACES = {
    "GraphSurface": lambda: (nfi.flows.GraphSurface(Attention(2)), torch.randn(5, 2)),
    "NetworkRadius": lambda: (
        nfi.flows.RadialSurface(gauges.NetworkRadius(Attention(3))),
        nn.functional.normalize(torch.randn(5, 3), dim=1),
    ),
    "ImplicitGauge": lambda: (
        nfi.flows.RadialSurface(gauges.ImplicitGauge(Increasing())),
        nn.functional.normalize(torch.randn(5, 3), dim=1),
    ),
}


@pytest.mark.parametrize("name", SURFACES)
def test_attention_and_layer_normalisation_in_surfaces(name):
    surface, points = SURFACES[name]()
    surface, points = surface.double(), points.double()
    parameter = dict(surface.named_parameters())
    weight = next(p for n, p in parameter.items() if n.endswith("input.weight"))
    (actual,) = torch.autograd.grad(surface(points)[1].sum(), weight)
    direction = torch.randn_like(weight)

    def moved(step):
        with torch.no_grad():
            weight.add_(step * direction)
            value = surface(points)[1].sum()
            weight.sub_(step * direction)
        return value

    expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
    torch.testing.assert_close((actual * direction).sum(), expected, rtol=1e-5, atol=1e-7)


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.input, self.output = nn.Linear(4, 8), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(8)
        self.instance = nn.InstanceNorm1d(3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, features, t):
        time = t.view(-1, 1, 1).expand(-1, features.shape[1], 1)
        h = self.norm(self.input(torch.cat([features, time], 2)))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.output(self.instance(h).sin())


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_gradients_of_assignment_layers_with_normalisations(divergence):
    flow = nfi.AssignmentFlow(Field().double(), num_variables=3, num_classes=3)
    layer = flow.layer(steps=2, divergence=divergence)
    x = torch.randn(4, flow.dim, dtype=torch.float64)
    weight = flow.field.net.norm.weight

    def loss():
        manual_seed(1)
        z, log_det = layer.inverse(x)
        return (0.5 * z.square().sum(1) - log_det).mean()

    (actual,) = torch.autograd.grad(loss(), weight)
    direction = torch.randn_like(weight)

    def moved(step):
        with torch.no_grad():
            weight.add_(step * direction)
            value = loss()
            weight.sub_(step * direction)
        return value

    expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
    torch.testing.assert_close((actual * direction).sum(), expected, rtol=1e-5, atol=1e-8)
    with pytest.raises(ForwardModeError, match="A divergence has no forward-mode"):
        torch.func.jvp(lambda s: layer(s)[1], (x,), (x.sin(),))


class NoFloat64(TorchDispatchMode):
    """A device without float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            assert getattr(part, "dtype", None) != torch.float64, func
        return result


@pytest.fixture
def without_float64(monkeypatch):
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", frozenset({"cpu"}))
    with NoFloat64():
        yield


@pytest.mark.slow
def test_no_float64_on_a_device_that_has_none(without_float64):
    injection = nfi.flows.FreeFormInjection(*nfi.nets.mlp_autoencoder(5, 2, (8,)))
    model = nfi.InjectiveNormalizingFlow(
        nf.distributions.DiagGaussian(2, trainable=False), [injection]
    )
    x = torch.randn(6, 5)
    model.forward_kld(x).backward()
    model.log_prob(x).sum().backward()
    with torch.no_grad():
        model.log_prob(x)
    nfi.diagnostics.injectivity_report(model, x)
    nfi.diagnostics.frechet_distance(x, x + 1)
    for gauge in (
        gauges.EllipsoidGauge(torch.tensor([1.0, 2.0, 3.0])),
        gauges.SlopeGauge([3.0, 2.0, 1.0]),
        gauges.GroupLassoGauge([[0, 1], [2]]),
        gauges.HyperplaneGauge([3.0, 2.0, 1.0]),
    ):
        gauge.log_cone_mass(3, torch.tensor(1.0))
        gauge.log_area(3, torch.tensor(1.0))
    flow = nfi.AssignmentFlow(Field(), num_variables=3, num_classes=3)
    flow.layer(steps=1)(torch.randn(4, flow.dim))


def test_results_are_on_no_graph_where_nobody_has_gradients():
    """Gradients are enabled all day in a notebook; a graph there is memory that nobody frees."""
    z = torch.randn(3, 2)

    def plain(s):
        return torch.cat([s.sin(), s.square()], 1)

    for decode in (plain, lambda s: plain(s).logcumsumexp(1)):
        results = [*decode_and_log_volume(decode, z), *jacobian(decode, z)]
        assert not any(result.requires_grad for result in results)
    scale = torch.ones(1, requires_grad=True)
    assert decode_and_log_volume(lambda s: scale * plain(s), z).log_volume.requires_grad
    assert log_volume(plain, z.requires_grad_()).requires_grad

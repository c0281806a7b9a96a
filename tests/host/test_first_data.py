"""Layers that initialise themselves on data take it wholly, as ordinary tensors, or not at all."""

from __future__ import annotations

from copy import deepcopy

import normflows as nf
import pytest
import torch
from support.models import base
from torch import nn

import normflows_injective as nfi
from normflows_injective.errors import NonFiniteError
from normflows_injective.flows.coupling import ActNorm
from normflows_injective.flows.kernel import KernelCoupling
from normflows_injective.host.first_data import awaits_first_data
from normflows_injective.host.first_meeting import meet_first_data

pyro = pytest.importorskip("pyro")

import normflows_injective.pyro as nfp  # noqa: E402

FILL_VALUE = 9.96921e36


class NormedNet(nn.Module):
    """A network with the ActNorm of normflows inside."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.first, self.last = nn.Linear(fan_in, 8), nn.Linear(8, fan_out)
        self.norm = nf.utils.nn.ActNorm((8,))

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


def model_with(name):
    pair = nfi.nets.mlp_autoencoder(6, 2, (8,))
    if name == "in the encoder":
        pair = NormedNet(6, 2), pair[1]
    if name == "in the decoder":
        pair = pair[0], NormedNet(2, 6)
    behind = {
        "behind: ActNorm": lambda: ActNorm(6),
        "behind: nf.flows.ActNorm": lambda: nf.flows.ActNorm((6,)),
        "behind: KernelCoupling": lambda: KernelCoupling(6, 8),
    }
    front = {
        "in front: ActNorm": lambda: ActNorm(2),
        "in front: nf.flows.ActNorm": lambda: nf.flows.ActNorm((2,)),
        "in front: KernelCoupling": lambda: KernelCoupling(2, 8),
    }
    flows = [nfi.flows.FreeFormInjection(*pair)]
    if name in behind:
        flows.append(behind[name]())
    if name in front:
        flows.insert(0, front[name]())
    return nfi.InjectiveNormalizingFlow(base(2), flows)


PLACES = [
    "behind: ActNorm",
    "behind: nf.flows.ActNorm",
    "behind: KernelCoupling",
    "in front: ActNorm",
    "in front: nf.flows.ActNorm",
    "in front: KernelCoupling",
    "in the encoder",
    "in the decoder",
]
CALLS = {
    "forward_kld": lambda model, x: model.forward_kld(x),
    "loss_terms": lambda model, x: model.loss_terms(x).loss,
    "ForwardKLD": lambda model, x: nfi.ForwardKLD(model)(x),
    "log_prob": lambda model, x: model.log_prob(x),
    "inverse": lambda model, x: model.inverse(x),
    "encode": lambda model, x: model.encode(x),
    "project": lambda model, x: model.project(x),
    "InjectiveDistribution": lambda model, x: nfp.InjectiveDistribution(
        model, off_manifold="project", validate_args=False
    ).log_prob(x),
}


def cold_layers(model):
    return [module for module in model.modules() if awaits_first_data(module)]


def with_outlier(rows=16):
    x = torch.randn(rows, 6)
    x[3, 2] = FILL_VALUE
    return x


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::normflows_injective.errors.NumericalWarning")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("place", PLACES)
def test_a_batch_that_is_refused_changes_nothing(place, call):
    model = model_with(place)
    before, flags = state_of(model), [p.requires_grad for p in model.parameters()]
    cold = cold_layers(model)
    assert cold
    try:
        with torch.no_grad():
            finite = bool(torch.isfinite(call(model, with_outlier())).all())
    except NonFiniteError:
        finite = False
    if not finite:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert cold_layers(model) == cold
    assert [p.requires_grad for p in model.parameters()] == flags
    for _ in range(3):
        loss = model.forward_kld(torch.randn(16, 6))
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("place", [place for place in PLACES if place.startswith("behind")])
def test_the_training_loss_refuses_the_outlier(place):
    with pytest.raises(NonFiniteError):
        model_with(place).forward_kld(with_outlier())


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("place", PLACES)
def test_first_data_in_inference_mode_makes_ordinary_tensors(place, call):
    model, x = model_with(place), 3 * torch.randn(32, 6)
    with torch.inference_mode():
        call(model, x)
    assert not cold_layers(model) or call is CALLS["encode"]
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_inference() for tensor in tensors)
    model.forward_kld(x).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("place", ["behind: ActNorm", "behind: nf.flows.ActNorm"])
def test_what_is_taken_standardises_the_data(place):
    model, x = model_with(place), 3 + 2 * torch.randn(64, 6)
    norm = model.flows[-1]
    model.forward_kld(x)
    z, _ = norm.inverse(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(6), atol=1e-5, rtol=0)


def test_samples_initialise_the_layer_of_normflows_alone():
    for place, meets in (("in front: ActNorm", False), ("in front: nf.flows.ActNorm", True)):
        model = model_with(place)
        with torch.inference_mode():
            model.sample(16)
        assert bool(cold_layers(model)) is not meets
        assert not any(p.is_inference() for p in model.parameters())


class Box(nf.distributions.BaseDistribution):
    """Uniform on a square, with a density of zero elsewhere."""

    def forward(self, num_samples=1):
        return 2 * torch.rand(num_samples, 2) - 1, torch.zeros(num_samples)

    def log_prob(self, z):
        inside = (z.abs() <= 1).all(1)
        return torch.where(inside, 0.0, -torch.inf)


def test_infinite_densities_outside_a_support_are_given_and_change_nothing():
    model = nfi.InjectiveNormalizingFlow(
        Box(),
        [nf.flows.ActNorm((2,)), nfi.flows.Pad(2, 3)],
    )
    x = torch.tensor([[0.0, 0.0, 0.0], [4.0, 4.0, 0.0], [0.1, 0.1, 0.0]])
    log_prob = model.log_prob(x)
    assert bool(log_prob.isneginf().any())
    assert not bool(log_prob.isnan().any())
    assert cold_layers(model)


def test_bare_callables_are_protected_too():
    decoder = NormedNet(2, 6).double()
    encoder = nn.Linear(6, 2).double()
    before = state_of(decoder)
    likelihood = nfi.SurrogateLikelihood()
    x = torch.randn(8, 6, dtype=torch.float64)
    x[0, 0] = 1e300
    with pytest.raises(NonFiniteError, match="no layer was changed"):
        likelihood(x, encoder, lambda z: (decoder(z) * 1e200) ** 2)
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
    likelihood(torch.randn(8, 6, dtype=torch.float64), encoder, lambda z: decoder(z))
    assert not cold_layers(decoder)


@pytest.mark.parametrize("layer", [lambda: ActNorm(6), lambda: KernelCoupling(6, 8)])
def test_layers_of_this_package_protect_themselves_in_other_containers(layer):
    host = nf.NormalizingFlow(nf.distributions.DiagGaussian(6), [layer()])
    before, x = state_of(host), with_outlier()
    x[:, :] = x.sign() * torch.finfo(x.dtype).max / 2
    with pytest.raises(NonFiniteError, match="first data"):
        host.forward_kld(x)
    assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())
    host.forward_kld(torch.randn(16, 6))
    assert not cold_layers(host)


def test_the_layerwise_trainer_changes_no_given_layers_by_data_that_it_refuses():
    norm = nf.flows.ActNorm((2,)).double()
    x = torch.randn(400, 2, dtype=torch.float64)
    x[0, 0], x[1, 0] = 1e308, -1e308  # whose deviation overflows
    with pytest.raises(NonFiniteError):
        nfi.diagnostics.LayerwiseTrainer(2, max_layers=1).fit(x, [norm])
    assert awaits_first_data(norm)
    assert not norm.s.any()


def test_a_layer_that_met_data_is_known_until_its_flag_is_written():
    norm = ActNorm(2)
    blank = deepcopy(norm.state_dict())
    meet_first_data(norm, lambda norm: norm.inverse(torch.randn(8, 2))[0])
    assert not awaits_first_data(norm)
    twin = deepcopy(norm)
    assert not awaits_first_data(twin)
    twin.load_state_dict(blank)
    assert awaits_first_data(twin)
    assert not awaits_first_data(norm)
    norm.data_dep_init_done.zero_()
    assert awaits_first_data(norm)
    norm.data_dep_init_done.fill_(1.0)
    assert not awaits_first_data(norm)
    norm.data_dep_init_done = torch.tensor(0.0)
    assert awaits_first_data(norm)
    norm.load_state_dict(twin.state_dict() | {"data_dep_init_done": torch.tensor(1.0)})
    assert not awaits_first_data(norm)
    norm.load_state_dict(blank, assign=True)
    assert awaits_first_data(norm)


def test_the_first_of_two_threads_wins():
    norm, x = ActNorm(2), torch.randn(8, 2)

    def late(copy):
        # Meanwhile another thread has finished.
        norm.initialise(5 + x)
        return copy.inverse(x)[0]

    meet_first_data(norm, late)
    torch.testing.assert_close(norm.shift.detach(), -(5 + x).mean(0))

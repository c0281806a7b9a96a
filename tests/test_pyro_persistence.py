"""Copies, files and the parameter store."""

from __future__ import annotations

import copy
import pickle
import warnings

import normflows as nf
import pytest
import torch
from seeds import manual_seed

from tests.models import base, coupling

pyro = pytest.importorskip("pyro", reason="Pyro is not installed")
dist = pytest.importorskip("pyro.distributions")
infer = pytest.importorskip("pyro.infer")
nfp = pytest.importorskip("normflows_injective.pyro")
registry = pytest.importorskip("tests.pyro_registry")
LAWS, build = registry.LAWS, registry.build
ParamStoreWarning = pytest.importorskip("normflows_injective.errors").ParamStoreWarning

TRAINED = [name for name, case in LAWS.items() if case.has_rsample]


@pytest.fixture(autouse=True)
def clean():
    pyro.clear_param_store()
    with pyro.validation_enabled(True):
        yield


def step(module, law):
    """One step, after which a draw is remembered and its graph alive."""
    x = law.rsample((4,))
    law.log_prob(x).sum().backward()
    torch.optim.SGD(module.parameters(), lr=1e-3).step()
    return x


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_after_a_step(name, duplicate):
    module = build(name)
    law = LAWS[name].law(module)
    x = step(module, law)
    module.zero_grad()
    for thing in (module, law):
        copied = duplicate(thing)
        ours = LAWS[name].law(copied) if thing is module else copied
        manual_seed(1)
        expected = law.rsample((3,))
        manual_seed(1)
        found = ours.rsample((3,))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(ours.log_prob(found), law.log_prob(expected))
    if LAWS[name].scores_others:
        data = x.detach().clone()
        torch.testing.assert_close(ours.log_prob(data), law.log_prob(data))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    manual_seed(1)
    assert torch.equal(ours.rsample((3,)), found)


@pytest.mark.parametrize("name", TRAINED)
def test_state_dicts_between_models_of_different_seeds(name):
    first, second = build(name, 1), build(name, 2)
    if not list(first.state_dict()):
        return
    second.load_state_dict(first.state_dict())
    laws = [LAWS[name].law(module) for module in (first, second)]
    manual_seed(0)
    x = laws[0].rsample((4,))
    manual_seed(0)
    y = laws[1].rsample((4,))
    torch.testing.assert_close(x, y)
    torch.testing.assert_close(laws[0].log_prob(x), laws[1].log_prob(y))


def shuffled(seed, dim=6):
    """A model whose density hangs on buffers: random permutations."""
    manual_seed(seed)
    layers = [coupling(dim), nf.flows.Permute(dim), coupling(dim), nf.flows.Permute(dim)]
    return nf.NormalizingFlow(base(dim), layers)


def unbuffered(seed):
    manual_seed(seed)
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(3), [coupling(3)])
    assert not [b for name, b in flow.named_buffers() if "q0" not in name]
    return flow


def scores(flow):
    points = torch.linspace(-1, 1, 4 * flow.q0.n_dim * flow.q0.d).view(4, -1)
    return nfp.FlowDistribution(flow).log_prob(points)


def test_whole_modules_in_a_file(tmp_path):
    first, second = shuffled(1), shuffled(2)
    assert not torch.allclose(scores(first), scores(second))
    nfp.save(first, tmp_path / "flow.safetensors")
    nfp.load(second, tmp_path / "flow.safetensors")
    assert torch.equal(scores(first), scores(second))
    transform = nfp.FlowTransform(list(first.flows))
    other = nfp.FlowTransform(list(shuffled(3).flows))
    nfp.save(transform, tmp_path / "transform.safetensors")
    nfp.load(other, tmp_path / "transform.safetensors")
    z = torch.randn(3, 6)
    assert torch.equal(transform(z), other(z))


def train(flow, steps=2):
    """Train by Pyro, registered by nfp.module."""

    def guide():
        nfp.module("flow", flow)
        pyro.sample("x", nfp.FlowDistribution(flow))

    def model():
        shape = nfp.FlowDistribution(flow).event_shape
        pyro.sample("x", dist.Normal(torch.ones(shape), 1.0).to_event(1))

    svi = infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), infer.Trace_ELBO())
    return [svi.step() for _ in range(steps)]


@pytest.fixture
def stored(tmp_path):
    """Train a flow, save the parameter store, clear it and load it."""

    def store(flow):
        train(flow)
        pyro.get_param_store().save(tmp_path / "store")
        pyro.clear_param_store()
        pyro.get_param_store().load(tmp_path / "store")

    return store


@pytest.fixture
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_one_module_in_one_process_is_silent(silence):
    flow = shuffled(1)
    train(flow)
    train(flow)
    assert nfp.module("flow", flow, update_module_params=True) is flow


def test_cold_layers_that_start_by_data_are_silent(silence):
    flow = nf.NormalizingFlow(base(2), [nf.flows.ActNorm((2,))])
    train(flow, 3)


def test_store_into_a_model_with_other_buffers_warns(stored):
    first, second = shuffled(1), shuffled(2)
    stored(first)
    with pytest.warns(ParamStoreWarning, match="other buffers"):
        nfp.module("flow", second, update_module_params=True)
    # Which is what would have happened in silence.
    assert not torch.allclose(scores(first), scores(second))


def test_store_into_a_model_with_the_same_buffers_is_silent_and_right(silence, stored):
    first, second = shuffled(1), shuffled(1)
    stored(first)
    nfp.module("flow", second, update_module_params=True)
    assert torch.equal(scores(first), scores(second))


def test_store_into_a_model_without_buffers_is_silent_and_right(silence, stored):
    first, second = unbuffered(1), unbuffered(2)
    stored(first)
    nfp.module("flow", second, update_module_params=True)
    torch.testing.assert_close(scores(first), scores(second))


def test_store_that_is_not_taken_over_warns(stored):
    first, second = shuffled(1), shuffled(2)
    stored(first)
    before = scores(second)
    with pytest.warns(ParamStoreWarning, match="update_module_params=True"):
        nfp.module("flow", second)
    assert torch.equal(before, scores(second))


def train_by_pyro(flow, update=False):
    """Train, registered by pyro.module."""

    def guide():
        pyro.module("flow", flow, update_module_params=update)
        pyro.sample("x", nfp.FlowDistribution(flow))

    def model():
        pyro.sample("x", dist.Normal(torch.ones(flow.q0.d), 1.0).to_event(1))

    svi = infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), infer.Trace_ELBO())
    return [svi.step() for _ in range(2)]


@pytest.mark.parametrize("seed", [1, 2])
def test_a_distribution_says_by_itself_that_the_store_has_lost_buffers(seed, tmp_path):
    first, second = shuffled(1), shuffled(seed)
    train_by_pyro(first)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ParamStoreWarning)
        train_by_pyro(second, update=True)
        train_by_pyro(second, update=True)
    lost = [w for w in caught if w.category is ParamStoreWarning]
    # Once, and only where the permutations are others.
    assert len(lost) == (seed != 1)
    assert all("other buffers" in str(w.message) for w in lost)


def test_a_module_that_takes_over_a_second_store_is_compared_again(tmp_path):
    first, second = shuffled(1), shuffled(2)
    train_by_pyro(first)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    train_by_pyro(second)
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    with pytest.warns(ParamStoreWarning, match="other buffers"):
        train_by_pyro(second, update=True)


def test_store_that_pyro_itself_filled_warns_that_it_cannot_be_told():
    first, second = shuffled(1), shuffled(1)
    pyro.module("flow", first)
    with pytest.warns(ParamStoreWarning, match="keeps no buffers"):
        nfp.module("flow", second, update_module_params=True)


@pytest.mark.parametrize("register", [pyro.module, nfp.module])
@pytest.mark.parametrize("kind", ["distribution", "transform"])
def test_parameters_that_are_not_contiguous_are_trained(kind, register):
    """Pyro's store trains a copy of them, which no layer uses."""
    manual_seed(0)
    layer = nf.flows.InvertibleAffine(3, use_lu=False)
    before = layer.W.detach().clone()
    flow = nf.NormalizingFlow(base(3), [layer])
    trained = nfp.FlowTransform(layer) if kind == "transform" else flow
    normal = dist.Normal(torch.zeros(3), 1.0).to_event(1)

    def guide():
        register("trained", trained)
        if kind == "transform":
            pyro.sample("x", dist.TransformedDistribution(normal, trained))
        else:
            pyro.sample("x", nfp.FlowDistribution(flow))

    svi = infer.SVI(
        lambda: pyro.sample("x", normal), guide, pyro.optim.Adam({"lr": 0.01}), infer.Trace_ELBO()
    )
    for _ in range(3):
        svi.step()
    assert (layer.W - before).abs().min() > 1e-3


def test_a_guide_without_parameters_is_neither_saved_nor_loaded(tmp_path):
    guide = nfp.AutoFlow(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
    errors = pytest.importorskip("normflows_injective.errors")
    with pytest.raises(errors.CheckpointError, match="build"):
        nfp.save(guide, tmp_path / "guide.safetensors")
    with pytest.raises(errors.CheckpointError, match="build"):
        nfp.load(guide, tmp_path / "guide.safetensors")

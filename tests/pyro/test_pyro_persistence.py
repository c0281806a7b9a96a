"""Copies, files and the parameter store."""

from __future__ import annotations

import copy
import math
import warnings

import normflows as nf
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from support.models import base, coupling, pickled
from support.pyro_registry import LAWS, build
from support.seeds import manual_seed

import normflows_injective.pyro as nfp
from normflows_injective.errors import CheckpointError, ParamStoreWarning, RegistrationError

TRAINED = [name for name, case in LAWS.items() if case.has_rsample]


def step(module, law):
    """One step, after which a draw is remembered and its graph alive."""
    x = law.rsample((4,))
    law.log_prob(x).sum().backward()
    torch.optim.SGD(module.parameters(), lr=1e-3).step()
    return x


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert (layer.W - before).abs().mean() > 1e-3


def test_a_guide_without_parameters_is_neither_saved_nor_loaded(tmp_path):
    guide = nfp.AutoFlow(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
    with pytest.raises(CheckpointError, match="build"):
        nfp.save(guide, tmp_path / "guide.safetensors")
    with pytest.raises(CheckpointError, match="build"):
        nfp.load(guide, tmp_path / "guide.safetensors")


# Names that are taken.


def three_numbers():
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x, 0.1).to_event(1), obs=torch.ones(3))


GUIDES = {
    "AutoFlow": lambda: nfp.AutoFlow(three_numbers),
    "AutoInjective": lambda: nfp.AutoInjective(three_numbers, 1),
}


def fit(guide, steps=2, optimiser=None):
    """How many parameters of a guide are moved by some steps."""
    optimiser = optimiser or pyro.optim.Adam({"lr": 0.02})
    before = [p.detach().clone() for p in guide.build().parameters()]
    svi = infer.SVI(three_numbers, guide, optimiser, infer.Trace_ELBO())
    for _ in range(steps):
        svi.step()
    return sum(not torch.equal(a, p) for a, p in zip(before, guide.parameters(), strict=True))


@pytest.fixture(params=GUIDES)
def make(request):
    return GUIDES[request.param]


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_the_next_guide_trains_when_the_last_is_gone(make, shared, silence):
    """A cell of a notebook that is run again, with the optimiser in it or in another."""
    optimiser = pyro.optim.Adam({"lr": 0.02}) if shared else None
    num_trained = [fit(make(), optimiser=optimiser) for _ in range(3)]
    assert num_trained[0] > 0
    assert num_trained == [num_trained[0]] * 3
    guide = make()
    fit(guide, 1)
    own = {id(parameter) for parameter in guide.parameters()}
    store = pyro.get_param_store()
    assert {id(v) for n, v in store._params.items() if "digest" not in n} == own


@pytest.mark.slow
def test_a_guide_beside_a_living_one_is_refused_in_training(make):
    first, second = make(), make()
    fit(first)
    with pytest.raises(RegistrationError, match="cannot be trained.*clear_param_store"):
        fit(second)
    # Which harms nothing: the first goes on, and the second draws, scores and is built.
    assert fit(first) > 0
    second.build().sample_posterior(2)
    pyro.clear_param_store()
    assert fit(second) > 0
    with pytest.raises(RegistrationError):
        fit(first)


@pytest.mark.slow
def test_guides_that_were_trained_in_turn_are_compared_in_silence(make, silence):
    guides = []
    for _ in range(2):
        pyro.clear_param_store()
        guides.append(make())
        fit(guides[-1])
    for guide in guides:
        assert math.isfinite(infer.Trace_ELBO().loss(three_numbers, guide))
        infer.Predictive(three_numbers, guide=guide, num_samples=2)()


@pytest.mark.slow
def test_an_untrained_guide_beside_a_living_one_warns_where_it_draws(make):
    first, second = make(), make()
    fit(first)
    with pytest.warns(ParamStoreWarning, match="not be trained by SVI"):
        second()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        make()()


@pytest.mark.slow
def test_a_store_from_a_file_is_not_overwritten_by_a_guide(make, tmp_path):
    fit(make())
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    before = {name: value.clone() for name, value in pyro.get_param_store().items()}
    with pytest.raises(RegistrationError, match="from a file"):
        fit(make())
    assert all(torch.equal(v, before[n]) for n, v in pyro.get_param_store().items())


@pytest.mark.slow
def test_a_guide_goes_on_after_its_store_was_cleared(make, silence):
    guide = make()
    fit(guide)
    pyro.clear_param_store()
    assert fit(guide) > 0


@pytest.mark.slow
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_of_a_guide_take_over_when_the_original_is_gone(make, duplicate, silence):
    guide = make()
    fit(guide)
    copied = duplicate(guide)
    copied._model = guide._model
    del guide
    assert fit(copied) > 0


@pytest.mark.slow
def test_guides_in_lists_and_modules(silence):
    """Names of parts start with those of the whole."""

    def listed():
        guide = infer.autoguide.AutoGuideList(three_numbers)
        guide.append(nfp.AutoFlow(three_numbers))
        return guide

    num_trained = []
    for _ in range(2):
        guide = listed()
        guide()
        num_trained.append(fit(guide[0].build(), 0) + fit_list(guide))
        del guide
    assert num_trained[0] == num_trained[1] > 0


def fit_list(guide):
    before = [p.detach().clone() for p in guide.parameters()]
    svi = infer.SVI(three_numbers, guide, pyro.optim.Adam({"lr": 0.02}), infer.Trace_ELBO())
    svi.step()
    return sum(not torch.equal(a, p) for a, p in zip(before, guide.parameters(), strict=True))


def test_the_next_module_trains_when_the_last_is_gone(silence):
    num_trained = []
    for seed in (1, 2):
        flow = shuffled(seed)
        before = [p.detach().clone() for p in flow.parameters()]
        train(flow)
        now = flow.parameters()
        num_trained.append(sum(not torch.equal(a, p) for a, p in zip(before, now, strict=True)))
        del flow, now
    assert num_trained[0] == num_trained[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("trains", [train, train_by_pyro])
def test_a_module_beside_a_living_one_is_refused_in_training(trains):
    first, second = shuffled(1), shuffled(2)
    trains(first)
    before = scores(second)
    with pytest.raises(RegistrationError, match="other parameters under the name 'flow'"):
        trains(second)
    assert torch.equal(scores(second), before)
    trains(first)


def test_a_transform_under_a_taken_name_is_refused_in_training():
    normal = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    transforms = []
    for _ in range(2):
        transform = nfp.FlowTransform([coupling(3)])

        def guide(transform=transform):
            pyro.module("transform", transform)
            pyro.sample("x", dist.TransformedDistribution(normal, transform))

        svi = infer.SVI(
            lambda: pyro.sample("x", normal),
            guide,
            pyro.optim.Adam({"lr": 0.1}),
            infer.Trace_ELBO(),
        )
        if transforms:
            with pytest.raises(RegistrationError, match="This FlowTransform cannot be trained"):
                svi.step()
        else:
            svi.step()
        transforms.append(transform)


def test_a_frozen_module_beside_a_living_one_is_not_refused(silence):
    train(shuffled(1))
    frozen = shuffled(2).requires_grad_(False).eval()
    law = nfp.FlowDistribution(frozen)

    def guide():
        pyro.module("flow", frozen)
        loc = pyro.param("loc", torch.zeros(6))
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1))

    def model():
        pyro.sample("x", law)

    infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), infer.Trace_ELBO()).step()

"""The record of a model's options: what is in it, what is not, and what a difference does."""

from __future__ import annotations

import enum
import functools
import json
import math
import threading
import warnings

import normflows as nf
import numpy as np
import pytest
import torch
from support.constructed import arguments_of
from support.models import base, mlp_injection, model
from support.seeds import manual_seed
from torch import nn

import normflows_injective as nfi
from normflows_injective.checkpoints import load_checkpoint, save_checkpoint
from normflows_injective.checkpoints.options import differences, options_of
from normflows_injective.errors import CheckpointError, CheckpointWarning
from normflows_injective.flows import SphereChart
from normflows_injective.flows.assignment import FiniteHorizon, InfiniteHorizon
from normflows_injective.nets.fields import DenseField


class Holder(nn.Module):
    """A module of a user, with any attributes."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


def found(saved, here):
    """Differences, after the saved options went through JSON."""
    values = {path: options.values for path, options in options_of(saved).items()}
    through = json.loads(json.dumps(values, allow_nan=False))
    return list(differences(through, options_of(here)))


def scaled(factor):
    return lambda x: factor * x


def power(x, exponent=2):
    return x**exponent


DIFFERENT = {
    "numbers": (1, 2),
    "floats by one rounding in many": (0.1, 0.1 + 1e-10),
    "infinite": (1.0, math.inf),
    "nan": (0.0, math.nan),
    "strings": ("a", "b"),
    "flags": (True, False),
    "none": (None, 2.0),
    "tuples": ((1, 2), (1, 3)),
    "lengths": ((1, 2), (1, 2, 2)),
    "nested": ({"a": [(1, 2.0)]}, {"a": [(1, 3.0)]}),
    "numpy": (np.float64(1.0), np.float64(2.0)),
    "arrays": (np.arange(3), np.arange(3)[::-1].copy()),
    "enums": (Colour.RED, Colour.BLUE),
    "masks": (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])),
    "tables": (torch.linspace(0, 1, 5), torch.linspace(0, 1, 5) + 1e-3),
    "infinite masks": (torch.tensor([0.0, -math.inf]), torch.tensor([-math.inf, 0.0])),
    "long permutations": (torch.arange(10**5), torch.arange(10**5).roll(1)),
    "functions": (torch.tanh, torch.sigmoid),
    "functions of Python": (nn.functional.silu, nn.functional.gelu),
    "captured numbers": (scaled(1.0), scaled(2.0)),
    "partial": (functools.partial(power, exponent=2), functools.partial(power, exponent=3)),
    "classes": (nn.Tanh, nn.SiLU),
    "transforms": (nfi.flows.coupling.Affine(1.0), nfi.flows.coupling.Affine(2.0)),
    "laws": (torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.0, 2.0)),
    "sets": ({1, 2}, {1, 3}),
    "slices": (slice(1, 2), slice(1, 3)),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_difference_is_found(name):
    first, second = DIFFERENT[name]
    assert not found(Holder(option=first), Holder(option=first))
    assert any(one.matters for one in found(Holder(option=first), Holder(option=second)))
    assert any(one.matters for one in found(Holder(option=second), Holder(option=first)))


EQUAL = {
    "kinds of numbers": (1, 1.0),
    "flags of numpy": (np.bool_(True), True),
    "reversed arrays": (np.arange(3)[::-1], torch.tensor([2, 1, 0])),
    "numpy": (np.float32(0.5), 0.5),
    "a tensor of one number": (torch.tensor(0.5), 0.5),
    "lists and tuples": ([1, 2], (1, 2)),
    "nan": (math.nan, float("nan")),
    "infinity": (math.inf, np.inf),
    "precisions": (torch.linspace(0, 1, 7).sin(), torch.linspace(0, 1, 7).double().sin()),
    "masks": (torch.tensor([True, False]), torch.tensor([1.0, 0.0])),
    "lambdas": (lambda x: x, lambda x: x),
    "names": (torch.tanh, nn.functional.tanh),
    "devices": (torch.device("cpu"), torch.device("meta")),
    "dtypes": (torch.float32, torch.float64),
    "objects of others": (object(), object()),
    "rounding of another processor": (math.sin(0.3), math.nextafter(math.sin(0.3), 1)),
    "a table that is filled later": (None, torch.ones(3)),
}


@pytest.mark.parametrize("name", EQUAL)
def test_what_is_the_same_is_no_difference(name):
    first, second = EQUAL[name]
    assert not found(Holder(option=first), Holder(option=second))
    assert not found(Holder(option=second), Holder(option=first))


def test_floats_come_back_exactly():
    values = torch.rand(1000, dtype=torch.float64).mul(40).exp().tolist()
    assert json.loads(json.dumps(options_of(Holder(option=values))[""].values))["option"] == values


@pytest.mark.slow
def test_a_record_does_not_fail_on_anything_that_a_module_may_hold():
    things = Holder(a=iter([]), b=torch.Generator(), c=open, d=threading.Lock())
    things.e = [np.array([None]), np.float64]
    things.f = things.__dict__
    things.g = [things]
    things.h = torch.zeros(2, device="meta")
    things.i = torch.eye(2).to_sparse()
    things.j = torch.zeros(3, dtype=torch.complex64)
    json.dumps(options_of(things)[""].values, allow_nan=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer releases of torch advise against it
        scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Softplus(3.0)))
    exported = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)).module()
    for other in (scripted, exported, torch.compile(nn.Linear(2, 2)), nn.LSTM(2, 2)):
        assert not found(other, other)


def test_what_torch_keeps_for_itself_is_no_option():
    first, second = model(), model()
    first.eval()
    first.register_forward_hook(lambda *_: None)
    first.flows[0].encoder._cache = 3
    first.forward_kld(torch.randn(4, 5)).backward()
    assert not found(first, second)


@pytest.mark.slow
def test_flags_of_first_data_are_no_options(tmp_path):
    def build():
        norms = [nf.flows.ActNorm((5,)), nfi.flows.coupling.ActNorm(5)]
        return nfi.InjectiveNormalizingFlow(base(2), [mlp_injection(), *norms])

    warm = build()
    warm.forward_kld(torch.randn(16, 5))
    warm.save(tmp_path / "warm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build().load(tmp_path / "warm")
        build().save(tmp_path / "cold")
        warm.load(tmp_path / "cold")


def test_buffers_outside_of_the_state_are_compared():
    def build(order):
        module = nn.Module()
        module.register_buffer("order", torch.tensor(order), persistent=False)
        return module

    assert not found(build([0, 1]), build([0, 1]))
    (one,) = found(build([0, 1]), build([1, 0]))
    assert one.option == "order"


def test_a_private_attribute_that_is_an_argument_is_an_option():
    class Layer(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self._scale, self._calls = scale, scale

    assert [one.option for one in found(Layer(1.0), Layer(2.0))] == ["_scale"]


def test_an_argument_that_is_none_or_a_table_is_an_option():
    class Layer(nn.Module):
        def __init__(self, mask=None):
            super().__init__()
            self.mask = mask

    assert found(Layer(), Layer(torch.ones(2)))[0].matters


def test_attributes_that_one_side_lacks():
    first, second = Holder(a=1), Holder(a=1, b=2)
    # Whether it matters is not known, so it is told; libraries add attributes by themselves.
    assert [(one.option, one.matters) for one in found(first, second)] == [("b", False)]
    values = {"": {"beta": 1.0, "threshold": 20.0, "of another release": 1}}
    assert not list(differences(values, options_of(nn.Softplus())))
    assert not list(differences({"": {"beta": 1.0}}, options_of(nn.Softplus())))


def test_modules_that_are_shared(tmp_path):
    shared = nn.Softplus(2.0)
    save_checkpoint(nn.Sequential(shared, nn.Linear(2, 2), shared), tmp_path / "model")
    other = nn.Softplus(2.0)
    load_checkpoint(nn.Sequential(other, nn.Linear(2, 2), other), tmp_path / "model")


def test_what_a_class_or_a_module_says_may_differ(tmp_path):
    class Layer(nn.Module):
        may_differ = frozenset({"temperature"})

        def __init__(self, temperature, width):
            super().__init__()
            self.temperature, self.width = temperature, width

    save_checkpoint(Layer(1.0, 2), tmp_path / "layer")
    text = "'temperature' of 'the model' is 1.0 in the file"
    with pytest.warns(CheckpointWarning, match=text) as caught:
        load_checkpoint(Layer(2.0, 2), tmp_path / "layer")
    assert caught[0].filename == __file__
    with pytest.raises(CheckpointError, match=r"'width' .*Layer.may_differ = \{...\}"):
        load_checkpoint(Layer(1.0, 3), tmp_path / "layer")
    other = Layer(1.0, 3)
    other.may_differ = {"width"}
    with pytest.warns(CheckpointWarning, match="'width'"):
        load_checkpoint(other, tmp_path / "layer")


def test_an_error_names_module_option_and_both_values(tmp_path):
    def build(kind):
        return nfi.InjectiveNormalizingFlow(base(2), [SphereChart(3, kind)])

    build("cot").save(tmp_path / "model")
    expected = r"'kind' of 'flows.0' \(SphereChart\) is 'cot' in the file and 'stereographic' here"
    with pytest.raises(CheckpointError, match=expected):
        build("stereographic").load(tmp_path / "model")


# --- options of the training ---------------------------------------------------------------------

TRAINING = {
    "beta": lambda step: 1.0 + step,
    "num_probes": 2,
    "estimator": "decoder",
    "probes": "gaussian",
    "warmup_steps": (1, 2),
    "input_noise": 0.1,
    "latent_cycle": 0.5,
}


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_option_that_differs_is_a_warning(name, tmp_path):
    model(likelihood=nfi.SurrogateLikelihood()).save(tmp_path / "model")
    other = model(likelihood=nfi.SurrogateLikelihood(**{name: TRAINING[name]}))
    with pytest.warns(CheckpointWarning, match=f"'{name}' of 'likelihood'"):
        other.load(tmp_path / "model")
    other.save(tmp_path / "other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(likelihood=nfi.SurrogateLikelihood(**{name: TRAINING[name]})).load(
            tmp_path / "other"
        )


@pytest.mark.parametrize("name", ["encoder", "decoder", "on_manifold"])
def test_estimators_are_known_by_their_names_in_older_files(name):
    here = options_of(model(likelihood=nfi.SurrogateLikelihood(estimator=name)))
    saved = {path: dict(options.values) for path, options in here.items()}
    before = saved["likelihood"]["estimator"]
    saved["likelihood"]["estimator"] = before.removesuffix("Surrogate")
    assert saved["likelihood"]["estimator"] != before
    assert not list(differences(saved, here))


@pytest.mark.parametrize("kind", [nfi.SurrogateLikelihood, nfi.ExactLikelihood])
def test_every_option_of_a_training_term_may_differ(kind):
    assert set(arguments_of(kind.__init__)) <= kind.may_differ


def test_points_off_the_manifold_are_a_matter_of_policy(tmp_path):
    def build(policy):
        return nfi.InjectiveNormalizingFlow(base(2), [SphereChart(3, off_manifold=policy)])

    build("reject").save(tmp_path / "model")
    with pytest.warns(CheckpointWarning, match="'off_manifold' of 'flows.0'"):
        build("project").load(tmp_path / "model")


def test_dropout_is_an_option_of_the_training(tmp_path):
    save_checkpoint(nn.Dropout(0.1), tmp_path / "model")
    with pytest.warns(CheckpointWarning, match="'p'"):
        load_checkpoint(nn.Dropout(0.2), tmp_path / "model")


HORIZONS = {
    "end": (InfiniteHorizon(end=9.0), CheckpointWarning),
    "time_rate": (InfiniteHorizon(time_rate=0.3), CheckpointWarning),
    "scale": (InfiniteHorizon(scale=0.7), CheckpointError),
    "horizon": (FiniteHorizon(), CheckpointError),
}


@pytest.mark.parametrize("name", HORIZONS)
def test_another_horizon(name, tmp_path):
    def build(horizon):
        return nfi.AssignmentFlow(DenseField(2, 2, (4,)), 2, 2, horizon)

    horizon, expected = HORIZONS[name]
    build("infinite").save(tmp_path / "flow")
    catch = pytest.warns if issubclass(expected, Warning) else pytest.raises
    with catch(expected, match=name):
        build(horizon).load(tmp_path / "flow")


def test_random_tables_of_another_seed_do_not_load_in_silence(tmp_path):
    class Shuffle(nn.Module):
        def __init__(self):
            super().__init__()
            self.order = torch.randperm(50)

    first = Shuffle()
    manual_seed(5)
    save_checkpoint(first, tmp_path / "model")
    with pytest.raises(CheckpointError, match="'order'"):
        load_checkpoint(Shuffle(), tmp_path / "model")


@pytest.mark.slow
def test_a_skeleton_takes_the_file_of_what_was_fitted(tmp_path):
    regression = nfi.diagnostics.MomentRegression((8,), steps=10)

    def build(flows):
        return nf.NormalizingFlow(nf.distributions.DiagGaussian(2), flows)

    def trainer(step_size):
        return nfi.diagnostics.LayerwiseTrainer(
            2, step_size, max_layers=2, stop_errors=None, regression=regression
        )

    x = torch.randn(400, 2) @ torch.tensor([[1.0, 0.5], [0.0, 1.0]]) + 1
    fitted = build(trainer(0.5).fit(x).flows)
    save_checkpoint(fitted, tmp_path / "model")
    again = build(trainer(0.5).skeleton(2))
    load_checkpoint(again, tmp_path / "model")
    assert torch.equal(again.log_prob(x), fitted.log_prob(x))
    with pytest.raises(CheckpointError, match="'step_size' of 'flows.0'"):
        load_checkpoint(build(trainer(0.3).skeleton(2)), tmp_path / "model")

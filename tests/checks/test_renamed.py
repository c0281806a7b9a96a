"""Old names of arguments, attributes and recorded options go on working, with a warning."""

from __future__ import annotations

import warnings
from inspect import signature

import pytest
import torch
from support.seeds import manual_seed, seeded_generator
from torch import nn

import normflows_injective as nfi
from normflows_injective.checkpoints import load_checkpoint, save_checkpoint
from normflows_injective.checkpoints.options import differences, options_of
from normflows_injective.checks import RenamedAttribute, checks_arguments_of, renamed
from normflows_injective.errors import CheckpointWarning, OptionError
from normflows_injective.flows.kernel import (
    KernelCoupling,
    KernelExpansion,
    ferumal_glow,
    ferumal_realnvp,
)

Z = torch.randn(120, 3, generator=seeded_generator(0))
REGRESSION = nfi.diagnostics.MomentRegression((4,), steps=2)

# Old and new name, and a call that takes the argument by either.
ARGUMENTS = [
    ("n_probes", "num_probes", lambda **given: nfi.SurrogateLikelihood(**given).num_probes),
    (
        "n_probes",
        "num_probes",
        lambda **given: nfi.volume.draw_probes(kind="gaussian", z=Z, **given),
    ),
    (
        "n_probes",
        "num_probes",
        lambda **given: nfi.volume.log_volume(nn.Tanh(), Z, method="lanczos", **given)[0],
    ),
    ("n_auxiliary", "num_auxiliary", lambda **given: KernelExpansion(2, 1, **given).points),
    ("n_auxiliary", "num_auxiliary", lambda **given: KernelCoupling(3, **given).num_auxiliary),
    ("n_auxiliary", "num_auxiliary", lambda **given: ferumal_glow(3, 1, **given)[0].num_auxiliary),
    (
        "n_auxiliary",
        "num_auxiliary",
        lambda **given: ferumal_realnvp(3, 1, **given)[0].num_auxiliary,
    ),
    (
        "n_rotations",
        "num_rotations",
        lambda **given: (
            nfi.diagnostics.coupling_gap(Z, num_folds=2, regression=REGRESSION, **given).gap
        ),
    ),
    (
        "n_folds",
        "num_folds",
        lambda **given: (
            nfi.diagnostics.coupling_gap(Z, num_rotations=1, regression=REGRESSION, **given).gap
        ),
    ),
]


@pytest.mark.parametrize(("old", "new", "call"), ARGUMENTS)
def test_an_old_argument_is_passed_on_with_a_warning(old, new, call):
    manual_seed(0)
    expected = call(**{new: 2})
    manual_seed(0)
    with pytest.warns(FutureWarning, match=f"{old!r} of .* is now {new!r}.* goes in version 0.3"):
        actual = call(**{old: 2})
    assert torch.equal(torch.as_tensor(actual), torch.as_tensor(expected))
    with pytest.raises(OptionError, match=f"under its old name {old} too"):
        call(**{old: 2, new: 2})
    with pytest.warns(FutureWarning), pytest.raises(OptionError, match=f"^{new} must be"):
        call(**{old: 1.5})


ATTRIBUTES = [
    (nfi.SurrogateLikelihood(), "n_probes", "num_probes"),
    (KernelExpansion(2, 1, 3), "n_auxiliary", "num_auxiliary"),
    (KernelCoupling(3, 3), "n_auxiliary", "num_auxiliary"),
]


@pytest.mark.parametrize(("owner", "old", "new"), ATTRIBUTES)
def test_an_old_attribute_is_the_new_one(owner, old, new):
    with pytest.warns(FutureWarning, match=f"{old!r} of {type(owner).__name__} is now {new!r}"):
        assert getattr(owner, old) == getattr(owner, new)
    with pytest.warns(FutureWarning, match="Use num_"):
        setattr(owner, old, 2)
    assert getattr(owner, new) == 2
    assert old not in vars(owner)
    assert isinstance(vars(type(owner))[old], RenamedAttribute)


def test_the_warning_points_at_the_caller_and_signatures_have_the_new_names():
    with pytest.warns(FutureWarning) as caught:
        assert nfi.SurrogateLikelihood(n_probes=1).n_probes == 1
    assert [warning.filename for warning in caught] == [__file__, __file__]
    assert list(signature(nfi.SurrogateLikelihood).parameters)[:2] == ["beta", "num_probes"]


def test_checks_see_the_new_name_in_either_order_of_decorators():
    @checks_arguments_of
    class Layer:
        @renamed(n_parts="num_parts")
        def __init__(self, num_parts: int) -> None:
            self.num_parts = num_parts

    with pytest.raises(OptionError, match="num_parts must be a positive integer"):
        Layer(0)
    with pytest.warns(FutureWarning), pytest.raises(OptionError, match="num_parts must be a posi"):
        Layer(n_parts=0)


def old_layer() -> nn.Module:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n_parts = 2

    return Layer()


def new_layer(num_parts: int) -> nn.Module:
    class Layer(nn.Module):
        n_parts = RenamedAttribute("num_parts")
        may_differ = frozenset({"num_parts"})

        def __init__(self) -> None:
            super().__init__()
            self.num_parts = num_parts

    return Layer()


def test_a_layer_of_a_user_loads_what_was_recorded_under_an_old_name(tmp_path):
    save_checkpoint(old_layer(), tmp_path / "old")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(new_layer(2), tmp_path / "old")
    with pytest.warns(CheckpointWarning, match="'num_parts' of 'the model' is 2 in the file and"):
        load_checkpoint(new_layer(3), tmp_path / "old")


@pytest.mark.parametrize(
    "build",
    [
        lambda number: nfi.SurrogateLikelihood(1.0, number),
        lambda number: KernelCoupling(3, number),
    ],
)
def test_layers_load_what_was_recorded_under_an_old_name(build):
    old = {"num_probes": "n_probes", "num_auxiliary": "n_auxiliary"}
    recorded = {
        path: {old.get(name, name): value for name, value in options.values.items()}
        for path, options in options_of(build(2)).items()
    }
    assert not list(differences(recorded, options_of(build(2))))
    different = {one.option for one in differences(recorded, options_of(build(3)))}
    assert different
    assert different <= set(old)

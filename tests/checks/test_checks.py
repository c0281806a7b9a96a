"""One vocabulary of checks: what each takes, what it gives back, what it says when it refuses."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.overrides import TorchFunctionMode

import normflows_injective as nfi
from normflows_injective import checks
from normflows_injective.checks.sizes import as_size, expanded_size
from normflows_injective.checks.tensors import check_kind, check_level, check_mask, check_type
from normflows_injective.errors import DtypeError, NonFiniteError, OptionError, ShapeError

NO_NUMBERS = (None, "2", [2], (2,), {}, True, np.bool_(True), torch.tensor(True), 2j, object())
COUNTS = (3, np.int64(3), np.int32(3), np.uint8(3), torch.tensor(3), np.array(3))
REALS = (0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5), np.array(0.5), Fraction(1, 2))
REAL_CHECKS = (
    checks.check_real,
    checks.check_positive,
    checks.check_not_negative,
    checks.check_probability,
)


@pytest.mark.parametrize("value", COUNTS, ids=repr)
def test_counts_of_every_library_become_plain(value):
    for found in (checks.check_count(value, "n"), *checks.check_counts([value], "n")):
        assert type(found) is int
        assert found == 3
    assert checks.check_shape(value, "n") == checks.check_shape((value,), "n") == (3,)
    json.dumps(checks.check_shape((value, value), "n"))
    assert type(checks.check_positive(value, "n")) is int


@pytest.mark.parametrize("check", REAL_CHECKS)
@pytest.mark.parametrize("value", REALS, ids=repr)
def test_reals_of_every_library_become_plain(check, value):
    found = check(value, "x")
    assert type(found) is float
    assert found == 0.5


@pytest.mark.parametrize("check", [checks.check_count, *REAL_CHECKS])
@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: type(value).__name__)
def test_what_is_no_number_is_refused_by_name(check, value):
    with pytest.raises(OptionError, match=r"^scale must be .*, got .*\. Give "):
        check(value, "scale")


@pytest.mark.parametrize("check", REAL_CHECKS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_numbers_that_are_not_finite_are_refused(check, value):
    with pytest.raises(OptionError, match=r"^scale must be .*(nan|inf)"):
        check(value, "scale")


@pytest.mark.parametrize("value", [0, -1, 2.0, 10**30, math.nan, torch.tensor(2.0)])
def test_what_is_no_count(value):
    with pytest.raises(OptionError, match="^dim must be "):
        checks.check_count(value, "dim")


def test_ranges_are_in_the_message():
    with pytest.raises(OptionError, match="an integer of at least 2, got 1"):
        checks.check_count(1, "dim", least=2)
    with pytest.raises(OptionError, match="an integer from 1 to 4, got 5"):
        checks.check_count(5, "bits", most=4)
    with pytest.raises(OptionError, match=r"a non-negative integer, got -1\. Leave it out"):
        checks.check_count(-1, "context_dim", least=0, advice="Leave it out.")
    assert checks.check_count(0, "context_dim", least=0) == 0
    for value in (0, 1, -0.5, 1.5):
        with pytest.raises(OptionError, match="between 0 and 1"):
            checks.check_probability(value, "error")
    with pytest.raises(OptionError, match="positive number"):
        checks.check_positive(0, "level")
    with pytest.raises(OptionError, match="finite and not negative"):
        checks.check_not_negative(-1e-9, "beta")


@pytest.mark.parametrize("value", [[8, 4], (8, 4), np.array([8, 4]), torch.tensor([8, 4])])
def test_sequences_of_counts(value):
    assert checks.check_counts(value, "hidden") == checks.check_shape(value, "shape") == (8, 4)


@pytest.mark.parametrize("value", [None, "ab", {8: 1}, object(), np.ones((2, 2), int), [], [8, 0]])
def test_what_is_no_sequence_of_counts(value):
    with pytest.raises(OptionError, match=r"^hidden.* must be a "):
        checks.check_counts(value, "hidden")
    with pytest.raises(OptionError, match=r"^shape.* must be a "):
        checks.check_shape(value, "shape")


def test_one_number_in_place_of_a_tuple_says_how_to_write_it():
    with pytest.raises(OptionError, match=r"hidden=\(64,\)"):
        checks.check_counts(64, "hidden")
    assert checks.check_counts((), "hidden", empty=True) == ()
    with pytest.raises(OptionError, match=r"3 positive integers, \(channels, height, width\)"):
        checks.check_shape((28, 28), "shape", 3, "(channels, height, width)")


def test_other_options():
    assert checks.check_choice("a", ("a", "b"), "kind") == "a"
    assert checks.lookup("a", {"a": 1, "b": 2}, "kind") == 1
    assert checks.check_flag(np.bool_(False), "flag") is False
    assert checks.check_module(nn.Identity(), "net", "").__class__ is nn.Identity
    assert len(checks.check_modules(nn.ModuleList([nn.Identity()]), "flows")) == 1
    refusals = (
        (lambda: checks.check_choice(["a"], ("a",), "kind"), "kind must be one of a, got"),
        (lambda: checks.lookup(["a"], {"a": 1}, "kind"), "kind must be one of a, got"),
        (
            lambda: checks.lookup("c", {"a": 1, "b": 2}, "kind", "an object or one of {}", "Try."),
            "kind must be an object or one of a, b, got 'c'. Try.",
        ),
        (lambda: checks.check_flag(1, "flag"), "flag must be True or False, got 1"),
        (lambda: checks.check_callable(nn.Linear, "net", "Build it."), "got the class Linear"),
        (lambda: checks.check_module(3, "net", "Build it."), r"got int\. Build it"),
        (lambda: checks.check_modules(nn.Identity(), "flows"), "list of layers, got Identity"),
        (lambda: checks.check_modules([abs], "flows"), "at index 0"),
    )
    for call, text in refusals:
        with pytest.raises(OptionError, match=text):
            call()


def test_intervals_and_infinite_numbers():
    assert checks.check_interval([-1, 2.5], "log_range") == (-1, 2.5)
    assert checks.check_number(math.inf, "p") == math.inf
    with pytest.raises(OptionError, match=r"log_range must be \(low, high\)"):
        checks.check_interval((1.0, 1.0), "log_range")
    with pytest.raises(OptionError, match="p must be a number, got nan"):
        checks.check_number(math.nan, "p")


def test_tensors_that_are_refused():
    x = torch.zeros(4, 3)
    refusals = (
        (lambda: check_type([x], "x"), DtypeError, r"got list\. A loader of a TensorDataset"),
        (lambda: check_type(1.0, "mask"), DtypeError, "mask must be a tensor of booleans"),
        (lambda: check_kind(x.to(torch.complex64), "x"), DtypeError, "view_as_real"),
        (lambda: check_mask(x, "mask"), DtypeError, r"got torch.float32\. Convert it with mask"),
        (lambda: check_level("a", "level"), OptionError, "level must be a positive number"),
        (lambda: checks.check_event_shape(x, (2,), "x"), ShapeError, r"shape \(B, 2\), got \(4"),
        (lambda: checks.check_batch(x[0], "x"), ShapeError, r"x\.unsqueeze\(0\)"),
        (lambda: checks.check_same_rows(x=x, t=x[:1]), ShapeError, "every sample, 4 as x has"),
        (lambda: checks.as_floating(x.bool(), "weights"), OptionError, "got booleans"),
        (lambda: checks.as_floating([[1], []], "weights"), OptionError, "a list of numbers"),
        (lambda: as_size(3, "sample_shape"), OptionError, "must be a tuple of integers, got 3"),
        (lambda: expanded_size(Normal(x, 1.0), (2,)), ShapeError, "dimensions on the left"),
    )
    for call, error, text in refusals:
        with pytest.raises(error, match=text):
            call()
    assert check_level(2.0, "level") == 2
    assert checks.as_floating([1, 2], "weights").tolist() == [1.0, 2.0]
    assert as_size([2, 3], "sample_shape") == torch.Size([2, 3])
    assert expanded_size(Normal(0.0, 1.0), (2,)) == torch.Size([2])


def test_a_loss_that_is_not_finite_names_its_term():
    one = torch.tensor([1.0])
    checks.check_loss(one.mean(), {"volume": one})
    with pytest.raises(NonFiniteError, match="the training term volume has 1 of 1 values NaN"):
        checks.check_loss(one.mean() / 0, {"error": one, "volume": one / 0})
    with pytest.raises(NonFiniteError, match="overflowed although every term is finite"):
        checks.check_loss(one.mean() / 0, {"volume": one})


def test_long_values_are_named_by_their_type():
    class Broken:
        def __repr__(self):
            raise RuntimeError

    assert checks.describe(list(range(100))) == "list"
    assert checks.describe(torch.zeros(2, 2)) == "a Tensor of shape (2, 2) and torch.float32"
    assert checks.describe(Broken()) == "Broken"
    assert checks.describe(object()) == "object"


@pytest.mark.slow
def test_a_count_is_checked_while_a_graph_is_exported():
    class Scaled(nn.Module):
        def forward(self, x):
            return x * checks.check_count(x.shape[0], "rows")

    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        Scaled(), (torch.ones(3, 2),), dynamic_shapes=({0: batch},), strict=False
    )
    assert program.module()(torch.ones(5, 2)).unique().tolist() == [5.0]


class SeesEverything(TorchFunctionMode):
    """Note every function of torch that is called inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@checks.checks_arguments
def kept(x: torch.Tensor) -> torch.Tensor:
    return x


def test_the_look_at_tensors_is_seen_by_no_mode_and_refuses_there_as_ever():
    x = torch.zeros(2, 2)
    with SeesEverything() as mode:
        kept(x)
        assert mode.seen == []
        with pytest.raises(DtypeError, match="x must be real floating point, got torch.int64"):
            kept(x.long())
        with pytest.raises(DtypeError, match="x must be a dense tensor"):
            kept(x.to_sparse())


def test_arguments_by_keyword_may_come_in_any_order():
    additive, p, x = nfi.flows.coupling.Additive(), torch.ones(1, 2, 1), torch.ones(1, 2)
    assert additive.inverse(parameters=p, x=x)[0].equal(2 * x)
    gauge, level = nfi.flows.gauges.LpGauge(1.0), torch.tensor(2.0)
    assert gauge.log_radius(level=level, u=x).equal(gauge.log_radius(x, level))
    law = nfi.distributions.UniformOnSurface(nfi.flows.gauges.LpGauge(1.0), dim=2)
    assert law.log_prob(context=None, x=x / 2).equal(law.log_prob(x / 2))
    with pytest.raises(TypeError, match="missing"):
        gauge.log_radius(level=level)


def test_a_switch_without_a_value_is_refused_by_name():
    with pytest.raises(OptionError, match="must be True or False"):
        nfi.flows.SphereLinear(3, rotate=torch.ones((), device="meta"))

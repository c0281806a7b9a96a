"""Training within a budget: its phases, its budgets, and what it accepts."""

from __future__ import annotations

import math
import warnings
from functools import partial

import normflows as nf
import numpy as np
import pytest
import torch
from support.models import base, mlp_injection
from support.seeds import manual_seed
from support.trainings import injective, surface
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normflows_injective as nfi
from normflows_injective.training import fit


def test_the_phases_of_an_injective_flow():
    model, looks = injective(), []
    result = fit(model, surface(), steps=500, callback=looks.append)
    names = ["reconstruction", "latent density", "joint"]
    assert [phase.name for phase in result.phases] == names
    assert list(result.history) == looks
    assert 400 <= sum(phase.steps for phase in result.phases) <= 503
    for phase in result.phases:
        assert phase.after < phase.before or (phase.after == phase.before and not phase.is_kept)
    first, second, _ = result.phases
    assert first.after < 0.5 * first.before
    assert second.after < second.before
    assert result.floor == first.after
    assert model.likelihood.beta == result.beta == pytest.approx(3 * 3 / (2 * result.floor))
    assert "reconstruction floor" in str(result)


def test_a_base_with_nothing_to_train_has_no_phase_of_its_own():
    model = nfi.InjectiveNormalizingFlow(base(2), [mlp_injection()])
    phases = fit(model, surface(100), steps=20).phases
    assert [phase.name for phase in phases] == ["reconstruction", "joint"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_is_trained_where_the_caller_takes_no_gradients(mode):
    model, x = injective(), surface(100)
    with mode():
        result = fit(model, x, steps=60)
        assert not torch.is_grad_enabled()
    assert result.phases[0].after < result.phases[0].before
    model.forward_kld(x).backward()


def test_a_joint_phase_that_does_harm_is_undone():
    class Harmful(nfi.SurrogateLikelihood):
        def loss(self, terms, log_prob):
            return -super().loss(terms, log_prob)

    torch_model = nfi.InjectiveNormalizingFlow(base(2), [mlp_injection()], Harmful())
    result = fit(torch_model, surface(200), steps=120)
    *_, joint = result.phases
    assert joint.after <= joint.before
    held = surface(200)
    assert float(torch_model.reconstruction_error(held).detach().mean()) < 2 * result.floor


@pytest.mark.parametrize("steps", [1, 7, 60])
def test_budgets_in_steps_are_kept(steps):
    result = fit(injective(), surface(100), steps=steps)
    assert sum(phase.steps for phase in result.phases) <= steps + 2


def test_a_budget_in_seconds_is_shared_out():
    result = fit(injective(), surface(), seconds=1.0)
    seconds = [phase.seconds for phase in result.phases]
    # An early end may leave more to the last.
    assert sum(seconds) > 0.5
    assert all(phase.steps > 0 for phase in result.phases)


def host(dim=2):
    return nf.NormalizingFlow(base(dim), [nf.flows.AffineConstFlow((dim,))])


def test_models_of_normflows_are_trained_by_their_own_loss():
    x = 0.5 + 0.5 * torch.randn(400, 2)
    model = host()
    result = fit(model, x, steps=400, validation=x, learning_rate=0.02)
    assert [phase.name for phase in result.phases] == ["density"]
    # The best affine map of a normal leaves the entropy of the data.
    entropy = 1 + math.log(2 * math.pi) + float(x.var(0, correction=0).log().sum()) / 2
    assert result.phases[0].after == pytest.approx(entropy, abs=0.05)
    assert result.floor is None
    assert result.beta is None


def test_class_conditional_models_take_labels_as_context():
    labels = torch.arange(200) % 2
    x = torch.randn(200, 2) + 4 * labels.unsqueeze(1)
    model = nf.ClassCondFlow(nf.distributions.ClassCondDiagGaussian(2, 2), [])
    result = fit(model, x, context=labels, steps=100)
    assert result.phases[0].after < result.phases[0].before - 0.5


def test_assignment_flows_are_trained_on_labels():
    field = nfi.nets.fields.DenseField(3, 4, (16,))
    model = nfi.AssignmentFlow(field, 3, 4)
    labels = torch.randint(0, 2, (200, 3))
    result = fit(model, labels, steps=60)
    assert result.phases[0].after < result.phases[0].before


def test_conditional_injective_flows_take_a_context():
    context = torch.rand(300, 1)
    x = surface(300) * (1 + context)
    model = injective(context_dim=1)
    result = fit(model, x, context=context, steps=60, validation=(x[:50], context[:50]))
    assert result.phases[0].after < result.phases[0].before


def test_surfaces_are_trained_by_their_likelihood():
    x = nn.functional.normalize(torch.randn(200, 3) + torch.tensor([2.0, 0.0, 0.0]))
    result = fit(nfi.flows.star_like_flow(3), x, steps=50)
    assert [phase.name for phase in result.phases] == ["density"]
    assert result.phases[0].after < result.phases[0].before


def test_weights_move_the_density():
    x = torch.cat([torch.full((200, 1), -1.0), torch.full((200, 1), 1.0)])
    x = x + 0.1 * torch.randn_like(x)
    model = nfi.InjectiveNormalizingFlow(base(1), [nfi.flows.LinearInjection(1, 2)])
    weights = (x[:, 0] > 0).float()
    plane = torch.cat([x, torch.zeros_like(x)], dim=1)
    fit(model, plane, weights=weights, steps=300, validation=plane[200:], batch_size=64)
    errors = model.reconstruction_error(plane).detach()
    assert float(errors[200:].mean()) <= float(errors[:200].mean())


class Frame:
    """As much of a data frame as is read."""

    def __init__(self, values):
        self.values = values

    def to_numpy(self):
        return self.values


@pytest.mark.parametrize("kind", ["array", "float64", "frame", "loader", "pairs"])
def test_data_of_every_form(kind):
    x = surface(60)
    context = None
    data = {
        "array": x.numpy(),
        "float64": x.double(),
        "frame": Frame(x.numpy()),
        "loader": DataLoader(x, batch_size=7),
        "pairs": DataLoader(TensorDataset(x, torch.ones(60, 1)), batch_size=7),
    }[kind]
    model = injective(context_dim=1 if kind == "pairs" else 0)
    result = fit(model, data, context=context, steps=5)
    assert len(result.phases) == 3


def test_modes_and_the_order_of_rows():
    model = injective()
    model.eval()
    model.latent_block[0].train()
    before = [module.training for module in model.modules()]
    x = surface(50)
    copy = x.clone()
    fit(model, x, steps=5)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(x, copy)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({}, nfi.errors.OptionError, "Give one budget"),
        ({"steps": 5, "seconds": 1.0}, nfi.errors.OptionError, "Give one budget"),
        ({"steps": 0}, nfi.errors.OptionError, "steps must be"),
        ({"steps": 5, "validation": 1.5}, nfi.errors.OptionError, "between 0 and 1"),
        ({"steps": 5, "context": torch.ones(3, 1)}, nfi.errors.ShapeError, "context must have"),
        ({"steps": 5, "weights": torch.ones(3)}, nfi.errors.ShapeError, "weights must have"),
    ],
)
def test_wrong_options_are_refused_by_name(options, error, says):
    with pytest.raises(error, match=says):
        fit(injective(), surface(20), **options)


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (torch.full((10, 5), torch.nan), nfi.errors.NonFiniteError, "data has 50 of 50 values"),
        (torch.ones(5), nfi.errors.ShapeError, "at least two rows"),
        (np.array([["a"] * 5] * 4), nfi.errors.DtypeError, "data must hold numbers"),
        ([], nfi.errors.ShapeError, "no batches"),
    ],
)
def test_data_that_cannot_be_trained_on(data, error, says):
    with pytest.raises(error, match=says):
        fit(injective(), data, steps=5)


class Diverging(nn.Module):
    """A model whose loss is not a number at some steps."""

    def __init__(self, often):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.often, self.calls = often, 0

    def forward_kld(self, x):
        self.calls += self.training
        loss = (x.mean() - self.weight) ** 2
        return loss * torch.nan if self.training and self.calls % self.often == 0 else loss


def test_training_goes_on_from_the_best_weights_after_a_loss_that_is_no_number():
    model = Diverging(often=190)
    result = fit(model, torch.zeros(50, 1), steps=400)
    assert result.phases[0].after < 0.9
    assert math.isfinite(float(model.weight.detach()))


def test_a_training_that_diverges_again_and_again_ends_by_name():
    with pytest.raises(nfi.errors.NonFiniteError, match="diverged 9 times"):
        fit(Diverging(often=1), torch.zeros(50, 1), steps=100)


def test_rows_in_order_are_all_seen_before_any_returns():
    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.seen = nn.Parameter(torch.zeros(())), []

        def forward_kld(self, x):
            if self.training:
                self.seen += x[:, 0].tolist()
            return (self.weight - 1) ** 2

    model = Recorder()
    x = torch.arange(64.0).unsqueeze(1)
    fit(model, x, steps=8, validation=x, batch_size=16)
    assert sorted(model.seen[:64]) == sorted(model.seen[64:128]) == x[:, 0].tolist()


def test_a_wrapped_loss_trains_alike():
    models = []
    for wrap in (None, lambda module: nn.Sequential(module)[0]):
        manual_seed(1)
        models.append(injective())
        fit(models[-1], surface(60), steps=20, wrap=wrap)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_a_compiled_loss_trains_alike():
    errors = []
    for wrap in (None, partial(torch.compile, backend="aot_eager")):
        manual_seed(1)
        model = injective().double()
        fit(model, surface(60), steps=20, wrap=wrap)
        errors.append(model.reconstruction_error(surface(60).double()).detach().mean())
    torch.testing.assert_close(*errors, rtol=1e-6, atol=0)


def test_assignment_flows_take_no_weights():
    model = nfi.AssignmentFlow(nfi.nets.fields.DenseField(3, 4, (16,)), 3, 4)
    labels = torch.randint(0, 2, (20, 3))
    with pytest.raises(nfi.errors.OptionError, match="takes no weights"):
        fit(model, labels, weights=torch.ones(20), steps=5)


def test_held_out_rows_are_judged_by_their_weights():
    x = torch.cat([surface(100), 1000 + surface(100)])
    weights = (x[:, 0] < 500).float()
    result = fit(injective(), x, weights=weights, steps=20)
    assert result.phases[0].before < 100


def test_copies_of_a_row_are_on_one_side():
    """Else the held-out score would be that of rows that were trained on."""
    x = surface(50).repeat_interleave(8, 0)[torch.randperm(400)]
    seen = []

    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward_kld(self, x):
            seen.append((self.training, x.clone()))
            return (self.weight - 1) ** 2

    fit(Recorder(), x, steps=4)
    trained = torch.cat([rows for is_training, rows in seen if is_training]).unique(dim=0)
    held_out = torch.cat([rows for is_training, rows in seen if not is_training]).unique(dim=0)
    assert len(held_out) + len(trained) <= 50
    assert len(torch.cat([held_out, trained]).unique(dim=0)) == len(held_out) + len(trained)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"data": 2 * surface(60)}, "the data is"),
        ({"steps": 8}, "steps is 8 here and 6 in the file"),
        ({"batch_size": 16}, "batch_size is 16 here and 256"),
    ],
)
def test_a_checkpoint_of_other_data_or_options_is_refused(tmp_path, changed, says):
    path = tmp_path / "run.safetensors"
    options = {"data": surface(60), "steps": 6, "checkpoint": path}
    fit(injective(), **options)
    with pytest.raises(nfi.errors.CheckpointError, match=says):
        fit(injective(), **{**options, **changed})


class Typed(Frame):
    """A data frame with columns of several types."""

    def __init__(self, values, columns):
        super().__init__(values)
        self.columns = columns


def test_frames_of_several_types():
    x = surface(60)
    values = np.concatenate([x.numpy().astype(object), np.array([[True], [False]] * 30)], 1)
    names = ["a", "b", "c", "d", "e", "f"]
    model = nfi.injective_flow(Typed(values, names), 2)
    assert model.flows[-1].columns[5].name == "f"
    values[3, 1] = "two"
    with pytest.raises(nfi.errors.DtypeError, match="but column b does not"):
        nfi.injective_flow(Typed(values, names), 2)


def test_weights_are_checked_before_training():
    with pytest.raises(nfi.errors.OptionError, match="a sum above zero"):
        fit(injective(), surface(20), weights=np.zeros(20), steps=5)


def test_a_column_far_from_zero_is_warned_of():
    x = surface(60).double()
    x[:, 2] += 1e8
    model = nfi.injective_flow(x, 2)
    with pytest.warns(nfi.errors.NumericalWarning, match="1 columns of data .* Column 2 has"):
        fit(model, x, steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(nfi.injective_flow(x, 2).double(), x, steps=3)


def test_few_rows_are_not_over_fitted_before_the_first_look():
    """In a long training of few rows the first of 25 looks comes after hundreds of epochs."""
    x = surface(60)
    model = nfi.injective_flow(x, 2)
    result = fit(model, x[:40], steps=3000, validation=x[40:], batch_size=40)
    first = result.phases[0]
    looks = [check.score for check in result.history if check.phase == "reconstruction"]
    assert first.after < min(looks)

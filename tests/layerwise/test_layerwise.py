"""Layer-wise construction: what it gains, when it stops, and what it returns."""

from __future__ import annotations

import math

import normflows as nf
import pytest
import torch
from support.seeds import seeded_generator

from normflows_injective.diagnostics import LayerwiseTrainer, MomentRegression
from normflows_injective.errors import NonFiniteError, OptionError, ShapeError
from normflows_injective.flows.volume_preserving import Rotation
from normflows_injective.layerwise.block import MomentBlock

QUICK = MomentRegression((16,), steps=120, max_log_ratio=2.0)


def ring(count, seed):
    generator = seeded_generator(seed)
    radius = 1.5 + 0.1 * torch.randn(count, 1, generator=generator)
    angle = 2 * math.pi * torch.rand(count, 1, generator=generator)
    return radius * torch.cat([angle.cos(), angle.sin()], dim=1)


def held_out_loss(flows, x):
    """Mean negative log-likelihood in nats under a standard normal base."""
    total = x.new_zeros(len(x))
    with torch.no_grad():
        for flow in reversed(flows):
            x, log_det = flow.inverse(x)
            total = total + log_det
    return float((0.5 * x.square().sum(1) + math.log(2 * math.pi) - total).mean())


@pytest.mark.slow
def test_blocks_gain_what_they_say_on_new_data():
    trainer = LayerwiseTrainer(2, candidates=2, max_layers=6, regression=QUICK)
    flows, history = trainer.fit(ring(8_000, 0))
    x = ring(50_000, 1)
    losses = [held_out_loss(flows[len(flows) - 2 * k :], x) for k in range(7)]
    drops = -torch.tensor(losses).diff()
    errors = (drops - history.gains) / history.standard_errors
    assert errors.abs().max() < 6  # the greatest of six
    assert losses[0] - losses[-1] > 0.5
    assert (history.gains > 2 * history.standard_errors).all()
    assert torch.isnan(history.refused)


@pytest.mark.slow
def test_result_is_an_ordinary_flow():
    trainer = LayerwiseTrainer(2, candidates=1, max_layers=3, regression=QUICK)
    x = ring(2_000, 0).double()
    flows, _ = trainer.fit(x)
    assert [type(flow) for flow in flows] == [MomentBlock, Rotation] * 3
    assert not any(p.requires_grad for flow in flows for p in flow.parameters())
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(2, trainable=False), flows).double()
    x = x[:500]
    assert -float(model.log_prob(x).mean()) == pytest.approx(held_out_loss(flows, x))
    z = x
    for flow in reversed(flows):
        z = flow.inverse(z)[0]
    for flow in flows:
        z = flow(z)[0]
    torch.testing.assert_close(z, x, atol=1e-9, rtol=1e-9)


@pytest.mark.slow
def test_partial_step_on_a_gaussian():
    """The first gain of N(1, 4 I) is the closed form of a half step on the active coordinate."""
    z = 2 * torch.randn(40_000, 2, generator=seeded_generator(0)).double() + 1
    trainer = LayerwiseTrainer(2, candidates=1, max_layers=1, regression=QUICK)
    flows, history = trainer.fit(z)
    mean = float(flows[1].inverse(torch.ones(1, 2).double())[0][0, 1])
    scale, shift = 1 + 0.5 * (0.5 - 1), -0.5 * mean / 2
    change = 0.5 * (4 * scale**2 + (scale * mean + shift) ** 2 - 4 - mean**2) - math.log(scale)
    assert float(history.gains) == pytest.approx(-change, abs=4 * float(history.standard_errors))


@pytest.mark.slow
def test_nothing_is_added_to_a_standard_normal():
    z = torch.randn(4_000, 4, generator=seeded_generator(2))
    flows, history = LayerwiseTrainer(4, candidates=2, regression=QUICK).fit(z)
    assert len(flows) <= 4  # one in forty tries passes two standard errors by chance
    assert not history.refused > 2 * history.refused_standard_error


@pytest.mark.slow
def test_few_samples_end_early_and_do_no_harm():
    """With 2,000 points bins of all rows end at 10 nats, and held-out rows at 0.3 to 0.7."""
    x, fresh = ring(2_000, 3), ring(50_000, 4)
    flows, history = LayerwiseTrainer(2, candidates=2, regression=QUICK).fit(x)
    assert 3 < len(history.gains) < 90
    assert not history.refused > 2 * history.refused_standard_error
    drop = held_out_loss([], fresh) - held_out_loss(flows, fresh)
    # The gains that stay were chosen for being large, and up to 0.16 of their sum was luck.
    assert drop == pytest.approx(float(history.gains.sum()), abs=0.5)
    entropy = 1.35743
    assert held_out_loss(flows, fresh) - entropy < 2


@pytest.mark.slow
def test_on_top_of_given_layers():
    x = ring(2_000, 5)
    layers = [Rotation(2)]
    flows, _ = LayerwiseTrainer(2, candidates=1, max_layers=2, regression=QUICK).fit(x, layers)
    assert flows[-1] is layers[0]
    assert len(flows) == 5
    assert held_out_loss(flows, x) < held_out_loss(layers, x) - 0.1


@pytest.mark.slow
def test_given_layers_of_a_model_and_what_is_no_list_of_layers():
    x = ring(400, 5)
    trainer = LayerwiseTrainer(2, candidates=1, max_layers=1, regression=QUICK)
    layers = [Rotation(2)]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(2), layers)
    assert trainer.fit(x, model.flows).flows[-1] is layers[0]
    for wrong in (model, layers[0]):
        with pytest.raises(OptionError, match="given must be a list of layers, got"):
            trainer.fit(x, wrong)
    with pytest.raises(OptionError, match="got NormalizingFlow at index 0"):
        trainer.fit(x, [model])


@pytest.mark.slow
def test_identity_that_is_refused_has_an_error():
    z = torch.randn(400, 4, generator=seeded_generator(11))
    seen = []
    for seed in range(4):
        trainer = LayerwiseTrainer(4, 1.0, 1, 1, generator=seeded_generator(seed), patience=1)
        history = trainer.fit(z).history
        if len(history.gains) == 0:
            assert float(history.refused_standard_error) > 0
            seen.append(float(history.refused))
    assert 0.0 in seen


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_skeleton_takes_the_state_of_what_was_fitted(dtype):
    x = ring(800, 7).to(dtype)
    given = Rotation(2).to(dtype)
    options = {"candidates": 1, "max_layers": 4, "stop_errors": None, "regression": QUICK}
    flows, history = LayerwiseTrainer(2, step_size=0.7, **options).fit(x, [given])
    base = nf.distributions.DiagGaussian(2, trainable=False)
    model = nf.NormalizingFlow(base, flows).to(dtype)
    state = torch.get_rng_state()
    layers = LayerwiseTrainer(2, step_size=0.7, regression=QUICK).skeleton(len(history.gains))
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(flow) for flow in layers] == [MomentBlock, Rotation] * 4
    assert held_out_loss(layers, x.float()) == pytest.approx(held_out_loss([], x.float()))
    base = nf.distributions.DiagGaussian(2, trainable=False)
    again = nf.NormalizingFlow(base, [*layers, Rotation(2)]).to(dtype)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.log_prob(x), model.log_prob(x))
    with pytest.raises(OptionError, match="num_blocks must be a positive integer"):
        LayerwiseTrainer(2).skeleton(0)


@pytest.mark.slow
def test_skeleton_takes_blocks_without_a_network():
    """Of a standard normal a block is the identity, of a Gaussian linear: one architecture."""
    for x in (
        torch.randn(400, 6, generator=seeded_generator(3)),
        3 + ring(300, 8) @ torch.ones(2, 6),
    ):
        trainer = LayerwiseTrainer(6, candidates=1, max_layers=3, stop_errors=None)
        flows, _ = trainer.fit(x)
        layers = trainer.skeleton(3)
        for flow, layer in zip(flows, layers, strict=True):
            layer.load_state_dict(flow.state_dict())
        assert held_out_loss(layers, x) == held_out_loss(flows, x)


@pytest.mark.slow
def test_same_generator_same_flow_and_nothing_disturbed():
    x = ring(800, 6)
    before, state = x.clone(), torch.get_rng_state()
    options = {"candidates": 2, "max_layers": 2, "regression": QUICK}
    first = LayerwiseTrainer(2, generator=seeded_generator(4), **options).fit(x)
    again = LayerwiseTrainer(2, generator=seeded_generator(4), **options).fit(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, before)
    assert torch.equal(first.history.gains, again.history.gains)
    assert held_out_loss(first.flows, x) == held_out_loss(again.flows, x)


def test_bad_input_is_named():
    with pytest.raises(ShapeError, match="at least two dimensions, got dim=1"):
        LayerwiseTrainer(1)
    with pytest.raises(OptionError, match=r"step_size must lie in \(0, 1\]"):
        LayerwiseTrainer(2, step_size=0.0)
    with pytest.raises(OptionError, match="candidates must be a positive integer"):
        LayerwiseTrainer(2, candidates=0)
    with pytest.raises(OptionError, match="stop_errors must be None or not negative"):
        LayerwiseTrainer(2, stop_errors=-1.0)
    trainer = LayerwiseTrainer(3)
    with pytest.raises(ShapeError, match=r"x must have shape \(N, 3\), got \(300, 2\)"):
        trainer.fit(torch.randn(300, 2))
    with pytest.raises(OptionError, match="at least 200 samples"):
        trainer.fit(torch.randn(199, 3))
    with pytest.raises(NonFiniteError, match="z has 900 of 900"):
        trainer.fit(torch.full((300, 3), math.nan))

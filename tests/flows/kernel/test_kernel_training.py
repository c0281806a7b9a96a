"""Kernelised couplings in use: data that place the points, the norm, training."""

from __future__ import annotations

import copy
import math
import re

import normflows as nf
import pytest
import torch
from support.coupling_oracles import with_weights
from torch import nn

import normflows_injective as nfi
from normflows_injective.flows.coupling import Spline
from normflows_injective.flows.kernel import (
    KernelCoupling,
    KernelExpansion,
    ferumal_glow,
    ferumal_realnvp,
    rkhs_penalty,
)

# Initialisation by data


def test_points_are_rows_of_the_data_and_the_map_does_not_change():
    coupling = KernelCoupling(5, 10)
    x = torch.randn(40, 5)
    at_first = coupling.conditioner.points.detach().clone()
    z, log_det = coupling.inverse(x)
    assert torch.equal(z, x)
    assert not log_det.any()
    points = coupling.conditioner.points.detach()
    assert not torch.equal(points, at_first)
    matches = (points.unsqueeze(1) == x[:, :2]).all(2)
    assert (matches.sum(1) == 1).all()
    assert matches.any(0).sum() == 10
    assert bool(coupling.conditioner.data_dep_init_done)


def test_length_scales_are_twice_standard_deviations_times_a_median_distance():
    x = torch.randn(200, 6, dtype=torch.float64) * torch.tensor([0.1, 1.0, 30.0, 1.0, 1.0, 1.0])
    spread = x[:, :3].std(0)
    for ard, scale in ((True, spread), (False, torch.ones(1).double())):
        coupling = KernelCoupling(6, 10, ard=ard).double()
        coupling.initialise(x)
        median = nn.functional.pdist(x[:, :3] / scale).median()
        expected = (2 * scale * median).unsqueeze(0)
        torch.testing.assert_close(coupling.conditioner.length_scales, expected)


def test_constants_before_any_data_suit_standard_normal_inputs():
    expansion = KernelExpansion(5, 1)
    before = expansion.length_scales.detach().clone()
    expansion.initialise(torch.randn(2000, 5))
    torch.testing.assert_close(expansion.length_scales, before, atol=0, rtol=0.3)


def test_initialises_once_and_only_in_the_data_direction():
    coupling = KernelCoupling(4, 5)
    state = copy.deepcopy(coupling.state_dict())
    coupling(torch.randn(30, 4))
    assert_same_state(coupling, state)
    coupling.inverse(torch.randn(30, 4))
    state = copy.deepcopy(coupling.state_dict())
    coupling.inverse(5 + torch.randn(30, 4))
    assert_same_state(coupling, state)
    coupling.initialise(5 + torch.randn(30, 4))
    assert coupling.conditioner.points.mean() > 3


def test_does_not_touch_a_layer_that_was_trained_or_loaded():
    trained_forward = with_weights(KernelCoupling(4, 5))
    state = copy.deepcopy(trained_forward.state_dict())
    trained_forward.inverse(torch.randn(30, 4).double())
    assert bool(trained_forward.conditioner.data_dep_init_done)
    state["conditioner.data_dep_init_done"].fill_(1.0)
    assert_same_state(trained_forward, state)

    seen = KernelCoupling(4, 5)
    seen.inverse(torch.randn(30, 4))
    twin = KernelCoupling(4, 5)
    twin.load_state_dict(seen.state_dict())
    assert bool(twin.conditioner.data_dep_init_done)
    twin.inverse(torch.randn(30, 4))
    assert_same_state(twin, seen.state_dict())


def test_fewer_rows_than_points_are_all_taken_and_made_up_for():
    coupling = KernelCoupling(4, 10)
    x = torch.randn(4, 4)
    coupling.inverse(x)
    points = coupling.conditioner.points.detach()
    assert (points.unsqueeze(0) == x[:, None, :2]).all(2).any(1).all()
    assert len(points.unique(dim=0)) == 10
    near = torch.cdist(points / x[:, :2].std(0), x[:, :2] / x[:, :2].std(0)).min(1).values
    assert near.max() < 0.6


def test_one_row_leaves_the_layer_as_it_is():
    coupling = KernelCoupling(4, 5)
    coupling.inverse(torch.randn(1, 4))
    assert not bool(coupling.conditioner.data_dep_init_done)
    with pytest.raises(nfi.errors.ShapeError, match="need at least two rows, got 1"):
        coupling.initialise(torch.randn(1, 4))


@pytest.mark.parametrize("ard", [True, False])
def test_constant_and_repeated_inputs(kernel, ard):
    coupling = KernelCoupling(4, 5, kernel, ard=ard)
    x = torch.randn(30, 4)
    x[:, 0] = 7.1
    coupling.inverse(x)
    assert coupling.conditioner.length_scales.isfinite().all()
    assert coupling.conditioner.length_scales.min() > 0.1
    same = KernelCoupling(4, 5, kernel, ard=ard)
    same.inverse(torch.ones(30, 4))
    with_weights(same)
    x = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    z, log_det = same.inverse(x)
    (gradient,) = torch.autograd.grad(z.sum() + log_det.sum(), x)
    assert z.isfinite().all()
    assert gradient.isfinite().all()


def test_context_is_an_input_of_the_kernel():
    coupling = KernelCoupling(4, 10, context_dim=3)
    x, context = torch.randn(40, 4), 10 + torch.randn(40, 3)
    assert torch.equal(coupling.inverse(x, context)[0], x)
    rows = torch.cat([x[:, :2], context], 1)
    points = coupling.conditioner.points
    assert (points.unsqueeze(1) == rows).all(2).any(1).all()
    coupling.conditioner.weights.data.normal_()
    assert not torch.equal(coupling.inverse(x, context)[0], coupling.inverse(x, context + 1)[0])
    with pytest.raises(nfi.errors.ContextError, match=r"takes a context of shape \(40, 3\)"):
        coupling.inverse(x)
    # A layer that was built without one lets it pass.
    plain = KernelCoupling(4, 10)
    assert torch.equal(plain.inverse(x, context)[0], x)


def test_one_coordinate_can_be_moved_by_a_context():
    coupling = with_weights(KernelCoupling(1, 10, context_dim=2))
    x, context = torch.randn(20, 1).double(), torch.randn(20, 2).double()
    z, _ = coupling.inverse(x, context)
    torch.testing.assert_close(coupling(z, context)[0], x)


def test_each_layer_takes_its_points_from_what_reaches_it():
    flows = ferumal_glow(4, 3, 10)
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(4), flows)
    x = 100 + 7 * torch.randn(50, 4)
    model.log_prob(x)
    for coupling in flows[::3]:
        assert coupling.conditioner.points.abs().max() < 10
        assert coupling.conditioner.points.mean().abs() < 1


# The norm in the Hilbert space


def test_penalty_is_the_norm_of_scale_and_shift(kernel):
    for share in (True, False):
        coupling = with_weights(KernelCoupling(5, 10, kernel, share_kernel=share))
        expansion = coupling.conditioner
        total = 0.0
        for o in range(6):
            gram = expansion.kernel_matrix(expansion.points, expansion.points)
            # <f, f> of f = sum_i a_i k(z_i, .), by the reproducing property.
            a, gram = expansion.coefficients()[:, o], gram[0 if share else o % 2]
            total += sum(a[i] * a[j] * gram[i, j] for i in range(10) for j in range(10))
        torch.testing.assert_close(coupling.penalty(), total)


def test_penalty_of_orthonormal_functions():
    expansion = KernelExpansion(2, 3, 5, precondition=False).double()
    gram = expansion.kernel_matrix(expansion.points, expansion.points)[0].detach()
    factor = torch.linalg.cholesky(gram)
    expansion.weights.data = torch.linalg.inv(factor).T[:, :3].contiguous()
    assert expansion.penalty().item() == pytest.approx(3.0, abs=1e-9)


def test_penalty_of_a_model_sums_over_its_layers():
    flows = ferumal_glow(4, 3, 10)
    for flow in flows[::3]:
        flow.conditioner.weights.data.normal_()
    expected = sum(flow.penalty() for flow in flows[::3])
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(4), flows)
    torch.testing.assert_close(rkhs_penalty(model), expected)
    torch.testing.assert_close(rkhs_penalty(flows), expected)
    rkhs_penalty(model).backward()
    assert flows[0].conditioner.weights.grad.abs().sum() > 0
    with pytest.raises(nfi.errors.OptionError, match="no kernel expansion in Linear"):
        rkhs_penalty(nn.Linear(2, 2))


# In use


def two_rings(count):
    angle = 2 * math.pi * torch.rand(count)
    radius = 1 + torch.randint(2, (count,)) + 0.1 * torch.randn(count)
    rows = torch.stack([radius * angle.cos(), radius * angle.sin(), torch.randn(count)], 1)
    rows[:, 2] = rows[:, 0] ** 2 + 0.3 * rows[:, 2]
    return (rows - rows.mean(0)) / rows.std(0)


def train(model, steps, loss_of, rate=1e-2):
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("build", [ferumal_realnvp, ferumal_glow])
@pytest.mark.parametrize("kernel", ["rbf", "matern32"])
def test_trains_in_the_hosts_loop_and_beats_a_gaussian(build, kernel):
    x, test = two_rings(500), two_rings(1000)
    base = nf.distributions.DiagGaussian(3, trainable=False)
    model = nf.NormalizingFlow(base, build(3, 6, 50, kernel=kernel))
    with torch.no_grad():
        model.log_prob(x)
    train(model, 150, lambda: model.forward_kld(x))
    gaussian = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov())
    with torch.no_grad():
        gain = model.log_prob(test).mean() - gaussian.log_prob(test).mean()
    assert gain > 0.2
    samples, _ = model.sample(1000)
    assert samples.isfinite().all()


@pytest.mark.slow
def test_trains_by_reverse_divergence_before_any_data():
    class Banana:
        def log_prob(self, x):
            bent = torch.stack([x[:, 0], x[:, 1] - x[:, 0] ** 2], 1)
            return -0.5 * (bent / torch.tensor([1.0, 0.5])).square().sum(1)

    base = nf.distributions.DiagGaussian(2, trainable=False)
    model = nf.NormalizingFlow(base, ferumal_realnvp(2, 4, 50), p=Banana())
    train(model, 300, lambda: model.reverse_kld(200), rate=2e-2)
    # The normaliser of the banana is 2 pi * 0.5.
    divergence = model.reverse_kld(5000) + math.log(math.pi)
    # Far from its points a layer is the identity, so the legs of the banana stay straight.
    assert -0.04 < divergence.item() < 0.6
    state = copy.deepcopy(model.state_dict())
    model.log_prob(torch.randn(50, 2))
    same = {k: torch.equal(v, state[k]) for k, v in model.state_dict().items()}
    assert all(kept for name, kept in same.items() if not name.endswith("init_done"))


@pytest.mark.slow
def test_trains_with_a_context_in_the_hosts_conditional_model():
    base = nf.distributions.DiagGaussian(2, trainable=False)
    flows = ferumal_glow(2, 4, 30, context_dim=1)
    model = nf.ConditionalNormalizingFlow(base, flows)
    context = torch.randn(400, 1)
    x = torch.cat([context.sin(), context**2], 1) + 0.2 * torch.randn(400, 2)
    model.log_prob(x, context)
    train(model, 150, lambda: model.forward_kld(x, context))
    # The noise has entropy 1 + log(2 pi 0.04) of both coordinates.
    assert float(model.forward_kld(x, context).detach()) < 1 + math.log(2 * math.pi * 0.04) + 0.4
    drawn, _ = model.sample(400, context)
    assert (drawn[:, 0] - context[:, 0].sin()).abs().mean() < 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    coupling = KernelCoupling(5, 10, "matern52").to(dtype)
    x = torch.randn(20, 5, dtype=dtype)
    z, log_det = coupling.inverse(x)
    assert {z.dtype, log_det.dtype, coupling.penalty().dtype} == {dtype}
    assert {p.dtype for p in coupling.parameters()} == {dtype}


def test_other_element_transforms():
    coupling = KernelCoupling(5, 10, transform=Spline(4))
    x = torch.randn(20, 5)
    torch.testing.assert_close(coupling.inverse(x)[0], x)
    coupling.conditioner.weights.data.normal_()
    z, log_det = coupling.inverse(x)
    back, log_det_back = coupling(z)
    torch.testing.assert_close(back, x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(log_det, -log_det_back, atol=1e-4, rtol=1e-4)


def test_expansion_serves_the_hosts_coupling():
    expansion = KernelExpansion(2, 4, 10)
    flow = nf.flows.AffineCouplingBlock(expansion)
    expansion.weights.data.normal_()
    x = torch.randn(6, 4)
    torch.testing.assert_close(flow(flow.inverse(x)[0])[0], x)


def test_a_layer_behind_an_injection():
    flows = [nfi.flows.LinearInjection(2, 5), *ferumal_realnvp(5, 2, 10)]
    model = nfi.InjectiveNormalizingFlow(nf.distributions.DiagGaussian(2), flows)
    for flow in flows[1:]:
        flow.conditioner.weights.data.normal_().mul_(0.1)
    z = torch.randn(3, 2)
    x, _ = flows[0](z)
    for flow in flows[1:]:
        x, _ = flow(x)
    assert model.log_prob(x).isfinite().all()


def test_copies_saves_and_says_what_it_is():
    coupling = with_weights(KernelCoupling(5, 10, "matern12", share_kernel=False, context_dim=1))
    x, context = torch.randn(6, 5).double(), torch.randn(6, 1).double()
    expected = coupling.inverse(x, context)[0]
    assert torch.equal(copy.deepcopy(coupling).inverse(x, context)[0], expected)
    twin = KernelCoupling(5, 10, "matern12", share_kernel=False, context_dim=1).double()
    twin.load_state_dict(coupling.state_dict())
    assert torch.equal(twin.inverse(x, context)[0], expected)
    assert "kernel='matern12', num_scales=2, ard=True" in repr(coupling)


def test_errors_say_what_to_do():
    with pytest.raises(
        nfi.errors.OptionError,
        match=re.escape("kernel must be one of rbf, matern12, matern32, matern52, got 'se'"),
    ):
        KernelCoupling(4, kernel="se")
    with pytest.raises(nfi.errors.ShapeError, match="KernelCoupling needs at least two coord"):
        KernelCoupling(1)
    with pytest.raises(nfi.errors.OptionError, match="num_auxiliary must be a positive integer"):
        KernelCoupling(4, num_auxiliary=0)
    with pytest.raises(nfi.errors.OptionError, match="num_layers must be a positive integer"):
        ferumal_realnvp(4, 0)
    with pytest.raises(nfi.errors.ShapeError, match=r"x must have shape \(B, 4\), got \(3, 5\)"):
        KernelCoupling(4).inverse(torch.randn(3, 5))
    broken = torch.randn(6, 4)
    broken[2, 1] = math.nan
    with pytest.raises(nfi.errors.NonFiniteError, match="that place the auxiliary points has 1"):
        KernelCoupling(4).inverse(broken)


def assert_same_state(module, state):
    now = module.state_dict()
    assert all(torch.equal(now[name], value) for name, value in state.items())

"""Kernelised couplings: closed forms, the representer theorem, data that place the points."""

from __future__ import annotations

import copy
import math
import re

import normflows as nf
import pytest
import torch
from sklearn.gaussian_process.kernels import RBF, Matern
from support.dense import dense_jacobian
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import normflows_injective as nfi
from normflows_injective.flows.coupling import Affine, Spline
from normflows_injective.flows.kernel import (
    KernelCoupling,
    KernelExpansion,
    ferumal_glow,
    ferumal_realnvp,
    rkhs_penalty,
)
from normflows_injective.flows.kernel.kernels import KERNELS, squared_distances

NAMES = list(KERNELS)


@pytest.fixture(params=NAMES)
def kernel(request):
    return request.param


def trained(coupling, scale=0.1):
    """A coupling in float64 with random weights, so that it is not the identity."""
    coupling = coupling.double()
    coupling.conditioner.weights.data.normal_().mul_(scale)
    return coupling


# Kernels


def test_kernels_agree_with_those_of_scikit_learn(kernel):
    first, second = torch.randn(7, 3).double(), torch.randn(5, 3).double()
    scales = torch.tensor([0.5, 1.0, 2.0]).double()
    reference = {
        "rbf": RBF(scales.numpy()),
        "matern12": Matern(scales.numpy(), nu=0.5),
        "matern32": Matern(scales.numpy(), nu=1.5),
        "matern52": Matern(scales.numpy(), nu=2.5),
    }[kernel]
    values = KERNELS[kernel](squared_distances(first / scales, second / scales))
    expected = torch.from_numpy(reference(first.numpy(), second.numpy()))
    torch.testing.assert_close(values, expected, atol=2e-6, rtol=0)


def test_matern_kernels_near_distance_zero():
    r = torch.logspace(-2, -1, 5, dtype=torch.float64)
    half, three, five = (KERNELS[f"matern{n}"](r.square()) for n in (12, 32, 52))
    assert ((half - (1 - r + r**2 / 2)).abs() < r**3 / 6 + 2e-9).all()
    assert ((three - (1 - 1.5 * r**2)).abs() < 2 * r**3).all()
    assert ((five - (1 - 5 / 6 * r**2)).abs() < 1.1 * r**4).all()


def test_second_derivatives_where_points_coincide():
    """The Hessian of k(u, z) by u is -I, -3I, -5/3 I for the kernels that have one."""
    expected = {"rbf": -1.0, "matern32": -3.0, "matern52": -5 / 3}
    z = torch.randn(6, 4, dtype=torch.float64)
    for name, curvature in expected.items():

        def own(u, name=name):
            return KERNELS[name](squared_distances(u.unsqueeze(0), z))[0, 2]

        hessian = torch.autograd.functional.hessian(own, z[2].clone())
        torch.testing.assert_close(
            hessian, curvature * torch.eye(4).double(), atol=1e-4, rtol=1e-4
        )


def test_distances_against_differences_far_from_the_origin():
    first, second = (1e3 + torch.randn(n, 5, dtype=torch.float64) for n in (6, 4))
    second[1] = first[2]
    expected = (first.unsqueeze(1) - second).square().sum(2)
    squared = squared_distances(first, second)
    torch.testing.assert_close(squared, expected, atol=1e-11, rtol=1e-11)
    many = torch.randn(500, 5)
    assert (squared_distances(many, many) >= 0).all()


# The layer


def test_round_trip_and_log_det_of_all_kernels(kernel):
    coupling = trained(KernelCoupling(5, 20, kernel))
    x = torch.randn(8, 5, dtype=torch.float64)
    z, log_det = coupling.inverse(x)
    back, log_det_back = coupling(z)
    assert (back - x).abs().max() < 2e-14
    assert (log_det + log_det_back).abs().max() < 2e-14
    dense = torch.linalg.slogdet(dense_jacobian(lambda v: coupling.inverse(v)[0], x))[1]
    assert (log_det - dense).abs().max() < 3e-14
    assert log_det.abs().max() > 1e-3


def test_starts_as_exactly_the_identity(kernel):
    x = torch.randn(30, 5)
    z, log_det = KernelCoupling(5, 10, kernel).inverse(x)
    assert torch.equal(z, x)
    assert not log_det.any()


def test_is_exactly_the_identity_far_from_its_points(kernel):
    coupling = trained(KernelCoupling(4, 20, kernel), 1.0)
    far = 1e3 * nn.functional.normalize(torch.randn(10, 4, dtype=torch.float64))
    far[:, :2] = far[:, :2].sign() * far[:, :2].abs().clamp_min(900.0 / math.sqrt(2))
    near = torch.randn(10, 4, dtype=torch.float64)
    for direction in (coupling, coupling.inverse):
        assert torch.equal(direction(far)[0], far)
        assert not torch.equal(direction(near)[0], near)


def test_one_auxiliary_point_by_hand():
    coupling = KernelCoupling(2, 1, precondition=False).double()
    expansion = coupling.conditioner
    expansion.points.data.fill_(0.5)
    set_length_scales(expansion, 2.0)
    # Of the only coordinate that moves: s by 0.3, t by -0.7.
    expansion.weights.data.copy_(torch.tensor([[0.3, -0.7]], dtype=torch.float64))
    x = torch.tensor([[1.5, 4.0]], dtype=torch.float64)
    section = math.exp(-0.5 * (1.0 / 2.0) ** 2)
    z, log_det = coupling.inverse(x)
    expected = 4.0 * math.exp(0.3 * section) - 0.7 * section
    assert z[0].tolist() == pytest.approx([1.5, expected], abs=1e-14)
    assert log_det.item() == pytest.approx(0.3 * section, abs=1e-15)


def test_a_huge_length_scale_makes_a_fixed_affine_map(kernel):
    coupling = trained(KernelCoupling(5, 10, kernel))
    set_length_scales(coupling.conditioner, 1e9)
    x = torch.randn(6, 5, dtype=torch.float64)
    z, log_det = coupling.inverse(x)
    # Kernels are one to 1e-6, and coefficients cancel in their sums.
    tolerance = 1e-6 * coupling.conditioner.coefficients().abs().sum().item()
    scale, shift = coupling.conditioner.coefficients().sum(0).view(3, 2).unbind(1)
    expected = x[:, 2:] * scale.exp() + shift
    torch.testing.assert_close(z[:, 2:], expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(log_det, scale.sum().expand(6), atol=tolerance, rtol=tolerance)


def test_order_of_the_auxiliary_points_does_not_matter():
    coupling = trained(KernelCoupling(5, 20))
    other = copy.deepcopy(coupling)
    order = torch.randperm(20)
    other.conditioner.points.data = coupling.conditioner.points.data[order]
    other.conditioner.weights.data = coupling.conditioner.weights.data[order]
    other.conditioner.basis = coupling.conditioner.basis[order][:, order]
    x = torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(other.inverse(x), coupling.inverse(x), atol=1e-14, rtol=1e-14)


@pytest.mark.slow
def test_numbers_of_parameters_of_the_paper():
    for dim, num_layers, expected in ((6, 12, 16_236), (8, 6, 10_824), (7, 3, 3 * 1653)):
        flows = ferumal_realnvp(dim, num_layers, 150)
        assert sum(p.numel() for flow in flows for p in flow.parameters()) == expected


def test_options_change_the_parameters_as_they_say():
    def count(**options):
        return sum(p.numel() for p in KernelCoupling(6, 50, **options).parameters())

    shared = count()
    assert shared == 50 * (2 * 3 + 3) + 3
    assert count(share_kernel=False) == shared + 3
    assert count(ard=False) == shared - 2
    assert count(learn_auxiliary=False) == shared - 50 * 3
    assert count(context_dim=2) == shared + (50 + 1) * 2
    fixed = KernelCoupling(6, 50, learn_auxiliary=False)
    assert "conditioner.points" in fixed.state_dict()


def test_own_length_scales_serve_scale_and_shift_apart():
    coupling = trained(KernelCoupling(5, 10, share_kernel=False))
    x = torch.randn(6, 5, dtype=torch.float64)
    s, t = coupling.parameters_of(x[:, :2], None).unbind(2)
    coupling.conditioner.raw_length_scales.data[1] += 1.0
    s_after, t_after = coupling.parameters_of(x[:, :2], None).unbind(2)
    assert torch.equal(s, s_after)
    assert (t - t_after).abs().max() > 1e-6
    # With equal length-scales the two ways to compute agree.
    coupling.conditioner.raw_length_scales.data[1] -= 1.0
    shared = trained(KernelCoupling(5, 10))
    shared.conditioner.points.data = coupling.conditioner.points.data
    shared.conditioner.basis = coupling.conditioner.basis
    shared.conditioner.weights.data = coupling.conditioner.weights.data
    torch.testing.assert_close(shared.inverse(x), coupling.inverse(x), atol=1e-14, rtol=1e-14)


def test_gradients_are_finite_and_right_where_points_coincide(kernel):
    coupling = trained(KernelCoupling(4, 6, kernel))
    u = coupling.conditioner.points.detach().clone()
    x = torch.cat([u, torch.randn(6, 2, dtype=torch.float64)], 1).requires_grad_()
    z, log_det = coupling.inverse(x)
    by = [x, *coupling.parameters()]
    first = torch.autograd.grad(z.sin().sum() + log_det.sum(), by, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), by)
    assert all(bool(g.isfinite().all()) for g in (*first, *second))
    tangent = torch.randn_like(x)
    pushed = torch.func.jvp(lambda v: coupling.inverse(v)[1], (x.detach(),), (tangent,))[1]
    (pulled,) = torch.autograd.grad(coupling.inverse(x)[1].sum(), x)
    torch.testing.assert_close(pushed.sum(), (pulled * tangent).sum())


@pytest.mark.slow
def test_derivatives_by_inputs_points_scales_and_weights(kernel):
    coupling = trained(KernelCoupling(4, 3, kernel))
    names = [name for name, _ in coupling.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in coupling.parameters()]
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def call(v, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(coupling, state, (v,))

    assert gradcheck(call, (x, *values))
    assert gradgradcheck(call, (x, *values))


def test_weights_are_those_of_an_orthonormal_basis():
    coupling = KernelCoupling(6, 10)
    x = torch.randn(50, 6)
    for _ in range(2):  # for the constants at first, and for the data
        expansion = coupling.conditioner
        gram = expansion.kernel_matrix(expansion.points, expansion.points)[0].detach()
        product = expansion.basis @ (gram + 1e-3 * torch.eye(10)) @ expansion.basis
        torch.testing.assert_close(product, torch.eye(10), atol=1e-3, rtol=0)
        coupling.inverse(x)
    # The norm in the Hilbert space is that of the weights but for rough functions.
    expansion.weights.data.normal_()
    norm = expansion.weights.square().sum()
    assert 0.5 * norm < coupling.penalty() < norm
    # Without the basis the same function has its coefficients as weights.
    plain = KernelCoupling(6, 10, precondition=False)
    assert not any("basis" in name for name in plain.state_dict())
    plain.conditioner.points.data = expansion.points.data
    plain.conditioner.raw_length_scales.data = expansion.raw_length_scales.data
    plain.conditioner.weights.data = expansion.coefficients().detach()
    torch.testing.assert_close(plain.inverse(x), coupling.inverse(x))


# The representer theorem


class LinearInFeatures(nn.Module):
    """A conditioner V phi(u) with explicit features, an element of a finite Hilbert space."""

    takes_context = needs_context = False

    def __init__(self, kept, moved, num_features):
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(kept, num_features))
        self.weights = nn.Parameter(0.05 * torch.randn(num_features, 2 * moved))

    def features(self, u):
        return (u @ self.frequencies + torch.arange(self.frequencies.shape[1])).cos()

    def forward(self, u):
        return self.features(u) @ self.weights


def test_projection_on_the_sections_at_the_layer_inputs_keeps_the_likelihood():
    """Three layers are projected one after the other; each sees the inputs it saw before."""
    layers = [
        nfi.flows.coupling.Coupling(
            6, LinearInFeatures(3, 3, 200), Affine(None), reverse=i % 2 == 1
        ).double()
        for i in range(3)
    ]
    base = nf.distributions.DiagGaussian(6, trainable=False).double()
    model = nf.NormalizingFlow(base, layers)
    x = torch.randn(20, 6, dtype=torch.float64)
    before, elsewhere = model.log_prob(x), torch.randn(20, 6, dtype=torch.float64)
    before_elsewhere = model.log_prob(elsewhere)
    moved = 0.0
    with torch.no_grad():
        value = x
        for layer in reversed(layers):
            sections = layer.conditioner.features(layer.split(value, "x")[0])
            weights = layer.conditioner.weights
            # The span of the sections phi(u_b) is the row space of their matrix.
            projected = torch.linalg.pinv(sections) @ (sections @ weights)
            moved += float((projected - weights).square().sum())
            weights.copy_(projected)
            value = layer.inverse(value)[0]
    torch.testing.assert_close(model.log_prob(x), before, atol=1e-11, rtol=1e-11)
    assert moved > 1.0
    # Nothing is said away from the training data.
    assert (model.log_prob(elsewhere) - before_elsewhere).abs().max() > 1e-2


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
    trained_forward = trained(KernelCoupling(4, 5))
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
    trained(same)
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
    coupling = trained(KernelCoupling(1, 10, context_dim=2))
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
        coupling = trained(KernelCoupling(5, 10, kernel, share_kernel=share))
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
    coupling = trained(KernelCoupling(5, 10, "matern12", share_kernel=False, context_dim=1))
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


def set_length_scales(expansion, value):
    """Set all length-scales, through the softplus and its floor."""
    raw = math.log(math.expm1(value - 0.01)) if value < 100 else value - 0.01
    expansion.raw_length_scales.data.fill_(raw)


def assert_same_state(module, state):
    now = module.state_dict()
    assert all(torch.equal(now[name], value) for name, value in state.items())

"""Kernelised couplings: closed forms, and the representer theorem."""

from __future__ import annotations

import copy
import math

import normflows as nf
import pytest
import torch
from sklearn.gaussian_process.kernels import RBF, Matern
from support.coupling_oracles import with_weights
from support.dense import dense_jacobian
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import normflows_injective as nfi
from normflows_injective.flows.coupling import Affine
from normflows_injective.flows.kernel import KernelCoupling, ferumal_realnvp
from normflows_injective.flows.kernel.kernels import KERNELS, squared_distances

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
    coupling = with_weights(KernelCoupling(5, 20, kernel))
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
    coupling = with_weights(KernelCoupling(4, 20, kernel), 1.0)
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
    coupling = with_weights(KernelCoupling(5, 10, kernel))
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
    coupling = with_weights(KernelCoupling(5, 20))
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
    coupling = with_weights(KernelCoupling(5, 10, share_kernel=False))
    x = torch.randn(6, 5, dtype=torch.float64)
    s, t = coupling.parameters_of(x[:, :2], None).unbind(2)
    coupling.conditioner.raw_length_scales.data[1] += 1.0
    s_after, t_after = coupling.parameters_of(x[:, :2], None).unbind(2)
    assert torch.equal(s, s_after)
    assert (t - t_after).abs().max() > 1e-6
    # With equal length-scales the two ways to compute agree.
    coupling.conditioner.raw_length_scales.data[1] -= 1.0
    shared = with_weights(KernelCoupling(5, 10))
    shared.conditioner.points.data = coupling.conditioner.points.data
    shared.conditioner.basis = coupling.conditioner.basis
    shared.conditioner.weights.data = coupling.conditioner.weights.data
    torch.testing.assert_close(shared.inverse(x), coupling.inverse(x), atol=1e-14, rtol=1e-14)


def test_gradients_are_finite_and_right_where_points_coincide(kernel):
    coupling = with_weights(KernelCoupling(4, 6, kernel))
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
    coupling = with_weights(KernelCoupling(4, 3, kernel))
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


def set_length_scales(expansion, value):
    """Set all length-scales, through the softplus and its floor."""
    raw = math.log(math.expm1(value - 0.01)) if value < 100 else value - 0.01
    expansion.raw_length_scales.data.fill_(raw)

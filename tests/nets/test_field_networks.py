"""Networks of the fields of assignment flows."""

from __future__ import annotations

import pytest
import torch
from support.dense import dense_jacobian
from support.models import perturbed
from torch.autograd import gradcheck

from normflows_injective.errors import ContextError, OptionError, ShapeError
from normflows_injective.nets.fields import ConvField, DenseField, LeaveOneOutField
from normflows_injective.nets.fields.conditions import time_features

DOUBLE = torch.float64
# Name -> network of n variables of three classes, for a context and with missing variables or not.
NETWORKS = {
    "dense": (6, lambda **options: DenseField(6, 3, hidden=(8,), **options)),
    "conv": (6, lambda **options: ConvField(2, 3, 3, channels=8, **options)),
    "conv_odd": (35, lambda **options: ConvField(5, 7, 3, channels=8, num_blocks=2, **options)),
    "conv_line": (3, lambda **options: ConvField(1, 3, 3, channels=8, **options)),
    "leave_one_out": (6, lambda **options: LeaveOneOutField(6, 3, (4, 4), 4, **options)),
    "leave_one_out_shallow": (4, lambda **options: LeaveOneOutField(4, 3, (), 4, **options)),
    "leave_one_out_of_one": (1, lambda **options: LeaveOneOutField(1, 3, (4,), 4, **options)),
}


@pytest.fixture(params=NETWORKS)
def case(request):
    num, build = NETWORKS[request.param]

    def stirred(**options):
        return perturbed(build(**options).double())

    return num, stirred


def batch(num, classes=3, rows=4):
    return torch.randn(rows, num, classes, dtype=DOUBLE), 5 * torch.rand(rows, dtype=DOUBLE)


def test_shapes_dtypes_and_independence_of_samples(case):
    num, build = case
    net = build()
    x, t = batch(num)
    before = x.clone()
    out = net(x, t)
    assert out.shape == (4, num, 3)
    assert out.dtype == DOUBLE
    assert net.float()(x.float(), t.float()).dtype == torch.float32
    net.double()
    assert torch.equal(x, before)
    for row in range(4):
        alone = net(x[row : row + 1], t[row : row + 1])
        torch.testing.assert_close(alone[0], out[row].double(), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_every_parameter_gets_a_gradient(case):
    num, build = case
    net = build(context_dim=2, missing=True)
    x, t = batch(num, 4)
    net(x, t, torch.randn(4, 2, dtype=DOUBLE)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_output_depends_on_time_and_context(case):
    num, build = case
    net = build(context_dim=2)
    x, t = batch(num)
    context = torch.randn(4, 2, dtype=DOUBLE)
    out = net(x, t, context)
    assert net.takes_context
    assert net.needs_context
    assert not torch.allclose(net(x, t + 1, context), out)
    assert not torch.allclose(net(x, t, context + 1), out)
    # A context of another dtype is cast, such as one-hot rows of integers.
    net(x, t, torch.eye(4, 2).long())


@pytest.mark.slow
def test_a_new_network_is_sensitive_to_its_features():
    for num, build in NETWORKS.values():
        net = build().double()
        x, t = batch(num)
        if num > 1:
            assert float((net(x + torch.randn_like(x), t) - net(x, t)).detach().abs().max()) > 1e-3


def test_forward_mode_agrees_with_reverse_mode(case):
    num, build = case
    net = build()
    x, t = batch(num, rows=2)
    direction, cotangent = torch.randn_like(x), torch.randn_like(x)
    out, pushed = torch.func.jvp(lambda s: net(s, t), (x,), (direction,))
    x = x.requires_grad_()
    (pulled,) = torch.autograd.grad(net(x, t), x, cotangent)
    torch.testing.assert_close((pushed * cotangent).sum(), (pulled * direction).sum())


@pytest.mark.parametrize("widths", [(), (3,), (4, 5)])
@pytest.mark.parametrize("missing", [False, True])
def test_leave_one_out_leaves_each_variable_out_and_sees_all_others(widths, missing):
    net = perturbed(LeaveOneOutField(4, 3, widths, 5, missing=missing).double())
    assert net.leave_one_out
    x, t = batch(4, 3 + missing, 2)
    jacobian = dense_jacobian(lambda s: net(s, t[:1]), x).view(2, 4, 3, 4, 3 + missing)
    for i in range(4):
        for j in range(4):
            block = jacobian[:, i, :, j]
            if i == j:
                assert bool((block == 0).all())
            else:
                assert bool((block != 0).all())


def test_weights_of_masked_layers_beyond_the_mask_have_no_part():
    net = LeaveOneOutField(3, 2, (4,), 4).double()
    x, t = batch(3, 2)
    before = net(x, t)
    for direction in (net.forwards, net.backwards):
        for layer in direction:
            num, fan_out, _, fan_in = layer.sizes
            hidden = ~layer.mask[:, None, :, None].expand(num, fan_out, num, fan_in)
            weight = layer.linear.weight
            weight.data[hidden.reshape(weight.shape)] = 1e6
    assert torch.equal(net(x, t), before)


@pytest.mark.slow
def test_gradcheck_of_leave_one_out():
    net = LeaveOneOutField(3, 2, (3,), 3, context_dim=1).double()
    x, t = batch(3, 2, 2)
    context = torch.randn(2, 1, dtype=DOUBLE)
    inputs = tuple(s.requires_grad_() for s in (x, t, context))
    assert gradcheck(net, inputs, check_forward_ad=True)


def test_convolutions_reach_their_neighbours_only():
    # Blocks at half resolution see further than those at full resolution, but not everything.
    net = perturbed(ConvField(3, 40, 2, channels=8).double(), 0.1)
    for module in net.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x
    x, t = batch(120, 2, 1)
    moved = x.clone()
    moved[:, 0] += 1
    changed = (net(moved, t) - net(x, t)).abs().amax(2).view(3, 40) > 0
    assert bool(changed[:, :4].all())
    assert not bool(changed[:, 30:].any())


def test_conv_blocks_start_as_identities():
    net = ConvField(4, 4, 2, channels=8)
    for module in net.modules():
        if hasattr(module, "second"):
            assert not bool(module.second.weight.any())


def test_time_features_are_bounded_or_slow():
    features = time_features(torch.tensor([0.0, 0.5, 1.0, 1e8], dtype=DOUBLE))
    assert features.shape == (4, 8)
    torch.testing.assert_close(features[:, 0], torch.tensor([0, 1 / 3, 0.5, 1]).double())
    torch.testing.assert_close(features[2, 2:5], torch.tensor([0, -1, 0]).double())
    assert bool((features.abs() < 10).all())


def test_what_does_not_fit_is_refused():
    for num, build in NETWORKS.values():
        net = build(context_dim=2)
        x, t = torch.zeros(4, num, 3), torch.zeros(4)
        name, context = type(net).__name__, torch.zeros(4, 2)
        text = rf"{name} was built for features of shape \(B, {num}, 3\), got \(4, {num}, 4\)"
        with pytest.raises(ShapeError, match=text):
            net(torch.zeros(4, num, 4), t, context)
        with pytest.raises(ShapeError, match="num_classes of the model, and missing=True if"):
            net(torch.zeros(4, num + 1, 3), t, context)
        with pytest.raises(ContextError, match=rf"{name} with context_dim=2 .* got none"):
            net(x, t)
        with pytest.raises(ContextError, match=r"shape \(4, 2\), got one of shape \(4, 3\)"):
            net(x, t, torch.zeros(4, 3))
        with pytest.raises(ContextError, match=f"{name} with context_dim=0 takes no context"):
            build()(x, t, context)
    with pytest.raises(OptionError, match=r"widths\[1\] must be a positive integer, got 0"):
        LeaveOneOutField(3, 2, (4, 0))
    with pytest.raises(OptionError, match=r"head must be a positive integer, got -1"):
        LeaveOneOutField(3, 2, head=-1)
    with pytest.raises(OptionError, match="height must be a positive integer, got 0"):
        ConvField(0, 3, 2)
    with pytest.raises(OptionError, match="num_blocks must be a positive integer, got 0"):
        ConvField(3, 3, 2, num_blocks=0)

"""Normalisation, activations and convolutions whose products are cheap to differentiate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.dense import dense_jacobian
from support.gradients import gradients
from support.seeds import manual_seed
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from normflows_injective.autodiff.activations import jvp_silu, silu
from normflows_injective.autodiff.convolutions import convolve
from normflows_injective.autodiff.jacobians import basis_of
from normflows_injective.autodiff.normalisation import (
    group_norm,
    jvp_group_norm,
    jvp_layer_norm,
    layer_norm,
)
from normflows_injective.autodiff.recording import record
from normflows_injective.autodiff.reverse import reverse

# Kernels.


def explicit_group_norm(x, num_groups, weight, bias, eps):
    rows = x.reshape(len(x), num_groups, -1)
    centred = rows - rows.mean(2, keepdim=True)
    rows = centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    out = rows.view_as(x)
    out = out if weight is None else out * weight.view(shape)
    return out if bias is None else out + bias.view(shape)


def explicit_layer_norm(x, shape, weight, bias, eps):
    axes = tuple(range(-len(shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    out = centred / (centred.square().mean(axes, keepdim=True) + eps).sqrt()
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _group(groups, shape, weight=True, bias=True, eps=1e-5):
    channels = shape[1]
    return (
        lambda x, w, b: group_norm(x, groups, w if weight else None, b if bias else None, eps),
        lambda x, w, b: explicit_group_norm(
            x, groups, w if weight else None, b if bias else None, eps
        ),
        shape,
        (channels,),
    )


def _layer(normalized, shape, weight=True, bias=True, eps=1e-5):
    return (
        lambda x, w, b: layer_norm(x, normalized, w if weight else None, b if bias else None, eps),
        lambda x, w, b: explicit_layer_norm(
            x, normalized, w if weight else None, b if bias else None, eps
        ),
        shape,
        normalized,
    )


KERNELS = {
    "silu": (lambda x, w, b: silu(x), lambda x, w, b: x * torch.sigmoid(x), (2, 3), (1,)),
    "group": _group(2, (2, 4, 3)),
    "group of vectors": _group(2, (2, 4)),
    "group of images": _group(1, (2, 2, 2, 2)),
    "group without shift": _group(2, (2, 4), bias=False),
    "group without scale": _group(2, (2, 4), weight=False),
    "group bare": _group(2, (2, 4), weight=False, bias=False),
    "group with large eps": _group(2, (2, 4), eps=0.5),
    "one value per group": _group(4, (2, 4), eps=0.5),
    "layer": _layer((4,), (3, 4)),
    "layer over two axes": _layer((3, 2), (2, 3, 2)),
    "layer with axes before": _layer((4,), (2, 3, 4)),
    "layer without shift": _layer((4,), (3, 4), bias=False),
    "layer bare": _layer((4,), (3, 4), weight=False, bias=False),
    "layer with large eps": _layer((4,), (3, 4), eps=0.5),
    "layer without batch": _layer((4,), (4,)),
    "layer of one value": _layer((1,), (3, 1), eps=0.5),
}


def kernel_inputs(name):
    *functions, shape, parameters = KERNELS[name]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.rand(parameters, dtype=torch.float64) + 0.5 for _ in range(2))
    return functions, (x, weight.requires_grad_(), bias.requires_grad_())


def derivatives(function, inputs, order):
    """Value, and gradients of scalars of gradients, up to an order, all inputs together."""
    terms = [function(*inputs)]
    for _ in range(order):
        scalar = terms[-1].sin().sum()
        found = torch.autograd.grad(scalar, inputs, create_graph=True, allow_unused=True)
        parts = [
            torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)
        ]
        terms.append(torch.cat([part.flatten() for part in parts]))
    return terms


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_and_their_first_three_derivatives_against_formulas(name):
    """Formulas, as torch's own third derivative of layer normalisation is wrong in 2.13."""
    (ours, formula), inputs = kernel_inputs(name)
    for a, e in zip(derivatives(ours, inputs, 3), derivatives(formula, inputs, 3), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_by_finite_differences(name):
    (ours, _), inputs = kernel_inputs(name)
    if name == "layer of one value" or name == "one value per group":
        inputs = tuple(i.detach().requires_grad_() for i in inputs)
    assert gradcheck(lambda *a: ours(*a) + 0 * (a[1].sum() + a[2].sum()), inputs)
    assert gradgradcheck(lambda *a: ours(*a) + 0 * (a[1].sum() + a[2].sum()), inputs)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_under_gradients_that_are_not_differentiated(name):
    """The in-place and fused branches, which run without create_graph."""
    (ours, formula), inputs = kernel_inputs(name)
    for order in (1, 2):
        both = []
        for function in (ours, formula):
            scalar = derivatives(function, inputs, order - 1)[-1].cos().sum()
            both.append(gradients(scalar, inputs))
        torch.testing.assert_close(*both)


@pytest.mark.parametrize("name", [n for n in KERNELS if n != "layer without batch"])
@pytest.mark.parametrize("count", [2, 3])
def test_probes_at_once_equal_one_by_one(name, count):
    """The probes run under vmap, and gradients of what they give are taken outside of it."""
    (ours, formula), inputs = kernel_inputs(name)
    x, weight, bias = inputs
    value = ours(*inputs)
    cotangents = torch.randn(count, *value.shape, dtype=x.dtype)

    def pull(cotangent):
        return torch.autograd.grad(value, x, cotangent, create_graph=True)[0]

    together = torch.func.vmap(pull)(cotangents)
    value = formula(*inputs)
    one_by_one = torch.stack([pull(c) for c in cotangents])
    torch.testing.assert_close(together, one_by_one)
    pair = [gradients(t.sin().sum(), inputs) for t in (together, one_by_one)]
    torch.testing.assert_close(*pair)


PUSHED = {
    "silu": lambda t, x, w: (jvp_silu(t, x), silu),
    "group": lambda t, x, w: (
        jvp_group_norm(t, x, 2, w, None, 0.1),
        lambda s: group_norm(s, 2, w, None, 0.1),
    ),
    "group bare": lambda t, x, w: (
        jvp_group_norm(t, x, 2, None, None, 0.1),
        lambda s: group_norm(s, 2, None, None, 0.1),
    ),
    "layer": lambda t, x, w: (
        jvp_layer_norm(t, x, (4, 3), w.view(4, 1).expand(4, 3), None, 0.1),
        lambda s: layer_norm(s, (4, 3), w.view(4, 1).expand(4, 3), None, 0.1),
    ),
}


@pytest.mark.parametrize("name", PUSHED)
def test_pushed_tangents_against_dense_jacobians(name):
    x, t = torch.randn(2, 2, 4, 3, dtype=torch.float64)
    weight = torch.rand(4, dtype=torch.float64) + 0.5
    actual, function = PUSHED[name](t, x, weight)
    expected = (dense_jacobian(function, x) @ t.flatten(1).unsqueeze(2)).view_as(t)
    torch.testing.assert_close(actual, expected)


def test_silu_far_out_and_in_float32():
    x = torch.tensor([-200.0, -88.0, -30.0, 0.0, 30.0, 200.0], requires_grad=True)
    first, second = derivatives(silu, (x,), 2)[1:]
    assert torch.isfinite(first).all()
    assert torch.isfinite(second).all()
    (slope,) = torch.autograd.grad(silu(x).sum(), x)
    torch.testing.assert_close(slope, torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0]))


class Used(TorchDispatchMode):
    """Whether torch's own normalisation or one of our rows has run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("change", "ours"),
    [
        (lambda x: x, True),
        (lambda x: x.float(), True),
        (lambda x: x.contiguous(memory_format=torch.channels_last), False),
        (lambda x: x.bfloat16(), False),
        (lambda x: x.transpose(2, 3), False),
    ],
)
def test_other_layouts_and_precisions_are_left_to_torch(change, ours):
    norm = nn.GroupNorm(2, 4)
    x = change(torch.randn(2, 4, 3, 3, dtype=torch.float64))
    norm = norm.to(x.dtype)
    with Used() as used:
        recorded = record(norm, x.clone().requires_grad_())
    assert ("native_group_norm" in used.names) != ours
    torch.testing.assert_close(recorded.value, norm(x))


def test_what_torch_refuses_is_refused_in_its_words():
    def recorded(function, *shape):
        return record(function, torch.randn(*shape).requires_grad_()).value

    with pytest.raises(RuntimeError, match="divisible by num_groups"):
        recorded(lambda x: F.group_norm(x, 3), 3, 4, 3)
    with pytest.raises(RuntimeError, match="Given normalized_shape"):
        recorded(lambda x: F.layer_norm(x, (4,)), 2, 4, 3)
    with pytest.raises(RuntimeError, match="Given normalized_shape"):
        recorded(lambda x: F.layer_norm(x, (4,), torch.ones(4)), 2, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        recorded(lambda x: F.group_norm(x, 4), 1, 4)
    with pytest.raises(RuntimeError, match="at least 2 dimensions"):
        recorded(lambda x: F.group_norm(x, 1), 4)


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: F.layer_norm(x, (4,), torch.ones(1, dtype=x.dtype)),
        lambda x: F.group_norm(x, 2, torch.ones(1, dtype=x.dtype)),
    ],
)
def test_parameters_that_torch_would_refuse_are_refused(norm):
    x = torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        norm(x)
    with pytest.raises(RuntimeError):
        record(norm, x.requires_grad_())


# Convolutions that are differentiated by the cotangents of their products.

CONVOLVED = {
    "strides": (F.conv1d, (2, 2, 5), (4, 2, 3), {"stride": 2, "padding": 1}),
    "strides that leave a rest": (F.conv1d, (2, 2, 6), (4, 2, 3), {"stride": 2, "padding": 1}),
    "groups": (F.conv2d, (1, 4, 4, 5), (2, 2, 2, 3), {"stride": (2, 3), "groups": 2}),
    "dilation": (F.conv2d, (1, 1, 5, 5), (2, 1, 2, 2), {"dilation": 2, "stride": 3}),
    "padding by name": (F.conv1d, (2, 2, 4), (2, 2, 3), {"padding": "same"}),
    "volume": (F.conv3d, (1, 1, 3, 2, 2), (2, 1, 2, 2, 1), {"stride": 2}),
    "transposed": (
        F.conv_transpose1d,
        (2, 2, 3),
        (2, 3, 3),
        {"stride": 2, "padding": 1, "output_padding": 1},
    ),
    "transposed groups": (
        F.conv_transpose2d,
        (1, 4, 2, 2),
        (4, 1, 2, 3),
        {"stride": (2, 3), "groups": 2, "output_padding": (0, 2)},
    ),
    "transposed volume": (F.conv_transpose3d, (1, 1, 2, 1, 2), (1, 2, 2, 1, 2), {"stride": 2}),
    "without samples": (F.conv1d, (0, 2, 4), (4, 2, 3), {"stride": 2}),
}


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", CONVOLVED)
def test_convolutions_agree_with_torch_to_the_third_derivative(name, with_bias):
    func, shape, weight_shape, options = CONVOLVED[name]
    manual_seed(0)
    leaves = [torch.randn(size, dtype=torch.float64) for size in (shape, weight_shape)]
    if with_bias:
        transposed = func.__name__.startswith("conv_transpose")
        channels = weight_shape[1] * options.get("groups", 1) if transposed else weight_shape[0]
        leaves.append(torch.randn(channels, dtype=torch.float64))
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def ours(x, weight, bias=None):
        return convolve(func, x, weight, bias, **options)

    def slopes(*inputs):
        # Of the third power, so that further derivatives do not vanish.
        return torch.autograd.grad(ours(*inputs).pow(3).sum(), inputs, create_graph=True)

    assert torch.equal(ours(*leaves), func(*leaves, **options))
    if shape[0] == 0:
        assert all(not slope.any() for slope in slopes(*leaves))
        return
    assert gradcheck(ours, leaves)
    assert gradgradcheck(ours, leaves)
    assert gradcheck(slopes, leaves)
    with torch.no_grad():
        directions = [torch.randn_like(leaf) for leaf in leaves]

    def curvatures(*inputs):
        return torch.autograd.grad(slopes(*inputs), inputs, directions, create_graph=True)

    assert gradcheck(curvatures, leaves)


def test_no_gradient_of_a_weight_is_taken_for_every_tangent():
    manual_seed(0)
    net = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.SiLU(), nn.ConvTranspose1d(4, 2, 2))
    z = torch.randn(3, 1, 4)
    taken = reverse(net, z)
    with Convolutions() as counted:
        taken.jvp(basis_of(z))
    # Of a product that is pulled and of all tangents at once, for both layers.
    assert counted.shapes == [(3, 4, 4), (3, 1, 4), (12, 4, 4), (12, 2, 5)]


class Convolutions(TorchDispatchMode):
    """Notes the shapes of results of convolutions, and forbids gradients of their weights."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.shapes.append(tuple(result.shape))
        if func is torch.ops.aten.convolution_backward.default:
            assert args[-1][1:] == [False, False]
            self.shapes.append(tuple(result[0].shape))
        return result

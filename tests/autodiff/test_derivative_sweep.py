"""Log-volumes and surrogates of decoders that hold any differentiable function of torch.

Every result is compared with central differences, which know nothing of autograd: Jacobians with
those of the function, gradients with those of the values, second derivatives with those of the
gradients. What torch cannot differentiate, or would differentiate wrongly, is refused by name.
"""

from __future__ import annotations

import pytest
import torch
from support.comparison import agree
from support.dense import numerical_jacobian
from support.derivative_oracles import (
    BATCH,
    LATENT,
    OF_SLOPES,
    OF_VALUES,
    Decoder,
    Differences,
    draw,
    slope_along,
    value_and_slope,
)
from support.differentiable_functions import FUNCTIONS
from support.networks import ReverseOnce
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import normflows_injective as nfi
from normflows_injective.autodiff import proven, tangents
from normflows_injective.autodiff.products import jvp
from normflows_injective.autodiff.recording import record
from normflows_injective.errors import ForwardModeError, UnsupportedLayerError
from normflows_injective.volume import estimators, log_volume

pytestmark = pytest.mark.usefixtures("quiet")
# What torch has no second derivative of, so that the gradient is refused.
WITHOUT_GRADIENT = {"conv_tbc", "hardsigmoid", "ldl", "weight_norm of the input"}
# What it has one of in some releases.
OF_RELEASES = {
    "aminmax",
    "grid_sample of both",
    "grid_sample places",
    "grid_sample values",
    "pdist",
    "scripted cdist",
}
# What torch has no derivative of at all.
WITHOUT_VALUE = {"conv_tbc", "ldl"}
# What has a third derivative in torch that is wrong, and cannot be replaced where it stands.
WITHOUT_SECOND_DERIVATIVE = {
    "checkpoint",
    "exported layer norm",
    "logcumsumexp",
    "native_layer_norm",
    "scripted layer norm",
    "traced layer norm",
    "autograd.Function",
    # These have only the first, and that in newer releases.
    "pdist",
    "scripted cdist",
}
# A script is compiled at its third call, after which nobody sees its functions.
UNDECIDED = {"scripted solve"}


def has_gradient(name):
    """Whether a log-volume has a gradient here: one of second derivatives in torch."""
    if name not in OF_RELEASES:
        return name not in WITHOUT_GRADIENT
    z, weight, _ = draw()
    with sdpa_kernel(SDPBackend.MATH):
        value = Decoder(FUNCTIONS[name], weight.requires_grad_())(z.requires_grad_())
        cotangent = torch.ones_like(value).requires_grad_()
        try:
            pulled = torch.autograd.grad(value, z, cotangent, create_graph=True)[0]
            torch.autograd.grad(pulled.sum(), (cotangent, weight), allow_unused=True)
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            return False
    return True


def has_value(name):
    """Whether torch has a first derivative, and so a log-volume has a value."""
    return name not in WITHOUT_VALUE and (name != "aminmax" or has_gradient(name))


def second_derivative(name):
    return None if name in UNDECIDED else name not in WITHOUT_SECOND_DERIVATIVE


def check_derivatives(volume, weight, direction, second, value=None):
    """First and second derivative of a number by the weight, along one direction."""
    leaf = weight.clone().requires_grad_()
    found = volume(leaf)
    if value is not None:
        agree(found.detach(), value, 1e-7)
    differences = Differences(value_and_slope(volume, direction), weight, direction)
    slope = slope_along(found, leaf, direction, create_graph=True)
    agree(slope.detach(), differences.expected(slope.detach(), OF_VALUES, 1e-5), 3e-4)
    if second is None:
        return
    if not second:
        with pytest.raises(UnsupportedLayerError, match="second derivative"):
            torch.autograd.grad(slope, leaf)
        return
    curvature = slope_along(slope, leaf, direction, create_graph=False)
    agree(curvature, differences.expected(curvature, OF_SLOPES, 1e-4), 1e-3)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_log_volume(name):
    z, weight, direction = draw()

    def volume(w):
        return log_volume(Decoder(FUNCTIONS[name], w), z)

    if not has_value(name):
        with pytest.raises(UnsupportedLayerError), torch.no_grad():
            volume(weight)
        return
    decode = Decoder(FUNCTIONS[name], weight)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.linalg.svdvals(numerical_jacobian(decode, z)).log().sum(1)
    with torch.no_grad():
        agree(volume(weight), expected, 1e-7)
    if not has_gradient(name):
        with pytest.raises(UnsupportedLayerError):
            volume(weight.requires_grad_())
        return
    check_derivatives(volume, weight, direction, second_derivative(name), expected)


def traces_of(name, z, weight, matrix):
    """The terms (B, LATENT) of the trace of the product, by one reverse pass each."""
    leaf = z.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        value = Decoder(FUNCTIONS[name], weight)(leaf)
        pulled = [
            torch.autograd.grad(value, leaf, row.expand_as(value).contiguous(), retain_graph=True)[
                0
            ]
            for row in matrix.T
        ]
    return torch.stack(pulled, 1).diagonal(dim1=1, dim2=2)


def skip_without_transforms(error):
    """Skip a test where the transforms of this torch refuse a batch of cotangents, or raise."""
    if "MKL FFT" in str(error):
        pytest.skip(str(error))
    if "is not implemented" not in str(error):
        raise error


def volume_by_surrogate(estimator, decode, z, matrix):
    """Of an affine encoder that gives z, and with the basis as probes."""
    x = decode(z).detach()
    offset = z - x @ matrix
    probes = LATENT**0.5 * torch.eye(LATENT).double().unsqueeze(1).expand(LATENT, BATCH, LATENT)
    surrogate = estimators.ESTIMATORS[estimator]
    return surrogate(x, lambda s: s @ matrix + offset, decode, lambda latents: probes).volume


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in WITHOUT_VALUE])
def test_surrogates_with_as_many_probes_as_latents(name):
    """Values are those of the dense trace, and gradients those of its differentiated factor."""
    if not has_value(name):
        pytest.skip("this release of torch has no derivative of it")
    z, weight, direction = draw()
    with sdpa_kernel(SDPBackend.MATH):
        dense = numerical_jacobian(Decoder(FUNCTIONS[name], weight), z)
    matrix = torch.randn(dense.shape[1], LATENT).double() / 4
    traces = torch.einsum("dk,bdk->bk", matrix, dense)
    differences = Differences(lambda w: traces_of(name, z, w, matrix), weight, direction)
    by_encoder = {"decoder": torch.zeros_like(traces).bool(), "conditional": traces < 1}
    for estimator, of_encoder in by_encoder.items():
        leaf, encoder = weight.clone().requires_grad_(), matrix.clone().requires_grad_()
        try:
            value = volume_by_surrogate(estimator, Decoder(FUNCTIONS[name], leaf), z, encoder)
        except UnsupportedLayerError:
            assert not has_gradient(name)
            continue
        except RuntimeError as error:
            skip_without_transforms(error)
        agree(value.detach(), (torch.where(of_encoder, -1.0, 1.0) * traces).sum(1), 1e-6)
        try:
            by_weight, by_matrix = torch.autograd.grad(
                value.sum(), (leaf, encoder), materialize_grads=True
            )
        except RuntimeError as error:
            skip_without_transforms(error)
            assert not has_gradient(name)
            continue
        slope = (by_weight * direction).sum()
        agree(slope, differences.expected(slope, ~of_encoder, 1e-5), 1e-5)
        agree(by_matrix, -torch.einsum("bk,bdk->dk", of_encoder.double(), dense), 1e-6)


class Names(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        overloaded = isinstance(func, torch._ops.OpOverload)
        self.names.add((func.overloadpacket if overloaded else func).__name__)
        return func(*args, **(kwargs or {}))


def derivative_of(function):
    """The gradient of a sum of sines of what a function gives."""

    def gradient(h):
        with torch.enable_grad():
            point = h if h.requires_grad else h.detach().requires_grad_()
            value = function(point).flatten(1).sin()
            weights = 1 + torch.arange(value.shape[1], dtype=value.dtype).cos() / 2
            return torch.autograd.grad((value * weights).sum(), point, create_graph=True)[0]

    return gradient


def nodes_of(value):
    seen, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(following for following, _ in node.next_functions)
    return {node.name() for node in seen}


@pytest.mark.slow
def test_all_that_is_trusted_has_been_swept():
    z, weight, _ = draw()
    names, nodes = set(), set()
    for name, function in FUNCTIONS.items():
        if not has_value(name):
            continue
        for swept in (function, derivative_of(function)):
            with Names() as seen:
                value = Decoder(swept, weight.clone().requires_grad_())(z.requires_grad_())
            names |= seen.names
            nodes |= nodes_of(value)
            nodes |= nodes_of(record(Decoder(swept, weight), z).value)
    assert proven.TANGENTS - names <= {"aminmax"}
    # Nodes that some releases of torch from 2.8 to 2.14 do not have.
    assert proven.DERIVATIVES - nodes <= {
        "AminmaxBackward0",
        "GridSampler2DBackwardBackward0",
        "LdexpBackward0",
        "SafeSoftmaxBackward0",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_log_volume_of_decoders_that_are_derivatives(name):
    if not has_gradient(name):
        pytest.skip("this release of torch has no second derivative of it")
    z, weight, direction = draw()

    def volume(w):
        return log_volume(Decoder(derivative_of(FUNCTIONS[name]), w), z)

    try:
        volume(weight.clone().requires_grad_())
    except UnsupportedLayerError:
        assert name in WITHOUT_SECOND_DERIVATIVE
        return
    check_derivatives(volume, weight, direction, second_derivative(name))


UNKNOWN = ["tanh", "softmax", "solve", "cumprod", "conv2d", "func.vmap inside", "scripted solve"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_functions_that_nobody_has_swept(name, monkeypatch):
    """They take roads of no more than two reverse passes, and have no second derivative."""
    monkeypatch.setattr(proven, "DERIVATIVES", frozenset())
    monkeypatch.setattr(tangents, "has_proven_tangent", lambda func: False)
    z, weight, direction = draw()

    def volume(w):
        return log_volume(Decoder(FUNCTIONS[name], w), z)

    expected = torch.linalg.svdvals(numerical_jacobian(Decoder(FUNCTIONS[name], weight), z))
    with torch.no_grad():
        agree(volume(weight), expected.log().sum(1), 1e-7)
    check_derivatives(volume, weight, direction, second=False)


def test_what_can_be_differentiated_once_has_values_and_no_gradient():
    """Torch drops the missing part of such a gradient in silence where inputs are named."""
    z, weight, _ = draw()
    decode = Decoder(ReverseOnce.apply, weight)
    with torch.no_grad():
        expected = torch.linalg.svdvals(numerical_jacobian(decode, z)).log().sum(1)
        agree(log_volume(decode, z), expected, 1e-7)
    with pytest.raises(UnsupportedLayerError, match="has no second derivative"):
        log_volume(decode, z.requires_grad_())
    x = decode(z).detach()
    matrix = torch.randn(x.shape[1], LATENT).double()
    for estimator in ("decoder", "conditional"):
        with pytest.raises(UnsupportedLayerError, match="second"):
            nfi.SurrogateLikelihood(estimator=estimator)(x, lambda s: s @ matrix, decode)


def test_one_tangent_of_a_function_whose_forward_rule_is_wrong():
    z, weight, _ = draw()
    for name in ("cholesky_inverse", "scatter_reduce"):
        decode = Decoder(FUNCTIONS[name], weight)
        tangent = torch.ones_like(z)
        _, pushed = jvp(decode, z, tangent.unsqueeze(0))
        agree(pushed[0], numerical_jacobian(decode, z).sum(2), 1e-7)


# Forward mode of a caller's.


def smooth(weight):
    return Decoder(torch.tanh, weight)


def test_forward_mode_of_the_log_volume_by_latents():
    z, weight, _ = draw()
    direction = torch.randn_like(z)
    volume = lambda s: log_volume(smooth(weight), s)  # noqa: E731
    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(volume(leaf).sum(), leaf)
    for name in ("tanh", "native_layer_norm"):
        volume = lambda s, n=name: log_volume(Decoder(FUNCTIONS[n], weight), s)  # noqa: E731
        leaf = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(volume(leaf).sum(), leaf)
        pushed = torch.func.jvp(volume, (z,), (direction,))[1]
        agree(pushed, (gradient * direction).sum(1), 1e-8)
        with torch.no_grad():
            agree(torch.func.jvp(volume, (z,), (direction,))[1], pushed, 1e-8)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(z, direction)
            agree(torch.autograd.forward_ad.unpack_dual(volume(dual)).tangent, pushed, 1e-8)
    forward = torch.func.jacfwd(volume)(z)
    agree(forward.diagonal(dim1=0, dim2=1).T, gradient, 1e-8)


@pytest.mark.parametrize("hold", [lambda net: net, lambda net: lambda s: net(s).sin()])
def test_scripts_inside_functional_transforms_are_refused_by_name(hold):
    """Torch alone has wrong derivatives of derivatives there, which depend on earlier calls."""
    script = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.SiLU()).double())
    decode, z = hold(script), draw().z

    def volume(s):
        return log_volume(decode, s)

    volume(z.clone().requires_grad_()).sum().backward()  # is no matter of torch.func
    with pytest.raises(UnsupportedLayerError, match="holds TorchScript"):
        torch.func.grad(lambda s: volume(s).sum())(z)
    with pytest.raises(UnsupportedLayerError, match="holds TorchScript"):
        torch.func.jvp(volume, (z,), (torch.ones_like(z),))


def test_hidden_scripts_inside_functional_transforms_are_refused_once_they_are_optimised():
    script = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.SiLU()).double())
    hidden, z = {"net": script}, draw().z

    def volume(s):
        return log_volume(lambda point: hidden["net"](point), s)

    for _ in range(4):
        script(z.clone().requires_grad_()).sum().backward()
        torch.func.grad(lambda s: script(s).square().sum())(z)
    with pytest.raises(UnsupportedLayerError, match="holds TorchScript"):
        torch.func.grad(lambda s: volume(s).sum())(z)
    with pytest.raises(UnsupportedLayerError, match="holds TorchScript"):
        torch.func.jvp(volume, (z,), (torch.ones_like(z),))


def test_the_decoded_batch_has_its_forward_derivative_too():
    z, weight, _ = draw()
    decode = Decoder(FUNCTIONS["cholesky_inverse"], weight)
    value_of = lambda s: nfi.volume.decode_and_log_volume(decode, s).x  # noqa: E731
    pushed = torch.func.jvp(value_of, (z,), (torch.ones_like(z),))[1]
    agree(pushed, numerical_jacobian(decode, z).sum(2), 1e-7)


def test_forward_mode_by_parameters_or_twice_is_refused_by_name():
    z, weight, direction = draw()
    by_weight = lambda w: log_volume(smooth(w), z)  # noqa: E731
    with pytest.raises(ForwardModeError, match="Use reverse mode"):
        torch.func.jvp(by_weight, (weight,), (direction,))
    with pytest.raises(ForwardModeError, match="Use reverse mode twice"):
        torch.func.hessian(lambda s: log_volume(smooth(weight), s).sum())(z)
    twice = torch.func.jacrev(torch.func.grad(lambda s: log_volume(smooth(weight), s).sum()))(z)
    leaf = z.clone().requires_grad_()
    expected = torch.autograd.functional.hessian(
        lambda s: log_volume(smooth(weight), s).sum(), leaf
    )
    agree(twice, expected, 1e-8)


@pytest.mark.parametrize("estimator", estimators.ESTIMATORS)
@pytest.mark.parametrize("where", ["data", "encoder", "decoder"])
def test_forward_mode_of_surrogates_is_refused_by_name(estimator, where):
    encode, decode = torch.randn(4, 2).double(), torch.randn(2, 4).double()
    x = torch.randn(3, 4).double()
    likelihood = nfi.SurrogateLikelihood(estimator=estimator)
    inputs = {"data": x, "encoder": encode, "decoder": decode}

    def loss(changed):
        parts = {**inputs, where: changed}
        terms = likelihood(
            parts["data"],
            lambda s: (s @ parts["encoder"]).tanh(),
            lambda z: z.sin() @ parts["decoder"],
        )
        return terms.volume.sum()

    tangent = torch.ones_like(inputs[where])
    with pytest.raises(ForwardModeError, match="stop-gradients"):
        torch.func.jvp(loss, (inputs[where],), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs[where], tangent)
        with pytest.raises(ForwardModeError, match="stop-gradients"):
            loss(dual)
        # A level that nothing of this has to do with is no obstacle.
        assert torch.isfinite(loss(inputs[where]))


def test_reverse_mode_through_functional_transforms():
    z, weight, _ = draw()
    for name in ("tanh", "layer_norm", "native_layer_norm", "cdist", "solve"):
        volume = lambda s, n=name: log_volume(Decoder(FUNCTIONS[n], weight), s).sum()  # noqa: E731
        leaf = z.clone().requires_grad_()
        (expected,) = torch.autograd.grad(volume(leaf), leaf)
        agree(torch.func.grad(volume)(z), expected, 1e-8)

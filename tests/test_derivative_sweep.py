"""Log-volumes and surrogates of decoders that hold any differentiable function of torch.

Every result is compared with central differences, which know nothing of autograd: Jacobians with
those of the function, gradients with those of the values, second derivatives with those of the
gradients. What torch cannot differentiate, or would differentiate wrongly, is refused by name.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from dense import numerical_jacobian
from differentiable_functions import FUNCTIONS, WIDTH
from seeds import seeded_generator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import normflows_injective as nfi
from normflows_injective.errors import ForwardModeError, UnsupportedLayerError
from normflows_injective.volume import estimators, log_volume, proven, tangents
from normflows_injective.volume.products import jvp
from normflows_injective.volume.recording import record

BATCH, LATENT, STEP = 3, 2, 1e-5

# What torch has no second derivative of, so that the gradient is refused.
WITHOUT_GRADIENT = {
    "conv_tbc",
    "hardsigmoid",
    "ldl",
    "pdist",
    "scripted cdist",
    "weight_norm of the input",
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
}
# A script is compiled at its third call, after which nobody sees its functions.
UNDECIDED = {"scripted solve"}


def second_derivative(name):
    return None if name in UNDECIDED else name not in WITHOUT_SECOND_DERIVATIVE


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Decoder:
    """A function of mixed latents, with the latents beside it."""

    def __init__(self, function, weight):
        self.function, self.weight = function, weight

    def __call__(self, z):
        return torch.cat([self.function(z @ self.weight).flatten(1), z], 1)


def draw():
    generator = seeded_generator(0)
    options = {"generator": generator, "dtype": torch.float64}
    return (
        torch.randn(BATCH, LATENT, **options),
        torch.randn(LATENT, WIDTH, **options),
        torch.randn(LATENT, WIDTH, **options),
    )


def slope(value_of, weight, direction):
    """Central difference of a number along a direction of the weight."""
    above, below = (value_of(weight + sign * STEP * direction) for sign in (1, -1))
    return (above - below) / (2 * STEP)


def close(actual, expected, rtol):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


def first_slope(volume, weight, direction, create_graph=False):
    leaf = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(volume(leaf).sum(), leaf, create_graph=create_graph)
    return leaf, (gradient * direction).sum()


def check_derivatives(volume, weight, direction, second):
    """First and second derivative of a number by the weight, along one direction."""
    with torch.no_grad():
        expected = slope(lambda w: volume(w).sum(), weight, direction)
    leaf, actual = first_slope(volume, weight, direction, create_graph=True)
    close(actual.detach(), expected, 1e-5)
    if second is None:
        return
    if not second:
        with pytest.raises(UnsupportedLayerError, match="second derivative"):
            torch.autograd.grad(actual, leaf)
        return
    expected = slope(lambda w: first_slope(volume, w, direction)[1], weight, direction)
    found = torch.autograd.grad(actual, leaf)[0] if actual.requires_grad else 0 * leaf
    close((found * direction).sum(), expected, 1e-4)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_log_volume(name):
    z, weight, direction = draw()

    def volume(w):
        return log_volume(Decoder(FUNCTIONS[name], w), z)

    if name in WITHOUT_VALUE:
        with pytest.raises(UnsupportedLayerError), torch.no_grad():
            volume(weight)
        return
    decode = Decoder(FUNCTIONS[name], weight)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.linalg.svdvals(numerical_jacobian(decode, z)).log().sum(1)
    with torch.no_grad():
        close(volume(weight), expected, 1e-7)
    if name in WITHOUT_GRADIENT:
        with pytest.raises(UnsupportedLayerError):
            volume(weight.requires_grad_())
        return
    close(volume(weight.requires_grad_()).detach(), expected, 1e-7)
    weight = weight.detach()
    check_derivatives(volume, weight, direction, second_derivative(name))


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in WITHOUT_VALUE])
@pytest.mark.parametrize("estimator", ["decoder", "conditional"])
def test_surrogates_with_as_many_probes_as_latents(name, estimator):
    """The expected value is that of the dense trace, and the gradient its central difference."""
    z, weight, direction = draw()
    matrix = torch.randn(Decoder(FUNCTIONS[name], weight)(z).shape[1], LATENT).double() / 4

    def terms(w):
        decode = Decoder(FUNCTIONS[name], w)
        x = decode(z).detach()
        offset = z - x @ matrix
        basis = torch.eye(LATENT).double().unsqueeze(1).expand(LATENT, BATCH, LATENT)
        draw_basis = lambda latents: basis * LATENT**0.5  # noqa: E731
        surrogate = estimators.ESTIMATORS[estimator]
        return surrogate(x, lambda s: s @ matrix + offset, decode, draw_basis).volume

    try:
        leaf = weight.clone().requires_grad_()
        value = terms(leaf)
    except UnsupportedLayerError:
        assert name in WITHOUT_GRADIENT
        return
    with sdpa_kernel(SDPBackend.MATH):
        dense = numerical_jacobian(Decoder(FUNCTIONS[name], weight), z)
    columns = torch.einsum("dk,bdk->bk", matrix, dense)
    sign = 1.0 if estimator == "decoder" else torch.where(columns < 1, -1.0, 1.0)
    close(value.detach(), (sign * columns).sum(1), 1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    if estimator == "decoder":
        with torch.no_grad():
            expected = slope(lambda w: terms(w).sum(), weight, direction)
        close((gradient * direction).sum(), expected, 1e-5)


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


def test_all_that_is_trusted_has_been_swept():
    z, weight, _ = draw()
    names, nodes = set(), set()
    for name, function in FUNCTIONS.items():
        if name in WITHOUT_VALUE:
            continue
        for swept in (function, derivative_of(function)):
            with Names() as seen:
                value = Decoder(swept, weight.clone().requires_grad_())(z.requires_grad_())
            names |= seen.names
            nodes |= nodes_of(value)
            nodes |= nodes_of(record(Decoder(swept, weight), z).value)
    assert proven.TANGENTS - names == set()
    assert proven.DERIVATIVES - nodes == set()


def swept_derivatives():
    return [n for n in FUNCTIONS if n not in WITHOUT_GRADIENT]


@pytest.mark.slow
@pytest.mark.parametrize("name", swept_derivatives())
def test_log_volume_of_decoders_that_are_derivatives(name):
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
        close(volume(weight), expected.log().sum(1), 1e-7)
    check_derivatives(volume, weight, direction, second=False)


class ReverseOnce(torch.autograd.Function):
    """A derivative that cuts itself off the graph."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_what_can_be_differentiated_once_has_values_and_no_gradient():
    """Torch drops the missing part of such a gradient in silence where inputs are named."""
    z, weight, _ = draw()
    decode = Decoder(ReverseOnce.apply, weight)
    with torch.no_grad():
        expected = torch.linalg.svdvals(numerical_jacobian(decode, z)).log().sum(1)
        close(log_volume(decode, z), expected, 1e-7)
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
        close(pushed[0], numerical_jacobian(decode, z).sum(2), 1e-7)


# Forward mode of a caller's.


def smooth(weight):
    return Decoder(torch.tanh, weight)


def test_forward_mode_of_the_log_volume_by_latents():
    z, weight, _ = draw()
    direction = torch.randn_like(z)
    volume = lambda s: log_volume(smooth(weight), s)  # noqa: E731
    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(volume(leaf).sum(), leaf)
    for name in ("tanh", "native_layer_norm", "scripted solve"):
        volume = lambda s, n=name: log_volume(Decoder(FUNCTIONS[n], weight), s)  # noqa: E731
        leaf = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(volume(leaf).sum(), leaf)
        pushed = torch.func.jvp(volume, (z,), (direction,))[1]
        close(pushed, (gradient * direction).sum(1), 1e-8)
        with torch.no_grad():
            close(torch.func.jvp(volume, (z,), (direction,))[1], pushed, 1e-8)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(z, direction)
            close(torch.autograd.forward_ad.unpack_dual(volume(dual)).tangent, pushed, 1e-8)
    forward = torch.func.jacfwd(volume)(z)
    close(forward.diagonal(dim1=0, dim2=1).T, gradient, 1e-8)


def test_the_decoded_batch_has_its_forward_derivative_too():
    z, weight, _ = draw()
    decode = Decoder(FUNCTIONS["cholesky_inverse"], weight)
    value_of = lambda s: nfi.volume.decode_and_log_volume(decode, s).x  # noqa: E731
    pushed = torch.func.jvp(value_of, (z,), (torch.ones_like(z),))[1]
    close(pushed, numerical_jacobian(decode, z).sum(2), 1e-7)


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
    close(twice, expected, 1e-8)


@pytest.mark.parametrize("estimator", estimators.ESTIMATORS)
@pytest.mark.parametrize("where", ["data", "encoder", "decoder"])
def test_forward_mode_of_surrogates_is_refused_by_name(estimator, where):
    encode, decode = torch.randn(4, 2).double(), torch.randn(2, 4).double()
    x = torch.randn(3, 4).double()
    likelihood = nfi.SurrogateLikelihood(estimator=estimator)
    given = {"data": x, "encoder": encode, "decoder": decode}

    def loss(changed):
        parts = {**given, where: changed}
        terms = likelihood(
            parts["data"],
            lambda s: (s @ parts["encoder"]).tanh(),
            lambda z: z.sin() @ parts["decoder"],
        )
        return terms.volume.sum()

    tangent = torch.ones_like(given[where])
    with pytest.raises(ForwardModeError, match="stop-gradients"):
        torch.func.jvp(loss, (given[where],), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(given[where], tangent)
        with pytest.raises(ForwardModeError, match="stop-gradients"):
            loss(dual)
        # A level that nothing of this has to do with is no obstacle.
        assert torch.isfinite(loss(given[where]))


def test_reverse_mode_through_functional_transforms():
    z, weight, _ = draw()
    for name in ("tanh", "layer_norm", "native_layer_norm", "cdist", "solve"):
        volume = lambda s, n=name: log_volume(Decoder(FUNCTIONS[n], weight), s).sum()  # noqa: E731
        leaf = z.clone().requires_grad_()
        (expected,) = torch.autograd.grad(volume(leaf), leaf)
        close(torch.func.grad(volume)(z), expected, 1e-8)

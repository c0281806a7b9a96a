"""Forward products: those of torch, in fewer kernels, and without a trace on the graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.counting import Products
from support.dense import dense_jacobian
from support.networks import ReverseOnce
from support.seeds import manual_seed
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import normflows_injective as nfi
from normflows_injective.autodiff import jacobians, settings
from normflows_injective.autodiff.products import jvp
from normflows_injective.autodiff.tangents import SkipZeroProducts, TangentsWithoutGraph
from normflows_injective.volume import jacobian

MODES = [SkipZeroProducts, TangentsWithoutGraph]


def plain_jvp(function, point, tangents):
    """Value and products by torch alone, one tangent at a time."""
    pairs = [torch.func.jvp(function, (point,), (tangent,)) for tangent in tangents]
    return pairs[0][0], torch.stack([product for _, product in pairs])


def probes_like(z, count):
    return torch.randn(count, *z.shape, dtype=z.dtype)


AFFINE = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "linear over axes": (lambda: nn.Linear(4, 3), (2, 5, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, 2, 1), (2, 6, 5)),
    "conv2d without bias": (lambda: nn.Conv2d(2, 4, 3, bias=False), (2, 6, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 5, 5)),
    "dilated": (lambda: nn.Conv2d(2, 3, 3, dilation=2), (2, 6, 6)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    "reflect": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5)),
    "same": (lambda: nn.Conv2d(2, 3, 4, padding="same", dilation=2), (2, 7, 6)),
    "valid": (lambda: nn.Conv1d(2, 3, 3, padding="valid"), (2, 6)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, stride=(1, 2, 1)), (1, 4, 4, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(2, 3, 3, 2, 1, output_padding=1), (2, 4)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 2, 4, 2, 1, (1, 0), groups=2), (4, 3, 3)),
    "transposed dilated": (lambda: nn.ConvTranspose2d(2, 3, 2, bias=False, dilation=2), (2, 3, 3)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(1, 2, 2, 2), (1, 2, 2, 2)),
}


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("mode", MODES)
def test_affine_layers_take_one_product_for_the_value_and_one_for_the_tangent(name, mode, dtype):
    build, shape = AFFINE[name]
    layer, z = build().to(dtype), torch.randn(3, *shape, dtype=dtype)
    expected = plain_jvp(layer, z, z[None].cos())
    with Products() as counter, mode():
        actual = torch.func.jvp(layer, (z,), (z.cos(),))
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(actual[1], expected[1][0])
    assert counter.total == 2


@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed 2d", "same"])
@pytest.mark.parametrize("count", [1, 3])
def test_several_tangents_share_the_value(name, count, dtype):
    build, shape = AFFINE[name]
    layer, z = build().to(dtype), torch.randn(3, *shape, dtype=dtype)
    tangents = probes_like(z, count)
    with Products() as counter:
        value, pushed = jvp(layer, z, tangents)
    expected = plain_jvp(layer, z, tangents)
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(pushed, expected[1])
    assert counter.total == 2


def test_arguments_by_keyword(dtype):
    weight, bias = torch.randn(2, 2, 3, 3, dtype=dtype), torch.randn(2, dtype=dtype)
    z = torch.randn(2, 2, 5, 5, dtype=dtype)
    calls = [
        lambda s: F.conv2d(s, weight, bias=bias, stride=2),
        lambda s: F.conv2d(s, weight, None, padding=1),
        lambda s: F.conv2d(s, weight=weight, bias=bias),
        lambda s: F.conv2d(input=s, weight=weight, bias=bias),
        lambda s: F.conv_transpose2d(s, weight, bias=bias, output_padding=1, stride=2),
        lambda s: F.softplus(input=s),
        lambda s: F.silu(input=s),
        lambda s: torch.tanh(input=s),
        lambda s: F.leaky_relu(negative_slope=0.3, input=s),
        lambda s: F.group_norm(num_groups=2, input=s),
    ]
    for call in calls:
        tangents = probes_like(z, 2)
        for a, e in zip(jvp(call, z, tangents), plain_jvp(call, z, tangents), strict=True):
            torch.testing.assert_close(a, e)


ELEMENTWISE = {
    "celu": F.celu,
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu tanh": lambda s: F.gelu(s, approximate="tanh"),
    "glu": lambda s: F.glu(s, 1),
    "hardswish": F.hardswish,
    "leaky relu": lambda s: F.leaky_relu(s, 0.3),
    "logsigmoid": F.logsigmoid,
    "log_softmax": lambda s: F.log_softmax(s, 1),
    "mish": F.mish,
    "relu": F.relu,
    "selu": F.selu,
    "silu": F.silu,
    "softmax": lambda s: F.softmax(s, dim=1),
    "softmax in double": lambda s: F.softmax(s, 1, dtype=torch.float64),
    "softplus": lambda s: F.softplus(s, beta=2.0, threshold=1.0),
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "rms_norm": lambda s: F.rms_norm(s, (5,)),
    "layer_norm": lambda s: F.layer_norm(s, (5,), eps=0.1),
    "layer_norm over two axes": lambda s: F.layer_norm(s, (4, 5)),
    "group_norm": lambda s: F.group_norm(s, 2, eps=0.1),
    "sin": torch.sin,
    "cos": torch.cos,
    "exp": torch.exp,
    "torch.relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "method": lambda s: s.tanh() * s.sigmoid(),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_activations_and_normalisations_give_the_tangents_of_torch(name, dtype):
    function, z = ELEMENTWISE[name], torch.randn(3, 4, 5, dtype=dtype, requires_grad=True)
    tangents = probes_like(z, 3)
    for chosen in (tangents[:1], tangents):
        value, pushed = jvp(function, z, chosen)
        expected = plain_jvp(function, z, chosen)
        torch.testing.assert_close(value, expected[0])
        torch.testing.assert_close(pushed, expected[1])
        assert not pushed.requires_grad
        (actual,) = torch.autograd.grad(value.sin().sum(), z)
        (plain,) = torch.autograd.grad(function(z).sin().sum(), z)
        torch.testing.assert_close(actual, plain)


def test_tangents_of_covered_functions_are_on_no_graph(dtype):
    z = torch.randn(3, 4, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    covered = {name: f for name, f in ELEMENTWISE.items() if name != "method"}
    for name, function in {**covered, "linear": lambda s: F.linear(s, weight)}.items():
        with TangentsWithoutGraph():
            value, pushed = torch.func.jvp(function, (z,), (z.detach().cos(),))
        assert value.requires_grad, name
        assert not pushed.requires_grad, name
    with SkipZeroProducts():
        assert torch.func.jvp(torch.tanh, (z,), (z.detach(),))[1].requires_grad


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.GroupNorm(4, 4)])
def test_norms_with_scales_shifts_and_epsilon(norm, dtype):
    norm = norm.to(dtype)
    norm.eps = 0.3
    for parameter in norm.parameters():
        parameter.data.uniform_(0.5, 2.0)
    z = torch.randn(3, 4, dtype=dtype) if isinstance(norm, nn.LayerNorm) else None
    z = torch.randn(3, 4, 6, dtype=dtype) if z is None else z
    tangents = probes_like(z, 2)
    for a, e in zip(jvp(norm, z, tangents), plain_jvp(norm, z, tangents), strict=True):
        torch.testing.assert_close(a, e)


INPLACE = {
    "relu": lambda: nn.ReLU(inplace=True),
    "silu": lambda: nn.SiLU(inplace=True),
    "mish": lambda: nn.Mish(inplace=True),
    "selu": lambda: nn.SELU(inplace=True),
    "elu": lambda: nn.ELU(inplace=True),
    "celu": lambda: nn.CELU(inplace=True),
    "hardswish": lambda: nn.Hardswish(inplace=True),
    "leaky relu": lambda: nn.LeakyReLU(0.2, inplace=True),
    "flag that is an int": lambda: nn.ELU(inplace=1),
}


@pytest.mark.parametrize("name", INPLACE)
@pytest.mark.parametrize("count", [1, 3])
def test_activations_in_place(name, count, dtype):
    """Also right after a linear layer, whose value is what they overwrite."""
    net = nn.Sequential(nn.Linear(3, 8), INPLACE[name](), nn.Linear(8, 5), INPLACE[name]())
    net, z = net.to(dtype), torch.randn(4, 3, dtype=dtype)
    check_against_dense(net, z, count)


def check_against_dense(net, z, count=2, parameters=None):
    """Value, its gradients, and products against dense Jacobians, with nothing else changed."""
    parameters = list(net.parameters()) if parameters is None else parameters
    z = z.clone().requires_grad_()
    before, tangents = z.detach().clone(), probes_like(z, count)
    value, pushed = jvp(net, z, tangents)
    dense = dense_jacobian(net, z.detach()).detach()
    expected = torch.einsum("bij,kbj->kbi", dense, tangents.flatten(2))
    torch.testing.assert_close(pushed.flatten(2), expected)
    torch.testing.assert_close(value, net(z))
    torch.testing.assert_close(z.detach(), before, rtol=0, atol=0)
    assert not pushed.requires_grad
    ends = [z, *parameters]
    actual = torch.autograd.grad(value.square().sum(), ends, allow_unused=True)
    plain = torch.autograd.grad(net(z).square().sum(), ends, allow_unused=True)
    torch.testing.assert_close(actual, plain)


class HyperNetwork(nn.Module):
    """Weight and bias of its last layer depend on the input of the batch."""

    def __init__(self, weight: bool, bias: bool):
        super().__init__()
        self.weight, self.bias = (nn.Linear(3, 15) if weight else None), bias
        self.fixed = nn.Linear(3, 5)

    def forward(self, z):
        rows = []
        for row in z:
            weight = self.fixed.weight if self.weight is None else self.weight(row).view(5, 3)
            bias = row.sum() * self.fixed.bias if self.bias else None
            rows.append(F.linear(row.unsqueeze(0), weight, bias))
        return torch.cat(rows)


class Attention(nn.Module):
    def __init__(self, fan_in, fan_out, layer):
        super().__init__()
        self.input, self.output = nn.Linear(fan_in, 8), nn.Linear(8, fan_out)
        self.layer = layer

    def forward(self, z):
        h = self.input(z).view(-1, 2, 4)
        h = h + self.layer(h, h, h, need_weights=False)[0]
        return self.output(h.flatten(1))


class WithRaw(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))
        self.bilinear = nn.Bilinear(3, 3, 5)

    def forward(self, z):
        einsum = torch.einsum("oi,bi->bo", self.weight, z)
        return z @ self.weight.T + einsum.tanh() + torch.matmul(z, self.weight.mT) * einsum


class WithBilinear(WithRaw):
    def forward(self, z):
        return self.bilinear(z, torch.sin(z)) + super().forward(z)


def sandwich(*layers):
    return nn.Sequential(nn.Linear(3, 8), *layers, nn.Linear(8, 5))


NETWORKS = {
    "mlp": lambda: sandwich(nn.SiLU(), nn.Linear(8, 8), nn.Tanh()),
    "nested": lambda: sandwich(nn.Sequential(nn.LayerNorm(8), nn.Sequential(nn.GELU()))),
    "conv": lambda: nfi.nets.ConvDecoder((1, 6, 6), 3, (8, 8)),
    "residual": lambda: nfi.nets.ResidualMLP(3, 5, 8, 2),
    "weight from the input": lambda: HyperNetwork(weight=True, bias=False),
    "bias from the input": lambda: HyperNetwork(weight=False, bias=True),
    "both from the input": lambda: HyperNetwork(weight=True, bias=True),
    "raw products": WithRaw,
    "bilinear": WithBilinear,
    "weight norm": lambda: sandwich(nn.SiLU(), parametrizations.weight_norm(nn.Linear(8, 8))),
    "spectral norm": lambda: sandwich(nn.SiLU(), parametrizations.spectral_norm(nn.Linear(8, 8))),
    "orthogonal": lambda: sandwich(nn.SiLU(), parametrizations.orthogonal(nn.Linear(8, 8))),
    "attention": lambda: Attention(3, 5, nn.MultiheadAttention(4, 2, batch_first=True)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("count", [1, 3])
def test_networks(name, count, dtype):
    # In evaluation mode spectral norm keeps its vectors, so that two calls agree.
    net = NETWORKS[name]().to(dtype).eval()
    with settings.differentiable_attention():
        check_against_dense(net, torch.randn(4, 3, dtype=dtype), count)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [n for n in NETWORKS if "input" in n or "raw" in n])
def test_what_is_declined_is_left_to_torch(name, mode, dtype):
    """Without the other methods to fall back upon, that would make good for a mistake."""
    net, z = NETWORKS[name]().to(dtype), torch.randn(4, 3, dtype=dtype)
    expected = torch.func.jvp(net, (z,), (z.cos(),))
    with mode():
        actual = torch.func.jvp(net, (z,), (z.cos(),))
    torch.testing.assert_close(actual, expected)


def test_spectral_norm_in_training_mode(dtype):
    net = NETWORKS["spectral norm"]().to(dtype)
    value, pushed = jvp(net, torch.randn(4, 3, dtype=dtype), torch.randn(2, 4, 3, dtype=dtype))
    value.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert torch.isfinite(pushed).all()


def test_no_product_with_zeros_in_a_whole_network(dtype):
    net, z = NETWORKS["mlp"]().to(dtype), torch.randn(4, 3, dtype=dtype)
    for count in (1, 3):
        with Products() as counter:
            jvp(net, z, probes_like(z, count))
        assert counter.total == 2 * 3
    with Products() as counter:
        plain_jvp(net, z, probes_like(z, 1))
    assert counter.total > 2 * 3  # else torch has mended it, and the mode can go


def test_a_weight_with_a_tangent_takes_all_three_products(dtype):
    net, z = HyperNetwork(weight=True, bias=False).to(dtype), torch.randn(1, 3, dtype=dtype)
    with Products() as ours:
        jvp(net, z, probes_like(z, 1))
    with Products() as torchs:
        plain_jvp(net, z, probes_like(z, 1))
    assert ours.total == torchs.total - 1  # the layer that makes the weight


# Networks that are themselves made of derivatives.


def smooth(fan_in=3, fan_out=5):
    return nn.Sequential(nn.Linear(fan_in, 8), nn.Softplus(), nn.Linear(8, fan_out))


def as_value(net, z):
    return torch.func.jvp(net, (z,), (z.cos(),))[1]


def beside_the_value(net, z):
    value, pushed = torch.func.jvp(net, (z,), (torch.ones_like(z),))
    return value + pushed * pushed


def gradient_of_a_potential(net, z):
    with torch.enable_grad():
        z = z if z.requires_grad else z.requires_grad_()
        potential = net(z).square().sum() + z.square().sum()
        (gradient,) = torch.autograd.grad(potential, z, create_graph=True)
    return torch.cat([gradient, z], 1)


OWN_DERIVATIVES = {
    "func.jvp": as_value,
    "func.jvp beside the value": beside_the_value,
    "autograd.grad": gradient_of_a_potential,
    "func.grad": lambda net, z: torch.cat(
        [torch.func.grad(lambda s: net(s).square().sum())(z), z], 1
    ),
    "func.vmap": lambda net, z: torch.func.vmap(net)(z),
    "func.jacrev": lambda net, z: torch.func.vmap(torch.func.jacrev(net))(z).flatten(1),
    "func.jacfwd": lambda net, z: torch.func.vmap(torch.func.jacfwd(net))(z).flatten(1),
    "checkpoint": lambda net, z: checkpoint(net, z, use_reentrant=False),
}


@pytest.mark.parametrize("name", OWN_DERIVATIVES)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("activation", [nn.Softplus, nn.SiLU])
def test_networks_that_differentiate_themselves(name, count, activation, dtype):
    """The tangents they take are part of their value, and stay on its graph."""
    net = smooth().to(dtype)
    net[1] = activation()
    # The last bias does not reach a derivative.
    parameters = [net[0].weight, net[0].bias, net[2].weight]
    z = torch.randn(4, 3, dtype=dtype)
    check_against_dense(lambda s: OWN_DERIVATIVES[name](net, s), z, count, parameters)


@pytest.mark.parametrize("name", OWN_DERIVATIVES)
def test_jacobians_of_networks_that_differentiate_themselves(name, dtype):
    net, z = smooth().to(dtype), torch.randn(4, 3, dtype=dtype)

    def decode(s):
        return OWN_DERIVATIVES[name](net, s)

    expected = dense_jacobian(decode, z)
    actual = jacobian(decode, z).jacobian
    torch.testing.assert_close(actual.detach(), expected.detach())
    with torch.no_grad():
        torch.testing.assert_close(jacobian(decode, z).jacobian, expected.detach())
    ends = [net[0].weight, net[2].weight]
    a, e = (torch.autograd.grad(m.sin().sum(), ends) for m in (actual, expected))
    torch.testing.assert_close(a, e)


def saved_bytes(run):
    """Bytes that a run leaves on the graph, storages counted once, and its result."""
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(seen.values()), result


@pytest.mark.parametrize("kind", ["mlp", "residual", "conv"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_graph_keeps_what_that_of_a_plain_decode_keeps(kind, count, dtype):
    net = NETWORKS[kind]().to(dtype)
    z = torch.randn(16, 3, dtype=dtype, requires_grad=True)
    tangents = probes_like(z, count)
    plain, _value = saved_bytes(lambda: net(z))
    ours, _pair = saved_bytes(lambda: jvp(net, z, tangents))
    assert ours == plain
    assert plain > 16 * 8 * z.element_size()


def test_a_layer_without_any_second_derivative_is_an_error_that_says_what_to_do(dtype):
    net = smooth().to(dtype)
    z = torch.randn(4, 3, dtype=dtype)
    with pytest.raises(nfi.errors.UnsupportedLayerError, match="give its autograd.Function a jvp"):
        jvp(lambda s: net(ReverseOnce.apply(s)), z, probes_like(z, 1))


def conv_pair():
    return nfi.nets.conv_autoencoder((2, 8, 8), 3, (8, 16))


def surrogate_gradients(encoder, decoder, x, estimator="encoder", count=1):
    manual_seed(3)
    surrogate = nfi.volume.estimators.ESTIMATORS[estimator]
    z, reconstruction, volume = surrogate(x, encoder, decoder, lambda z: probes_like(z, count))
    loss = volume.sum() + (x - reconstruction).square().sum() + z.square().sum()
    return reconstruction, torch.autograd.grad(
        loss, [*encoder.parameters(), *decoder.parameters()]
    )


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("estimator", ["encoder", "decoder", "conditional"])
def test_channels_last(count, estimator):
    encoder, decoder = (net.double() for net in conv_pair())
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    _, expected = surrogate_gradients(encoder, decoder, x, estimator, count)
    for net in (encoder, decoder):
        net.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    reconstruction, actual = surrogate_gradients(encoder, decoder, x, estimator, count)
    assert reconstruction.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, expected, check_stride=False)
    value, pushed = jvp(
        decoder.stages[1:],
        torch.randn(2, 16, 2, 2).double(),
        torch.randn(count, 2, 16, 2, 2).double(),
    )
    assert value.shape == pushed.shape[1:]


# Jacobians in chunks.


class Decodes(nn.Module):
    """A decoder that counts its calls and notes the widest tangent that passed it."""

    def __init__(self, dtype):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 64), nn.SiLU(), nn.Linear(64, 9)).to(dtype)
        self.calls = 0

    def forward(self, z):
        self.calls += 1
        return self.net(z)


def test_every_chunk_size_gives_the_same_jacobian(dtype):
    decode, z = Decodes(dtype), torch.randn(3, 6, dtype=dtype)
    expected = dense_jacobian(decode, z).detach()
    for grad in (True, False):
        for chunk_size in (None, 1, 2, 4, 5, 6, 100):
            with torch.set_grad_enabled(grad):
                value, actual = jacobian(decode, z, chunk_size)
            torch.testing.assert_close(actual.detach(), expected)
            torch.testing.assert_close(value.detach(), decode(z).detach())


@pytest.mark.parametrize(("tangents", "calls"), [(1, 6), (2, 4), (4, 3), (6, 2), (1000, 2)])
def test_the_automatic_bound(monkeypatch, dtype, tangents, calls):
    """The first chunk, for want of knowledge, has one tangent; the others what the bound allows.

    A bound for m tangents of the widest layer, input and output, gives 1 + ceil(5 / m) decodes.
    """
    decode, z = Decodes(dtype), torch.randn(3, 6, dtype=dtype)
    expected = dense_jacobian(decode, z).detach()
    widest = 3 * 64 * z.element_size()
    monkeypatch.setattr(jacobians, "_TANGENT_BYTES", 2 * tangents * widest)
    monkeypatch.setattr(jacobians, "_ASSUMED_BYTES", 10**9)
    decode.calls = 0
    with torch.no_grad():
        actual = jacobian(decode, z).jacobian
    torch.testing.assert_close(actual, expected)
    assert decode.calls == calls


class Largest(TorchDispatchMode):
    """The size of the largest result of a kernel."""

    def __init__(self):
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_bytes = max(self.num_bytes, result.numel() * result.element_size())
        return result


@pytest.mark.slow
def test_no_tensor_exceeds_the_bound(monkeypatch, dtype):
    net = nn.Sequential(nn.Linear(32, 2048), nn.SiLU(), nn.Linear(2048, 40)).to(dtype)
    z = torch.randn(50, 32, dtype=dtype)
    bound = 12 * 50 * 2048 * z.element_size()
    monkeypatch.setattr(jacobians, "_TANGENT_BYTES", bound)
    with torch.no_grad(), Largest() as largest:
        jacobian(net, z)
    assert bound // 4 < largest.num_bytes <= bound
    with torch.no_grad(), Largest() as largest:
        jacobian(net, z, chunk_size=32)
    assert largest.num_bytes > bound

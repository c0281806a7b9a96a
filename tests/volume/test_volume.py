"""Exact log-volumes: numerics, memory bound, layers that need care, layers that are refused."""

from __future__ import annotations

import subprocess
import sys

import normflows as nf
import pytest
import torch
from support.dense import dense_jacobian, dense_log_volume, numerical_jacobian
from support.networks import Cold
from support.seeds import seeded_generator
from torch import nn

import normflows_injective as nfi
from normflows_injective.autodiff.products import jvp, vjp
from normflows_injective.volume import decode_and_log_volume, jacobian, log_volume
from normflows_injective.volume.log_volumes import matrix_log_volume


def matrix_of_condition(condition: float, seed: int, rows: int = 50, columns: int = 8):
    generator = seeded_generator(seed)
    draw = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    left, _ = torch.linalg.qr(draw)
    right, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator).double())
    spectrum = torch.logspace(0, -torch.tensor(condition).log10().item(), columns).double()
    return left @ torch.diag(spectrum) @ right


@pytest.mark.slow
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_float32_within_a_thousandth_of_a_nat_of_float64_svd(condition):
    """The Gram route loses 2 nats at condition number 1e5; see also the next test."""
    errors = []
    for seed in range(20):
        matrix = matrix_of_condition(condition, seed).float()
        expected = torch.linalg.svdvals(matrix.double()).log().sum()
        actual = log_volume(lambda z, a=matrix: z @ a.T, torch.randn(1, 8))
        assert actual.dtype == torch.float32
        errors.append((actual.double() - expected).abs().max())
    assert max(errors) < 1e-3


def test_float32_through_a_nonlinear_map():
    """Here the products round too: the error is a few eps times the condition number."""
    inner = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    outer = matrix_of_condition(1e4, 3)

    def decode(z):
        return torch.tanh(z @ inner.to(z).T) @ outer.to(z).T

    z = 0.3 * torch.randn(20, 8, dtype=torch.float64)
    error = log_volume(decode, z.float()).double() - log_volume(decode, z)
    assert error.abs().max() < 1e-3


def test_the_gram_determinant_would_fail_that():
    matrix = matrix_of_condition(1e5, 0).float()
    expected = torch.linalg.svdvals(matrix.double()).log().sum()
    gram = torch.linalg.slogdet(matrix.T @ matrix).logabsdet / 2
    assert (gram.double() - expected).abs() > 0.1


@pytest.mark.parametrize("condition", [1e2, 1e6])
def test_float64_relative_error(condition):
    matrix = matrix_of_condition(condition, 1)
    expected = torch.linalg.svdvals(matrix).log().sum()
    actual = matrix_log_volume(matrix.unsqueeze(0))[0]
    assert ((actual - expected) / expected).abs() < 1e-9


def smooth_decoder(dtype=torch.float64):
    return nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 7)).to(dtype)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 10])
@pytest.mark.parametrize("grad", [True, False])
def test_chunks_change_nothing(chunk_size, grad):
    net, z = smooth_decoder(), torch.randn(5, 3, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        x, volume = decode_and_log_volume(net, z, chunk_size)
    torch.testing.assert_close(volume.detach(), dense_log_volume(net, z))
    torch.testing.assert_close(x, net(z))
    assert volume.requires_grad == grad


def test_chunk_size_bounds_the_number_of_tangents_in_a_pass():
    seen = []

    def decode(z):
        functorch_level = torch._C._functorch
        inner = z
        while functorch_level.is_functorch_wrapped_tensor(inner):
            inner = functorch_level.get_unwrapped(inner)
        seen.append(tuple(inner.shape))
        return torch.cat([z, z**2], dim=1)

    with torch.no_grad():
        log_volume(decode, torch.randn(5, 4), chunk_size=3)
    assert len(seen) == 2  # three tangents in one pass and one in another


def test_jacobian_against_central_differences():
    net, z = smooth_decoder(), torch.randn(4, 3, dtype=torch.float64)
    value, actual = jacobian(net, z)
    torch.testing.assert_close(value, net(z))
    torch.testing.assert_close(actual, numerical_jacobian(net, z), atol=1e-8, rtol=1e-7)


def test_rank_deficiency_warns_and_says_where():
    def decode(z):
        return torch.cat([z[:, :1], z[:, 1:] * z[:, :1].relu(), z[:, :1]], dim=1)

    z = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [2.0, 1.0]])
    with pytest.warns(nfi.errors.NumericalWarning, match=r"1 of 3 .*\(first at index 1"):
        volume = log_volume(decode, z)
    assert volume[1] == -torch.inf
    assert torch.isfinite(volume[[0, 2]]).all()


def test_a_map_that_lowers_the_dimension_is_refused():
    with pytest.raises(nfi.errors.NotInjectiveError, match="takes 3 dimensions to 2"):
        log_volume(nn.Linear(3, 2), torch.randn(4, 3))


def test_equal_dimensions_give_the_log_determinant():
    flow = nf.flows.LULinearPermute(4).double()
    z = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(log_volume(lambda s: flow(s)[0], z), flow(z)[1])


DELICATE = {
    "layer_norm": lambda: nn.Sequential(
        nn.Linear(2, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 5)
    ),
    "group_norm": lambda: nn.Sequential(nn.Linear(2, 8), nn.GroupNorm(2, 8), nn.Linear(8, 5)),
    "softmax": lambda: nn.Sequential(nn.Linear(2, 8), nn.Softmax(1), nn.Linear(8, 5)),
    "glu": lambda: nn.Sequential(nn.Linear(2, 8), nn.GLU(1), nn.Linear(4, 5)),
    "batch_norm_eval": lambda: nn.Sequential(
        nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)
    ).eval(),
    "instance_norm": lambda: nn.Sequential(
        nn.Linear(2, 8),
        nn.Unflatten(1, (2, 4)),
        nn.InstanceNorm1d(2),
        nn.Flatten(),
        nn.Linear(8, 5),
    ),
}


@pytest.mark.parametrize("name", DELICATE)
def test_gradients_through_layers_whose_tangents_torch_gets_wrong(name):
    """Backward through the tangent of layer or instance norm is silently wrong, of GLU missing."""
    net = DELICATE[name]().double()
    z = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(log_volume(net, z).detach(), dense_log_volume(net, z))
    assert torch.autograd.gradcheck(lambda s: log_volume(net, s), (z,))


def test_layers_initialised_by_data_are_warmed_up():
    """Inside a functional transform the first call of ActNorm kills the process."""
    net, z = Cold(2).double(), torch.randn(6, 2, dtype=torch.float64)
    volume = log_volume(net, z)
    assert bool(net.norm.data_dep_init_done)
    torch.testing.assert_close(volume.detach(), dense_log_volume(net, z))


def test_a_batch_of_one_cannot_warm_up():
    with pytest.raises(nfi.errors.ShapeError, match="ActNorm.* batch of one"):
        log_volume(Cold(2), torch.randn(1, 2))


@pytest.mark.slow
def test_without_warm_up_the_process_would_crash():
    script = (
        "import torch, normflows as nf; norm = nf.flows.ActNorm((2,));"
        "z = torch.randn(3, 2); torch.func.jvp(lambda s: norm(s)[0], (z,), (z,)); norm(z)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode != 0


class Residual(nn.Module):
    """normflows' residual flow in a decoder: torch.func fails on it, dual numbers do not."""

    def __init__(self, reduce_memory: bool):
        super().__init__()
        self.linear = nn.Linear(2, 4)
        net = nf.nets.LipschitzMLP([4, 8, 4], init_zeros=False, lipschitz_const=0.8)
        self.flow = nf.flows.Residual(net, reduce_memory=reduce_memory, reverse=False)

    def forward(self, z):
        return self.flow.forward(self.linear(z))[0]


def test_fall_back_to_dual_numbers_for_residual_flows():
    net = Residual(reduce_memory=False).double()
    nf.utils.update_lipschitz(net, 20)
    z = torch.randn(3, 2, dtype=torch.float64)
    with torch.no_grad():
        actual = log_volume(net, z)
    torch.testing.assert_close(actual, dense_log_volume(net, z), atol=1e-4, rtol=1e-4)


class NoForwardMode(torch.autograd.Function):
    """The square, twice differentiable in reverse mode, without a rule for forward mode."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z**2

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        return 2 * z * grad


def test_fall_back_to_two_reverse_passes_without_a_forward_rule():
    z, tangents = torch.randn(3, 2).double(), torch.randn(2, 3, 2).double()
    value, products = jvp(NoForwardMode.apply, z, tangents)
    torch.testing.assert_close(value, z**2)
    torch.testing.assert_close(products, 2 * z * tangents)


def test_a_detached_map_is_an_error_not_a_zero():
    x = torch.randn(3, 2, requires_grad=True)
    with pytest.raises(nfi.errors.NotInjectiveError, match="does not depend on its input"):
        vjp(x.detach() * 2, x, torch.ones(1, 3, 2), create_graph=False)


REFUSED = {
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5)),
        "couples the samples",
    ),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(2, 5), nn.Dropout(0.1)),
        "another network at every",
    ),
    "residual": (lambda: Residual(reduce_memory=True), "reduce_memory=False"),
    "host batch norm": (lambda: nn.Sequential(nn.Linear(2, 5), nf.flows.BatchNorm()), "ActNorm"),
    "batch norm without statistics": (
        lambda: nn.Sequential(
            nn.Linear(2, 5), nn.BatchNorm1d(5, track_running_stats=False)
        ).eval(),
        "without running statistics",
    ),
    "rrelu": (lambda: nn.Sequential(nn.Linear(2, 5), nn.RReLU()), "another slope at every call"),
    "attention": (lambda: nn.MultiheadAttention(2, 1, dropout=0.1), "another network at every"),
    "compiled": (
        lambda: torch.compile(nn.Linear(2, 5), backend="eager"),
        "Pass the network uncompiled",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_make_results_silently_wrong_are_refused(name):
    build, text = REFUSED[name]
    net = build()
    hidden = [] if name == "compiled" else [net.forward]
    for callable_ in (net, lambda z: net(z), *hidden):
        with pytest.raises(nfi.errors.UnsupportedLayerError, match=text):
            log_volume(callable_, torch.randn(3, 2))


GLOBAL_NET = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5))


def test_networks_behind_globals_and_plain_objects_are_found():
    class Holder:
        def __init__(self, net):
            self.net = net

        def __call__(self, z):
            return self.net(z)

    def through_a_global(z):
        return GLOBAL_NET(z)

    for decode in (through_a_global, Holder(GLOBAL_NET)):
        with pytest.raises(nfi.errors.UnsupportedLayerError, match="couples the samples"):
            log_volume(decode, torch.randn(3, 2))


def test_a_network_compiled_in_place_is_refused():
    net = nn.Linear(2, 5)
    net.compile(backend="eager")
    with pytest.raises(nfi.errors.UnsupportedLayerError, match="compiled by torch.compile"):
        log_volume(net, torch.randn(3, 2))


def test_functional_dropout_is_refused_where_it_shows():
    net = nn.Linear(2, 50)
    with pytest.raises(nfi.errors.UnsupportedLayerError, match="another value at every call"):
        jvp(lambda z: nn.functional.dropout(net(z)), torch.randn(3, 2), torch.randn(2, 3, 2))


def test_the_jacobian_warms_up_and_refuses_by_itself():
    net = Cold(2)
    jacobian(net, torch.randn(6, 2))
    assert bool(net.norm.data_dep_init_done)
    with pytest.raises(nfi.errors.UnsupportedLayerError):
        jacobian(GLOBAL_NET, torch.randn(6, 2))


def test_log_volume_gradient_without_a_forward_rule():
    """The last forward mode has no graph, so rows by reverse mode must step in."""
    linear = nn.Linear(2, 5).double()
    z = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def decode(s):
        return linear(NoForwardMode.apply(s))

    assert torch.autograd.gradcheck(lambda s: log_volume(decode, s), (z,))
    log_volume(decode, z).sum().backward()
    assert linear.weight.grad.abs().max() > 0


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunk_size_must_be_positive(chunk_size):
    with pytest.raises(nfi.errors.OptionError, match="chunk_size must be at least 1 or None"):
        log_volume(nn.Linear(2, 5), torch.randn(3, 2), chunk_size)


def test_the_same_layers_are_fine_in_evaluation_mode():
    net = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)).eval()
    assert torch.isfinite(log_volume(net, torch.randn(3, 2))).all()


def test_dense_oracle_itself_by_central_differences():
    net, z = smooth_decoder(), torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(
        dense_jacobian(net, z), numerical_jacobian(net, z), atol=1e-8, rtol=0
    )

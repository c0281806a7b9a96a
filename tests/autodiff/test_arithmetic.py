"""Tangents of sums and products with a constant: those of finite differences, without zeros."""

from __future__ import annotations

import pytest
import torch
from support.seeds import manual_seed
from torch.utils._python_dispatch import TorchDispatchMode

import normflows_injective as nfi
from normflows_injective.autodiff.arithmetic import ARITHMETIC
from normflows_injective.autodiff.products import jvp
from normflows_injective.autodiff.tangents import SkipZeroProducts, TangentsWithoutGraph

MODES = [SkipZeroProducts, TangentsWithoutGraph]
CONSTANTS = {
    "number": lambda x: 1.5,
    "integer": lambda x: 3,
    "tensor": lambda x: 1 + torch.rand(3, 4, dtype=x.dtype),
    "row": lambda x: 1 + torch.rand(4, dtype=x.dtype),
    "column": lambda x: 1 + torch.rand(3, 1, dtype=x.dtype),
    "wider": lambda x: 1 + torch.rand(2, 3, 4, dtype=x.dtype),
    "scalar": lambda x: 1 + torch.rand((), dtype=x.dtype),
    "integers": lambda x: torch.randint(1, 5, (4,)),
    "parameter": lambda x: torch.nn.Parameter(1 + torch.rand(4, dtype=x.dtype)),
    "precise": lambda x: 1 + torch.rand(4, dtype=torch.float64),
}
ARGUMENTS = {
    "first": lambda func, x, c: func(x, c),
    "second": lambda func, x, c: func(c, x),
    "both": lambda func, x, c: func(x, x.sin() + 2),
}


def names(func):
    return getattr(func, "__qualname__", "") or func.__name__


@pytest.fixture(autouse=True)
def _seed():
    manual_seed(0)


# torch.add, sub and mul take a number first, methods and divisions do not.
TAKE_NUMBERS_FIRST = {torch.add, torch.sub, torch.subtract, torch.mul, torch.multiply}
CASES = [
    pytest.param(func, constant, arguments, id=f"{names(func)}-{constant}-{arguments}")
    for func in sorted(ARITHMETIC, key=repr)
    for constant in CONSTANTS
    for arguments in ARGUMENTS
    if not (
        arguments == "second"
        and constant in ("number", "integer")
        and func not in TAKE_NUMBERS_FIRST
    )
]


@pytest.mark.parametrize(("func", "constant", "arguments"), CASES)
def test_products_are_those_of_central_differences(func, constant, arguments):
    x = 1 + torch.rand(3, 4, dtype=torch.float64)
    c, tangent = CONSTANTS[constant](x), torch.randn(3, 4, dtype=torch.float64)

    def function(point):
        return ARGUMENTS[arguments](func, point, c)

    step = 1e-5
    expected = (function(x + step * tangent) - function(x - step * tangent)) / (2 * step)
    value, (product,) = jvp(function, x, tangent[None])
    torch.testing.assert_close(value, function(x))
    torch.testing.assert_close(product, expected.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("arguments", ["first", "second"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("constant", ["number", "wider", "integers", "parameter", "precise"])
def test_value_and_product_have_the_type_and_graph_of_torch(constant, mode, arguments, dtype):
    x = (1 + torch.rand(3, 4)).to(dtype).requires_grad_()
    c, tangent = CONSTANTS[constant](x), torch.randn(3, 4).to(dtype)

    def function(point):
        a, b = (point, c) if arguments == "first" else (c, point)
        return 2 / ((a + b) * 3 - a * b) - 1 / (4 - a / b)

    expected = torch.func.jvp(function, (x,), (tangent,))
    with mode():
        actual = torch.func.jvp(function, (x,), (tangent,))
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other)
    gradients = [torch.autograd.grad(value.sum(), x)[0] for value in (actual[0], expected[0])]
    torch.testing.assert_close(*gradients)


def test_a_constant_with_an_option_is_left_to_torch():
    x, c = torch.randn(3), torch.randn(3)
    value, (product,) = jvp(lambda x: torch.add(c, x, alpha=2), x, torch.ones(1, 3))
    torch.testing.assert_close(value, c + 2 * x)
    torch.testing.assert_close(product, torch.full((3,), 2.0))


def test_a_network_with_a_forward_mode_of_its_own(dtype):
    c = torch.rand(4, dtype=dtype)

    def function(x):
        return torch.func.jvp(lambda y: (c * y) * y / (1 + c), (x,), (x.cos(),))[1]

    x = torch.randn(3, 4, dtype=dtype)
    _, (product,) = jvp(function, x, torch.ones(1, 3, 4, dtype=dtype))
    weight = 2 * c / (1 + c)
    torch.testing.assert_close(product, weight * (x.cos() - x * x.sin()))


class Zeros(TorchDispatchMode):
    """Counts tensors of zeros that hold no memory."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "efficientzerotensor" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [1, 3])
def test_no_zeros_are_made_for_constants(count):
    c = torch.rand(4)
    x, tangents = torch.randn(3, 4), torch.randn(count, 3, 4)
    with Zeros() as zeros:
        jvp(lambda x: 2 - (1 + c * x) / c, x, tangents)
    assert zeros.count == 0
    with Zeros() as zeros:
        torch.func.jvp(lambda x: 2 - (1 + c * x) / c, (x,), (tangents[0],))
    assert zeros.count > 0


def test_the_log_prob_of_a_decoder_with_constants_is_exact():
    class Scaled(torch.nn.Module):
        def forward(self, z):
            return torch.cat([2 * z, 1 - z.square() / 3], 1)

    volume = nfi.volume.jacobian(Scaled(), torch.tensor([[0.6, -0.3]], dtype=torch.float64))
    expected = torch.tensor(
        [[[2.0, 0.0], [0.0, 2.0], [-0.4, 0.0], [0.0, 0.2]]], dtype=torch.float64
    )
    torch.testing.assert_close(volume.jacobian, expected)

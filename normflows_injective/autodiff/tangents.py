r"""Forward mode without the work that torch does for tangents and need not do.

For a layer :math:`y = W x + b` torch's forward mode computes :math:`W \dot x + \dot W x`, with a
tangent :math:`\dot W = 0` that it writes out and multiplies (pytorch#69687): a third product
beside the two that are needed. It does the same in sums and products with a constant. And where
gradients are enabled it records every tangent for backward, in a form that can be differentiated
again, which for SiLU and group normalisation takes ten kernels where one would do. The modes below
intercept those functions, wherever in a network they are called, and leave all others to torch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import TransformType
from torch.autograd.forward_ad import make_dual, unpack_dual

from .activations import jvp_silu
from .arithmetic import ARITHMETIC, jvp_with_constant
from .convolutions import CONVOLUTIONS
from .normalisation import jvp_group_norm, jvp_layer_norm
from .proven import has_proven_tangent
from .transforms import Function, Interception, number_open, open_transforms, saving_hooks
from .written_out import WRITTEN_OUT

# Functions of (input, weight, bias, ...), linear in the first without the third. Tuples, because
# older compilers do not trace a look into a frozenset.
AFFINE: tuple[Function, ...] = (F.linear, *CONVOLUTIONS)

# Functions that take derivatives on the graph of the value.
DIFFERENTIATING: tuple[Function, ...] = (
    torch.autograd.grad,
    torch.autograd.backward,
    Tensor.backward,
)

# Functions whose forward product has a kernel, with arguments (tangent, input, ...).
_JVPS: dict[Function, Function] = {
    F.silu: lambda tangent, x, inplace=False: jvp_silu(tangent, x),
    F.group_norm: jvp_group_norm,
    F.layer_norm: jvp_layer_norm,
}

# Functions whose result shares no memory with their arguments. Evaluating them a second time,
# without a graph, is cheaper than a tangent that could be differentiated.
_FRESH: frozenset[Function] = frozenset(
    {
        F.celu,
        F.elu,
        F.gelu,
        F.hardswish,
        F.leaky_relu,
        F.logsigmoid,
        F.mish,
        F.relu,
        F.selu,
        F.softplus,
        F.softsign,
        F.tanhshrink,
        F.rms_norm,
        F.softmax,
        F.log_softmax,
        F.glu,
        torch.sin,
        torch.cos,
        torch.exp,
        torch.relu,
        torch.sigmoid,
        torch.tanh,
    }
)


class NoTangentError(RuntimeError):
    """Forward mode is not to be taken through a network, but another way may be."""


class SkipZeroProducts(Interception):
    """Run no product with the tangent of a weight of an affine layer that has none."""

    # Where the weight or the bias carries a tangent, as in a network whose weights are the output
    # of another, torch's own rule stands, as it does for a forward mode that the network itself
    # starts. A network that differentiates or checkpoints its own graph, whose saved tensors would
    # have no tangents, or calls a function whose tangent is not proved right, is a NoTangentError.

    def __init__(self) -> None:
        super().__init__()
        self._outside = number_open(TransformType.Jvp)
        self._gradients = number_open(TransformType.Grad)
        self._hooks = saving_hooks()
        # The compiler cannot trace the question, which the eager form has answered before.
        self._eager = not torch.compiler.is_compiling()

    def _intercept(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._refuse_own_graph(func)
        if func in WRITTEN_OUT and (func is torch.cdist or self._is_differentiated()):
            func = WRITTEN_OUT[func]
        elif self._eager and not has_proven_tangent(func):
            raise NoTangentError(f"Nothing proves that the tangent of {func} is right.")
        if func in AFFINE and len(args) >= 2 and not self._is_nested():
            return self._affine(func, args, kwargs)
        if self._eager and func in ARITHMETIC and len(args) == 2 and not kwargs:
            return self._arithmetic(func, args)
        if func is Tensor.unflatten:
            # torch.compile cannot trace the method inside a mode, but can trace the function.
            return torch.unflatten(*args, **kwargs)
        return func(*args, **kwargs)

    def _is_nested(self) -> bool:
        """Whether the network has started a forward mode, whose tangents are part of the value."""
        return number_open(TransformType.Jvp) > self._outside + 1

    def _is_differentiated(self) -> bool:
        """Whether the network differentiates here, so that its value holds derivatives."""
        return number_open(TransformType.Grad) > self._gradients or self._is_nested()

    def _refuse_own_graph(self, func: Function) -> None:
        if func in DIFFERENTIATING and open_transforms()[-1:] != [TransformType.Grad]:
            raise NoTangentError("The network differentiates its own graph.")
        if saving_hooks() is not self._hooks:
            raise NoTangentError("The network changes how its graph is saved.")

    def _affine(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x, weight, bias, rest, kwargs = affine_arguments(args, kwargs)
        point, tangent = unpack_dual(x)
        if tangent is None or _has_tangent(weight) or _has_tangent(bias):
            return func(x, weight, bias, *rest, **kwargs)
        # The value first: under autocast its copy of the weight is cached, and must have a graph.
        value = func(point, weight, bias, *rest, **kwargs)
        with self._recording():
            product = func(tangent, weight, None, *rest, **kwargs)
        return make_dual(value, product)

    def _arithmetic(self, func: Function, args: tuple[Any, ...]) -> Any:
        points: list[Any] = list(args)
        tangents: dict[int, Tensor] = {}
        for position, x in enumerate(args):
            if _may_have_tangent(x):
                points[position], tangent = unpack_dual(x)
                if tangent is not None:
                    tangents[position] = tangent
        if len(tangents) != 1 or self._is_nested():
            return func(*args)
        value = func(*points)
        with self._recording():
            product = jvp_with_constant(func, points, value, *tangents.popitem())
        return make_dual(value, product)

    def _recording(self) -> AbstractContextManager[None]:
        return nullcontext()


class TangentsWithoutGraph(SkipZeroProducts):
    """Keep tangents off the graph as well, for products that are not differentiated again."""

    # Covers smooth activations and normalisations beside the affine layers; tangents that other
    # functions put on the graph leave it at the next one that is covered.

    def _intercept(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        covered = (func in _JVPS or func in _FRESH) and not is_in_place(kwargs)
        if covered and args and isinstance(args[0], Tensor) and not self._is_nested():
            self._refuse_own_graph(func)
            point, tangent = unpack_dual(args[0])
            others = [*args[1:], *kwargs.values()]
            if tangent is not None and not any(_has_tangent(other) for other in others):
                return self._fresh(func, point, tangent, args[1:], kwargs)
        return super()._intercept(func, args, kwargs)

    def _fresh(
        self,
        func: Function,
        point: Tensor,
        tangent: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        value = func(point, *args, **kwargs)
        with torch.no_grad():
            if func in _JVPS and is_plain(point):
                # Detached, because a functional transform enables gradients for our kernels.
                product = _JVPS[func](tangent.detach(), point.detach(), *args, **kwargs)
            else:
                dual = make_dual(point.detach(), tangent)
                product = unpack_dual(func(dual, *args, **kwargs)).tangent
        return make_dual(value, product)

    def _recording(self) -> AbstractContextManager[None]:
        return torch.no_grad()


def affine_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any, Any, tuple[Any, ...], dict[str, Any]]:
    """Input, weight, bias, and the other arguments of a call of one of ``AFFINE``."""
    # Slices rather than pop, which torch.compile cannot trace before torch 2.13.
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    others = {name: value for name, value in kwargs.items() if name != "bias"}
    return args[0], args[1], bias, args[3:], others


def is_plain(x: Tensor) -> bool:
    """Whether our kernels compute the same as torch's: in full precision and standard layout."""
    return x.is_contiguous() and x.dtype in (torch.float32, torch.float64)


def is_in_place(kwargs: dict[str, Any]) -> bool:
    """Whether a call of an activation asks for its input to be overwritten."""
    # torch hands all arguments but the input on by keyword.
    return bool(kwargs.get("inplace"))


def _has_tangent(value: Any) -> bool:
    return _may_have_tangent(value) and unpack_dual(value).tangent is not None


def _may_have_tangent(value: Any) -> bool:
    # A parameter is no function of the input; asking it costs as much as a small layer.
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)

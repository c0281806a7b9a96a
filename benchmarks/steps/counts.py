"""Multiply-adds, and bytes kept for backward: the cost of a training step on any machine."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["bytes_for_backward", "multiply_adds"]

aten = torch.ops.aten

# Products of matrices, with the position of the left factor.
_PRODUCTS = {
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
}


class _MultiplyAdds(TorchDispatchMode):
    """Counts the multiply-adds of matrix products and convolutions as they are dispatched.

    torch's own counter cannot run around a step that calls ``torch.autograd.grad`` inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation and add its cost."""
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            self.count += out.numel() * args[_PRODUCTS[func]].shape[-1]
        elif func is aten.convolution.default:
            x, weight, transposed = args[0], args[1], args[6]
            self.count += _convolved(x, weight, out, transposed)
        elif func is aten.convolution_backward.default:
            cotangent, x, weight, transposed = args[0], args[1], args[2], args[7]
            # One product for the gradient of the input, one for that of the weight, if asked for.
            self.count += sum(args[10][:2]) * _convolved(x, weight, cotangent, transposed)
        return out


def _convolved(x: Tensor, weight: Tensor, out: Tensor, transposed: bool) -> int:
    """Multiply-adds of a convolution, those with the padding's zeros included."""
    return (x if transposed else out).numel() * weight[0].numel()


def multiply_adds(call: Callable[[], object]) -> int:
    """Multiply-adds that a call dispatches, in eager mode."""
    with _MultiplyAdds() as counter:
        call()
    return counter.count


class _Holder:
    """A saved tensor in the graph, without its history, which would keep unneeded graphs alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


def bytes_for_backward(call: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that the graph of a loss keeps for the backward pass, every storage counted once.

    Parameters do not count, because they are there anyway, nor does a graph that was freed before
    the loss was ready.
    """
    holders: list[weakref.ref[_Holder]] = []

    def pack(tensor: Tensor) -> _Holder:
        holder = _Holder(tensor)
        holders.append(weakref.ref(holder))
        return holder

    with saved_tensors_hooks(pack, lambda holder: holder.tensor):
        loss = call()
    alive = [holder.tensor for reference in holders if (holder := reference()) is not None]
    del loss
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
    for parameter in parameters:
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(sizes.values())

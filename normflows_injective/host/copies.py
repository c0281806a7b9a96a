"""Copies of modules that share their tensors, in place of changes to the caller's modules.

Setting modes or flags of a module and taking them back is seen by every other thread that uses
it, and two threads that overlap leave the setting of one of them for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

from ..modules.behind import modules_of
from ..modules.copying import replicate, with_copies
from .first_data import is_cold

__all__ = ["in_evaluation", "on_trial", "replica_of"]

Module = TypeVar("Module", bound=nn.Module)
Source = TypeVar("Source", bound=Callable[..., Any])


def in_evaluation(module: Module) -> Module:
    """A module in evaluation mode: itself, or a copy that shares its parameters and buffers.

    Layers in the copy that have yet to meet data keep what they take from it to themselves.

    Args:
        module: Any module.

    Returns:
        The module itself where all of its parts are in evaluation mode and have met data. What
        torch.compile made of a part is left out of a copy, which runs as it was written.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        >>> net.training, in_evaluation(net).training, net.training
        (True, False, True)
        >>> in_evaluation(net)[0].weight is net[0].weight
        True
    """
    if not any(part.training or is_cold(part) for part in module.modules()):
        return module
    copy: Module = replicate([module], _cloned_if_cold, training=False)[id(module)]
    return copy


def on_trial(parts: Iterable[nn.Module]) -> list[Any]:
    """Copies in evaluation mode that can be called without a trace.

    Args:
        parts: Modules. Those that they have in common are one in the copies too.

    Returns:
        Copies that share the parameters, but neither buffers nor what layers take from first data.

    Examples:
        >>> net = nn.BatchNorm1d(2)
        >>> copy = on_trial([net])[0]
        >>> copy.weight is net.weight, copy.running_mean is net.running_mean, copy.training
        (True, False, False)
    """
    parts = list(parts)
    found = replicate(parts, _cloned_if_kept, training=False)
    return [found[id(part)] for part in parts]


def _cloned_if_cold(module: nn.Module, tensor: Tensor) -> Tensor:
    return _cloned(tensor) if is_cold(module) else tensor


def _cloned_if_kept(module: nn.Module, tensor: Tensor) -> Tensor:
    untouched = isinstance(tensor, nn.Parameter) and not is_cold(module)
    return tensor if untouched else _cloned(tensor)


def _cloned(tensor: Tensor) -> Tensor:
    clone = tensor.detach().clone()
    if not isinstance(tensor, nn.Parameter):
        return clone
    return nn.Parameter(clone, tensor.requires_grad)


def replica_of(source: Source) -> tuple[Source, Callable[[nn.Module], nn.Module]]:
    """A copy that keeps to itself what its layers take from first data.

    Args:
        source: A module, or a callable that modules stand behind.

    Returns:
        The copy, and a function that gives the copy of every module in it.

    Examples:
        >>> net = nn.Linear(2, 2)
        >>> copy, twin_of = replica_of(lambda x: net(x))
        >>> twin_of(net).weight is net.weight
        True
    """
    found = replicate(modules_of(source), _cloned_if_kept)
    copy: Source = with_copies(source, found)
    return copy, lambda module: found[id(module)]

"""Copies of modules that share their tensors, in place of changes to the caller's modules.

Setting modes or flags of a module and taking them back is seen by every other thread that uses
it, and two threads that overlap leave the setting of one of them for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

from ..modules.contents import modules_of
from ..modules.copying import replicate, with_copies
from .first_data import awaits_first_data

Module = TypeVar("Module", bound=nn.Module)
Source = TypeVar("Source", bound=Callable[..., Any])


def in_evaluation(module: Module) -> Module:
    """A module in evaluation mode: itself, or a copy that shares its parameters and buffers.

    Layers in the copy that await first data keep to themselves what they take. A part that was
    compiled by torch.compile runs in the copy as it was written.
    """
    if not any(part.training or awaits_first_data(part) for part in module.modules()):
        return module
    copy: Module = replicate([module], _cloned_if_waiting, training=False)[id(module)]
    return copy


def on_trial(parts: Iterable[nn.Module]) -> list[Any]:
    """Copies in evaluation mode that share parameters, but neither buffers nor first data.

    Modules that the parts have in common are one in the copies too.
    """
    parts = list(parts)
    copies = replicate(parts, _cloned_if_kept, training=False)
    return [copies[id(part)] for part in parts]


def _cloned_if_waiting(module: nn.Module, tensor: Tensor) -> Tensor:
    return _cloned(tensor) if awaits_first_data(module) else tensor


def _cloned_if_kept(module: nn.Module, tensor: Tensor) -> Tensor:
    untouched = isinstance(tensor, nn.Parameter) and not awaits_first_data(module)
    return tensor if untouched else _cloned(tensor)


def _cloned(tensor: Tensor) -> Tensor:
    clone = tensor.detach().clone()
    if not isinstance(tensor, nn.Parameter):
        return clone
    return nn.Parameter(clone, tensor.requires_grad)


def replica_of(source: Source) -> tuple[Source, Callable[[nn.Module], nn.Module]]:
    """A copy that keeps its first data to itself, and a function from each module to its copy."""
    copies = replicate(modules_of(source), _cloned_if_kept)
    copy: Source = with_copies(source, copies)
    return copy, lambda module: copies[id(module)]

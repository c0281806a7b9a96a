"""Copies of modules whose tensors are constants, for scores that no parameter sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from .contents import modules_of
from .copying import replicate


@final
class ConstantCopies:
    """Copies that share the values of modules, and carry no gradient to them.

    They are made anew when a tensor or a mode of the modules is replaced; changes in place are
    seen. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._held: tuple[tuple[Any, ...], list[Any]] | None = None

    def of(self, modules: Sequence[nn.Module]) -> list[Any]:
        """One copy for each module; what modules have in common is one in the copies too."""
        # The copies of a traced call hold tensors of the trace.
        if torch._C._get_tracing_state() is not None:
            return _made(modules)
        marks = tuple(_marks(modules))
        if self._held is None or self._held[0] != marks:
            self._held = marks, _made(modules)
        return self._held[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return ConstantCopies, ()


def _made(modules: Sequence[nn.Module]) -> list[Any]:
    copies = replicate(modules, _constant)
    return [copies[id(module)] for module in modules]


def _constant(_: nn.Module, tensor: Tensor) -> Tensor:
    return tensor.detach()


def _marks(modules: Sequence[nn.Module]) -> Any:
    for module in modules_of(*modules):
        yield id(module), module.training
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield id(tensor), tensor.data_ptr()

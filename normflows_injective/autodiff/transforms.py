"""Standing between a network and torch: interception of functions, and what goes on around."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.overrides import TorchFunctionMode

__all__ = [
    "Function",
    "Interception",
    "is_batching",
    "number_open",
    "open_transforms",
    "saving_hooks",
]

Function = Callable[..., Any]
_TOP_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class Interception(TorchFunctionMode):
    """A context in which every function of torch that a network calls is handed to a method."""

    def __torch_function__(
        self,
        func: Function,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self._intercept(func, args, kwargs or {})

    @abstractmethod
    def _intercept(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give the result of ``func(*args, **kwargs)``; in here no interception happens."""


def is_batching() -> bool:
    """Whether a call stands inside a vmap."""
    return TransformType.Vmap in open_transforms()


def number_open(kind: TransformType) -> int:
    """How many transforms of a kind are around a call."""
    # Not by count, which older compilers do not know.
    return len([transform for transform in open_transforms() if transform == kind])


def saving_hooks() -> Any:
    """The innermost hooks on saved tensors, as checkpointing sets them, or None."""
    if _TOP_HOOKS is None or torch.compiler.is_compiling():
        return None
    hooks = _TOP_HOOKS(True)
    return None if hooks is None else hooks[0]


def open_transforms() -> list[TransformType]:
    """The functional transforms around a call, outermost first."""
    if torch.compiler.is_compiling():
        return []
    return [transform.key() for transform in get_interpreter_stack() or ()]

"""What torch is doing around a call: functional transforms, and hooks on saved tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch._C._functorch import TransformType, get_interpreter_stack

__all__ = ["is_batching", "open_transforms", "saving_hooks"]


def is_batching() -> bool:
    """Whether a call stands inside a vmap."""
    return TransformType.Vmap in open_transforms()


def saving_hooks() -> Any:
    """The innermost hooks on saved tensors, as checkpointing sets them, or None."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None or torch.compiler.is_compiling():
        return None
    hooks = top(True)
    return None if hooks is None else hooks[0]


def open_transforms() -> list[TransformType]:
    """The functional transforms around a call, outermost first."""
    if torch.compiler.is_compiling():
        return []
    return [transform.key() for transform in get_interpreter_stack() or ()]

"""Interception of calls, and the transforms, tangents and hooks that are open around one.

Volumes and surrogates are built of derivatives. A tangent that a caller sends through them would
meet forward-mode rules of torch for derivatives, which are not known to be right, and
stop-gradients, which mean another thing in forward mode.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from ..errors import ForwardModeError

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


def open_transforms() -> list[TransformType]:
    """The functional transforms around a call, outermost first."""
    if torch.compiler.is_compiling():
        return []
    return [transform.key() for transform in get_interpreter_stack() or ()]


def number_open(kind: TransformType) -> int:
    """How many transforms of a kind are around a call."""
    # Not by count, which older compilers do not know.
    return len([transform for transform in open_transforms() if transform == kind])


def is_batching() -> bool:
    """Whether a call stands inside a vmap."""
    return TransformType.Vmap in open_transforms()


def saving_hooks() -> Any:
    """The innermost hooks on saved tensors, as checkpointing sets them, or None."""
    if _TOP_HOOKS is None or torch.compiler.is_compiling():
        return None
    hooks = _TOP_HOOKS(True)
    return None if hooks is None else hooks[0]


def in_forward_mode() -> bool:
    """Whether a level of dual numbers, or a ``torch.func.jvp``, is open around a call."""
    return forward_ad._current_level >= 0


def refuse_tangents(subject: str, *tensors: Tensor) -> None:
    """Raise in the name of a subject if a caller takes a forward-mode derivative of tensors."""
    refuse_nested(subject)
    if in_forward_mode() and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise ForwardModeError(
            f"{subject} has no forward-mode derivative here, but a tangent came in, by dual "
            "numbers, torch.func.jvp, jacfwd or hessian. Use reverse mode: backward() or "
            "torch.autograd.grad, and for densities torch.func.vjp, jacrev, or jacrev(grad(...))."
        )


def refuse_nested(subject: str) -> None:
    """Raise if other transforms stand inside a caller's forward mode, and hide its tangents."""
    if not in_forward_mode():
        return
    transforms = open_transforms()
    inner = transforms[-1:] not in ([], [TransformType.Jvp])
    if transforms.count(TransformType.Jvp) > 1 or (inner and TransformType.Jvp in transforms):
        raise ForwardModeError(
            f"{subject} was asked for inside torch.func.jvp and another transform, as "
            "torch.func.hessian does, where tangents cannot be followed. Use reverse mode twice: "
            "torch.func.jacrev(torch.func.grad(...))."
        )

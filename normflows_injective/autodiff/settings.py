"""Settings of the whole process that derivatives need, shared by its threads."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from threading import Lock, RLock
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .decompositions import load_decompositions

__all__ = ["FORWARD_MODE", "as_written", "differentiable_attention", "uncompiled"]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class _Shared(AbstractContextManager[None]):
    """A setting that the first thread makes and the last one takes back.

    torch's own contexts save what they find and restore it, so that threads which overlap would
    leave the setting of the one for good.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make = make
        self._lock = Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._setting = self._make()
                self._setting.__enter__()
            self._inside += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._setting.__exit__(None, None, None)


class _ForwardMode(AbstractContextManager[None]):
    """One thread's turn at forward mode, with what torch needs for it.

    torch counts the open levels of forward mode for the whole process, not for each thread.
    """

    def __init__(self) -> None:
        self._turn = RLock()

    def __enter__(self) -> None:
        load_decompositions()
        self._turn.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._turn.release()


FORWARD_MODE = _ForwardMode()
_ATTENTION = _Shared(lambda: sdpa_kernel(SDPBackend.MATH))
_UNCOMPILED = _Shared(lambda: torch.compiler.set_stance("force_eager"))


def differentiable_attention() -> AbstractContextManager[None]:
    """Compute attention by its formula: the fused kernels have no derivatives beyond the first."""
    return _ATTENTION


def uncompiled() -> AbstractContextManager[None]:
    """Run what a network compiled inside itself as it was written.

    Compiled functions drop the tangents of dual numbers silently (pytorch#187284).
    """
    # Importing the compiler takes seconds; without it nothing can be compiled.
    return _UNCOMPILED if "torch._dynamo" in sys.modules else nullcontext()


def as_written(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function that takes derivatives run as it was written where a user compiles a call.

    torch.compile traces neither dual numbers nor settings of the process. It compiles what stands
    before and after the function, and calls the function itself.

    Args:
        function: Function or method.
    """

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)
        # Not at definition: importing torch's compiler takes seconds.
        uncovered: Callable[Arguments, Result] = torch.compiler.disable(function)
        return uncovered(*args, **kwargs)

    return call

"""Settings of the whole process that derivatives need, shared by its threads."""

from __future__ import annotations

import builtins
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import wraps
from importlib.util import find_spec, module_from_spec
from threading import Lock, RLock
from types import FunctionType, ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_DECOMPOSITIONS = "torch._decomp.decompositions_for_jvp"
_LOADING = Lock()


class _Shared(AbstractContextManager[None]):
    """A setting that the first thread makes and the last one takes back."""

    # torch's own contexts save what they find and restore it, so that threads which overlap would
    # leave the setting of the one for good.

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

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._setting.__exit__(None, None, None)


class _ForwardMode(AbstractContextManager[None]):
    """One thread's turn at forward mode, whose open levels torch counts for the whole process."""

    def __init__(self) -> None:
        self._turn = RLock()

    def __enter__(self) -> None:
        _load_decompositions()
        self._turn.acquire()

    def __exit__(self, *_: object) -> None:
        self._turn.release()


FORWARD_MODE = _ForwardMode()
_ATTENTION = _Shared(lambda: sdpa_kernel(SDPBackend.MATH))
_UNCOMPILED = _Shared(lambda: torch.compiler.set_stance("force_eager"))


def differentiable_attention() -> AbstractContextManager[None]:
    """Compute attention by its formula: the fused kernels have no derivatives beyond the first."""
    return _ATTENTION


def uncompiled() -> AbstractContextManager[None]:
    """Run what a network compiled inside itself as it was written."""
    # Compiled functions drop the tangents of dual numbers silently (pytorch#187284).
    # Importing the compiler takes seconds; without it nothing can be compiled.
    return _UNCOMPILED if "torch._dynamo" in sys.modules else nullcontext()


def as_written(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function that takes derivatives run as it was written where a user compiles a call."""
    # torch.compile traces neither dual numbers nor settings of the process. It compiles the code
    # before and after the function, and calls the function itself.

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)
        # Not at definition: importing torch's compiler takes seconds.
        uncovered: Callable[Arguments, Result] = torch.compiler.disable(function)
        return uncovered(*args, **kwargs)

    return call


def _load_decompositions() -> None:
    """Load what torch would load at the first dual number of a process, without a warning."""
    # The module scripts a dozen functions of torch's, and torch.jit.script says that it is
    # deprecated, since torch 2.14 to every user. The filters of warnings belong to the whole
    # process: a context that changes them and puts them back loses what other threads change
    # meanwhile. So the module is executed here, once, with torch.jit.script replaced, in its own
    # namespace alone, by the function that it calls. Where a release of torch is built otherwise
    # nothing is done, and torch does it in its own way.
    # As torch asks: without TorchScript, or with assertions compiled away, it loads nothing.
    needed = os.environ.get("PYTORCH_JIT", "1") == "1" and __debug__
    if _DECOMPOSITIONS in sys.modules or not needed:
        return
    # Parts of torch that are not public may have gone in another release.
    with _LOADING, suppress(Exception):
        _execute_decompositions()


def _execute_decompositions() -> None:
    spec = find_spec(_DECOMPOSITIONS)
    if _DECOMPOSITIONS in sys.modules or spec is None or spec.loader is None:
        return
    module = module_from_spec(spec)
    stand_in = _copy(torch, jit=_copy(torch.jit, script=_script))

    def import_module(name: str, *args: Any, **kwargs: Any) -> ModuleType:
        imported = builtins.__import__(name, *args, **kwargs)
        return stand_in if imported is torch else imported

    names = vars(module)
    names["__builtins__"] = {**vars(builtins), "__import__": import_module}
    spec.loader.exec_module(module)
    names.update(torch=torch, __builtins__=builtins)
    internal: Any = torch._decomp
    internal.decompositions_for_jvp = sys.modules.setdefault(_DECOMPOSITIONS, module)


def _copy(module: ModuleType, **changes: Any) -> ModuleType:
    """A module with the same contents under the same name, but for some."""
    copy = ModuleType(module.__name__)
    vars(copy).update({**vars(module), **changes})
    return copy


def _script(function: FunctionType) -> Any:
    """Script a function, after those that it names, which torch.jit.script would be asked to."""
    internal: Any = torch._jit_internal
    resolve_name = internal.createResolutionCallbackFromClosure(function)

    def resolve(name: str) -> Any:
        value = resolve_name(name)
        is_scripted = isinstance(value, FunctionType) and not internal.is_ignored_fn(value)
        return _script(value) if is_scripted else value

    implementation: Any = torch.jit._script
    return implementation._script_impl(function, _rcb=resolve)

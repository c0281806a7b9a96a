"""The decompositions that torch's forward mode needs, loaded without a warning.

At the first dual number of a process torch imports ``torch._decomp.decompositions_for_jvp``, which
scripts a dozen functions of torch's. ``torch.jit.script`` says that it is deprecated, since torch
2.14 to every user. The filters of ``warnings`` belong to the whole process: a context that changes
them and puts them back loses what other threads change meanwhile. So the module is executed here,
once, with ``torch.jit.script`` replaced, in its own namespace alone, by what stands behind it.
"""

from __future__ import annotations

import builtins
import os
import sys
from contextlib import suppress
from importlib.util import find_spec, module_from_spec
from threading import Lock
from types import FunctionType, ModuleType
from typing import Any

import torch

__all__ = ["load_decompositions"]

_NAME = "torch._decomp.decompositions_for_jvp"
_LOADING = Lock()


def load_decompositions() -> None:
    """Load what torch would load at the first dual number, unless it has been loaded.

    Where a release of torch is built otherwise nothing is done, and torch does it in its own way.
    """
    # As torch asks: without TorchScript, or with assertions compiled away, it loads nothing.
    wanted = os.environ.get("PYTORCH_JIT", "1") == "1" and __debug__
    if _NAME in sys.modules or not wanted:
        return
    # Parts of torch that are not public may have gone in another release.
    with _LOADING, suppress(Exception):
        _load()


def _load() -> None:
    spec = find_spec(_NAME)
    if _NAME in sys.modules or spec is None or spec.loader is None:
        return
    module = module_from_spec(spec)
    stand_in = _copy(torch, jit=_copy(torch.jit, script=_script))

    def import_module(name: str, *args: Any, **kwargs: Any) -> ModuleType:
        found = builtins.__import__(name, *args, **kwargs)
        return stand_in if found is torch else found

    names = vars(module)
    names["__builtins__"] = {**vars(builtins), "__import__": import_module}
    spec.loader.exec_module(module)
    names.update(torch=torch, __builtins__=builtins)
    internal: Any = torch._decomp
    internal.decompositions_for_jvp = sys.modules.setdefault(_NAME, module)


def _copy(module: ModuleType, **changes: Any) -> ModuleType:
    """A module with the same contents under the same name, but for some."""
    copy = ModuleType(module.__name__)
    vars(copy).update({**vars(module), **changes})
    return copy


def _script(function: FunctionType) -> Any:
    """Script a function, after those that it names, which torch.jit.script would be asked to."""
    internal: Any = torch._jit_internal
    plain = internal.createResolutionCallbackFromClosure(function)

    def resolve(name: str) -> Any:
        value = plain(name)
        wanted = isinstance(value, FunctionType) and not internal.is_ignored_fn(value)
        return _script(value) if wanted else value

    implementation: Any = torch.jit._script
    return implementation._script_impl(function, _rcb=resolve)

"""Copies of modules that share their tensors, and of the callables that hold them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from copy import copy as shallow_copy
from copy import deepcopy
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .behind import is_filled, look_behind

__all__ = ["Choice", "replicate", "with_copies"]

# The tensor that a copy of a module holds, by the module and the tensor that it stands for.
Choice = Callable[[nn.Module, Tensor], Tensor]


def replicate(
    roots: Iterable[nn.Module], choose: Choice, training: bool | None = None
) -> dict[int, Any]:
    """Copies of modules and of all that is registered in them, and the tensors chosen for them.

    They are found by the ``id`` of what they stand for. The mode is that of the modules if it is
    not given.
    """
    # Scripted modules are copied as a whole.
    modules = look_behind([*roots], into_scripts=False).modules
    found: dict[int, Any] = {}
    for module in modules:
        scripted = isinstance(module, torch.jit.ScriptModule)
        found[id(module)] = deepcopy(module) if scripted else object.__new__(type(module))
    for module in modules:
        # A part that was compiled would run as a part of the module that it was compiled from.
        if _is_compiled(module):
            found[id(module)] = found[id(module._orig_mod)]
    for module in modules:
        for part in module.modules() if isinstance(module, torch.jit.ScriptModule) else [module]:
            for tensor in [*part._parameters.values(), *part._buffers.values()]:
                if tensor is not None and id(tensor) not in found:
                    found[id(tensor)] = choose(part, tensor)
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            _share_tensors(module, found[id(module)], found, training)
        elif not _is_compiled(module):
            _fill(module, found[id(module)], found, training)
    return found


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule"


def _fill(
    module: nn.Module, copy: nn.Module, found: dict[int, Any], training: bool | None
) -> None:
    state = {name: with_copies(value, found) for name, value in vars(module).items()}
    for name in ("_parameters", "_buffers", "_modules"):
        # Dictionaries of its own, because layers put other tensors into them.
        held = vars(module)[name].items()
        state[name] = {key: found.get(id(value), value) for key, value in held}
    if "_compiled_call_impl" in state:
        state["_compiled_call_impl"] = None
    if training is not None:
        state["training"] = training
    vars(copy).update(state)


def _share_tensors(module: Any, copy: Any, found: dict[int, Any], training: bool | None) -> None:
    """Put the chosen tensors into a copy of a scripted module, whose own are copies."""
    for part, twin in zip(module.modules(), copy.modules(), strict=True):
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is not None:
                twin._c.setattr(name, found[id(tensor)])
    if training is not None:
        copy.train(training)


def with_copies(value: Any, found: dict[int, Any]) -> Any:
    """A value with copies in place of the modules and tensors inside it."""
    if id(value) in found:
        return found[id(value)]
    if type(value) in (list, tuple, set):
        parts = [with_copies(part, found) for part in value]
        same = all(new is old for new, old in zip(parts, value, strict=True))
        return value if same else type(value)(parts)
    if type(value) in (dict, OrderedDict):
        parts = [with_copies(part, found) for part in value.values()]
        same = all(new is old for new, old in zip(parts, value.values(), strict=True))
        return value if same else type(value)(zip(value, parts, strict=True))
    if isinstance(value, MethodType):
        owner = with_copies(value.__self__, found)
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    if isinstance(value, partial):
        inner = with_copies([value.func, *value.args, value.keywords], found)
        return partial(inner[0], *inner[1:-1], **inner[-1])
    if isinstance(value, FunctionType):
        return _rebuilt(value, found)
    if callable(value) and hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        return _object_copy(value, found)
    return value


def _object_copy(value: Any, found: dict[int, Any]) -> Any:
    state = {n: found[id(v)] for n, v in vars(value).items() if isinstance(v, nn.Module)}
    if not state:
        return value
    copied = shallow_copy(value)
    vars(copied).update(state)
    return copied


def _rebuilt(function: FunctionType, found: dict[int, Any]) -> Any:
    """A function that closes over copies, and finds copies among its globals."""
    # A function may close over itself.
    found[id(function)] = function
    cells = function.__closure__ or ()
    held = [cell.cell_contents for cell in cells if is_filled(cell)]
    mapped = [with_copies(value, found) for value in held]
    named = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    swapped = {n: found[id(v)] for n, v in named.items() if id(v) in found and v is not None}
    if not swapped and all(new is old for new, old in zip(mapped, held, strict=True)):
        return function
    contents = iter(mapped)
    closure = tuple(CellType(next(contents)) if is_filled(cell) else cell for cell in cells)
    names = function.__globals__ | swapped if swapped else function.__globals__
    copy = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, closure
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    found[id(function)] = copy
    return copy

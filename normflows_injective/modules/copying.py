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

from .contents import closed_over, contents_of, globals_named_in, is_filled, modules_held_by

# The tensor that a copy of a module holds, by the module and the tensor that it stands for.
Choice = Callable[[nn.Module, Tensor], Tensor]


def replicate(
    roots: Iterable[nn.Module], choose: Choice, training: bool | None = None
) -> dict[int, Any]:
    """Copies of modules and the tensors chosen for them, by the ``id`` of their originals."""
    # Scripted modules are copied as a whole.
    modules = contents_of([*roots], into_scripts=False).modules
    copies: dict[int, Any] = {}
    for module in modules:
        scripted = isinstance(module, torch.jit.ScriptModule)
        copies[id(module)] = deepcopy(module) if scripted else object.__new__(type(module))
    for module in modules:
        # A part that was compiled would run as a part of the module that it was compiled from.
        if _is_compiled(module):
            copies[id(module)] = copies[id(module._orig_mod)]
    for module in modules:
        for part in module.modules() if isinstance(module, torch.jit.ScriptModule) else [module]:
            for tensor in [*part._parameters.values(), *part._buffers.values()]:
                if tensor is not None and id(tensor) not in copies:
                    copies[id(tensor)] = choose(part, tensor)
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            _share_tensors(module, copies[id(module)], copies, training)
        elif not _is_compiled(module):
            _fill(module, copies[id(module)], copies, training)
    return copies


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule"


def _fill(
    module: nn.Module, copy: nn.Module, copies: dict[int, Any], training: bool | None
) -> None:
    state = {name: with_copies(value, copies) for name, value in vars(module).items()}
    for name in ("_parameters", "_buffers", "_modules"):
        # Dictionaries of its own, because layers put other tensors into them.
        held = vars(module)[name].items()
        state[name] = {key: copies.get(id(value), value) for key, value in held}
    if "_compiled_call_impl" in state:
        state["_compiled_call_impl"] = None
    if training is not None:
        state["training"] = training
    vars(copy).update(state)


def _share_tensors(module: Any, copy: Any, copies: dict[int, Any], training: bool | None) -> None:
    """Put the chosen tensors into a copy of a scripted module, whose own are copies."""
    for part, twin in zip(module.modules(), copy.modules(), strict=True):
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is not None:
                twin._c.setattr(name, copies[id(tensor)])
    if training is not None:
        copy.train(training)


def with_copies(value: Any, copies: dict[int, Any]) -> Any:
    """A value with copies in place of the modules and tensors inside it."""
    if id(value) in copies:
        return copies[id(value)]
    if type(value) in (list, tuple, set):
        parts = [with_copies(part, copies) for part in value]
        return value if _are_same(parts, value) else type(value)(parts)
    if type(value) in (dict, OrderedDict):
        parts = [with_copies(part, copies) for part in value.values()]
        same = _are_same(parts, value.values())
        return value if same else type(value)(zip(value, parts, strict=True))
    if isinstance(value, MethodType):
        owner = with_copies(value.__self__, copies)
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    if isinstance(value, partial):
        parts = [value.func, value.args, value.keywords]
        function, args, keywords = with_copies(parts, copies)
        return partial(function, *args, **keywords)
    if isinstance(value, FunctionType):
        return _function_with_copies(value, copies)
    if callable(value) and hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        return _object_with_copies(value, copies)
    return value


def _are_same(new: Iterable[Any], old: Iterable[Any]) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))


def _object_with_copies(value: Any, copies: dict[int, Any]) -> Any:
    state = {name: copies[id(module)] for name, module in modules_held_by(value).items()}
    if not state:
        return value
    copy = shallow_copy(value)
    vars(copy).update(state)
    return copy


def _function_with_copies(function: FunctionType, copies: dict[int, Any]) -> Any:
    # A function may close over itself.
    copies[id(function)] = function
    old = closed_over(function)
    new = [with_copies(value, copies) for value in old]
    named = {
        name: copies[id(value)]
        for name, value in globals_named_in(function).items()
        if value is not None and id(value) in copies
    }
    if not named and _are_same(new, old):
        return function
    contents = iter(new)
    cells = function.__closure__ or ()
    closure = tuple(CellType(next(contents)) if is_filled(cell) else cell for cell in cells)
    names = function.__globals__ | named if named else function.__globals__
    copy = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, closure
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copies[id(function)] = copy
    return copy

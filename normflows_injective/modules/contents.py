"""The modules and scripts that callables hold."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import UnsupportedLayerError

# Layers that call no argument of theirs, and whose derivatives are right.
_PLAIN: frozenset[type] = frozenset(
    {
        nn.Conv1d,
        nn.Conv2d,
        nn.ELU,
        nn.Flatten,
        nn.GELU,
        nn.GroupNorm,
        nn.Identity,
        nn.LayerNorm,
        nn.Linear,
        nn.ModuleDict,
        nn.ModuleList,
        nn.Sequential,
        nn.SiLU,
        nn.Sigmoid,
        nn.Softplus,
        nn.Tanh,
    }
)
COMPILED = (
    "was compiled by torch.compile and has no double backward, which the surrogate needs. Pass "
    "the network uncompiled; SurrogateLikelihood(compile=True) compiles it with its derivatives."
)


class Contents(NamedTuple):
    """Modules, each once and submodules included, and functions of TorchScript."""

    modules: list[nn.Module]
    scripts: list[Any]


class Opened(partial[Any]):
    """A call with its contents, which serves one call of this package: users change modules."""

    contents: Contents


def modules_of(*sources: Any) -> list[nn.Module]:
    """All modules, each once, in modules, bound methods, partials, closures, lists and tuples."""
    return contents_of(sources).modules


def holds_script(*sources: Any) -> bool:
    """Whether sources hold a module or function of TorchScript, whose calls nobody sees."""
    modules, scripts = contents_of(sources)
    return bool(scripts) or any(
        _is_script(module) or torch.jit.ScriptFunction in map(type, module.__dict__.values())
        for module in modules
        if not is_plain_layer(module)
    )


def is_plain_layer(module: nn.Module) -> bool:
    """Whether a module is one of torch's layers as torch made it, which spares a longer look."""
    held = module.__dict__
    return type(module) in _PLAIN and "forward" not in held and "_compiled_call_impl" not in held


def contents_of(
    sources: Sequence[Any], seen: set[int] | None = None, into_scripts: bool = True
) -> Contents:
    """Modules and scripts in sources, without those whose ids are in ``seen``, which is added to.

    A function compiled by torch.compile is refused.
    """
    known = [source.contents for source in sources if isinstance(source, Opened)]
    if seen is None and known and len(known) == len(sources) == known.count(known[0]):
        return known[0]
    seen = set() if seen is None else seen
    modules: list[nn.Module] = []
    scripts: list[Any] = []
    stack = list(sources)
    while stack:
        source = stack.pop()
        if id(source) in seen:
            continue
        seen.add(id(source))
        if isinstance(source, nn.Module):
            modules.append(source)
            # Not by children(), which puts names together. Parts that are None lead nowhere.
            parts = source._modules
            if parts and (into_scripts or not _is_script(source)):
                stack.extend(parts.values())
        elif isinstance(source, Opened):
            new = [module for module in source.contents.modules if id(module) not in seen]
            seen.update(map(id, new))
            modules.extend(new)
            stack.extend(source.contents.scripts)
        elif isinstance(source, (list, tuple)):
            stack.extend(source)
        elif isinstance(source, torch.jit.ScriptFunction):
            scripts.append(source)
        elif isinstance(source, partial):
            stack.extend([source.func, *source.args, *source.keywords.values()])
        elif isinstance(source, MethodType):
            stack.append(source.__self__)
        elif isinstance(source, FunctionType):
            if hasattr(source, "_torchdynamo_orig_callable"):
                raise UnsupportedLayerError(f"A function {COMPILED}")
            stack.extend(closed_over(source))
            named = globals_named_in(source).values()
            stack.extend(value for value in named if isinstance(value, nn.Module))
        elif callable(source) and hasattr(source, "__dict__"):
            stack.extend(modules_held_by(source).values())
    return Contents(modules, scripts)


def _is_script(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def closed_over(function: FunctionType) -> list[Any]:
    """The values of the cells of a function's closure that are filled."""
    return [cell.cell_contents for cell in function.__closure__ or () if is_filled(cell)]


def globals_named_in(function: FunctionType) -> dict[str, Any]:
    """The globals that a function's code names, those that do not exist as None."""
    return {name: function.__globals__.get(name) for name in function.__code__.co_names}


def modules_held_by(value: Any) -> dict[str, nn.Module]:
    """The attributes of an object that are modules."""
    return {name: part for name, part in vars(value).items() if isinstance(part, nn.Module)}


def is_filled(cell: CellType) -> bool:
    """Whether a cell of a closure has a value yet."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True

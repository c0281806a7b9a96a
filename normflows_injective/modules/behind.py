"""Modules and scripts behind callables."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import UnsupportedLayerError

__all__ = [
    "Behind",
    "Opened",
    "COMPILED",
    "holds_script",
    "is_filled",
    "is_plain_layer",
    "look_behind",
    "modules_of",
]


# Layers that call nothing which they are given, and that nothing speaks against.
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


class Behind(NamedTuple):
    """What one look finds behind modules and callables.

    Attributes:
        modules: Every module once, submodules included.
        scripts: Functions of TorchScript.
    """

    modules: list[nn.Module]
    scripts: list[Any]


class Opened(partial[Any]):
    """A call with what stands behind it, so that nobody need look a second time.

    It serves one call of this package, because users change their modules between two.

    Attributes:
        behind: What was found.
    """

    behind: Behind


def modules_of(*sources: Any) -> list[nn.Module]:
    """All modules that can be found behind modules, bound methods, partials and closures.

    Args:
        *sources: Modules, callables, or lists and tuples of them.

    Returns:
        Every module once, submodules included.

    Raises:
        UnsupportedLayerError: If a function compiled by torch.compile is met.

    Examples:
        >>> net = nn.Sequential(nn.Linear(1, 1))
        >>> [type(m).__name__ for m in modules_of(net.forward)]
        ['Sequential', 'Linear']
    """
    return look_behind(sources).modules


def holds_script(*sources: Any) -> bool:
    """Whether a module or function of TorchScript can be found, whose calls nobody sees.

    Args:
        *sources: Modules, callables, or lists and tuples of them.

    Examples:
        >>> holds_script(nn.Linear(1, 1))
        False
    """
    modules, scripts = look_behind(sources)
    return bool(scripts) or any(
        _is_script(module) or torch.jit.ScriptFunction in map(type, module.__dict__.values())
        for module in modules
        if not is_plain_layer(module)
    )


def is_plain_layer(module: nn.Module) -> bool:
    """Whether a module is one of torch's layers as torch made it, which spares a longer look."""
    held = module.__dict__
    return type(module) in _PLAIN and "forward" not in held and "_compiled_call_impl" not in held


def look_behind(
    sources: Sequence[Any], seen: set[int] | None = None, into_scripts: bool = True
) -> Behind:
    """Look for modules and scripts behind sources, which are among what is found.

    Args:
        sources: Modules, callables, or lists and tuples of them.
        seen: By their ``id``, what an earlier look has found, which is left out and added to.
        into_scripts: Whether to look for the parts of a scripted module too.

    Returns:
        :class:`Behind`.

    Raises:
        UnsupportedLayerError: If a function compiled by torch.compile is met.

    Examples:
        >>> net, seen = nn.Sequential(nn.Linear(1, 1)), set()
        >>> len(look_behind([net[0]], seen).modules), len(look_behind([net], seen).modules)
        (1, 1)
    """
    known = [source.behind for source in sources if isinstance(source, Opened)]
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
            stack.append(source.behind)
        elif isinstance(source, Behind):
            new = [module for module in source.modules if id(module) not in seen]
            seen.update(map(id, new))
            modules.extend(new)
            scripts.extend(source.scripts)
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
            stack.extend(_modules_named_in(source))
        elif callable(source) and hasattr(source, "__dict__"):
            stack.extend(v for v in vars(source).values() if isinstance(v, nn.Module))
    return Behind(modules, scripts)


def _is_script(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def _modules_named_in(function: FunctionType) -> list[object]:
    """What a function closes over, and the modules among the globals that it names."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if is_filled(cell)]
    named = (function.__globals__.get(name) for name in function.__code__.co_names)
    return cells + [value for value in named if isinstance(value, nn.Module)]


def is_filled(cell: CellType) -> bool:
    """Whether a cell of a closure has a value yet."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True

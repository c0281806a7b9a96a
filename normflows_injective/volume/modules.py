"""What the modules behind a callable do to its derivatives, and what refuses them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import normflows as nf
import torch
from normflows.flows.residual import iResBlock
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..checks import is_readable
from ..errors import ShapeError, UnsupportedLayerError

__all__ = [
    "Behind",
    "Opened",
    "holds_script",
    "is_cold",
    "is_filled",
    "look_behind",
    "modules_of",
    "refuse_single_sample",
    "refuse_unsupported",
]


_FLAG = "data_dep_init_done"
# Flags that were read and found set, with their versions.
_WARM: WeakKeyDictionary[nn.Module, tuple[Tensor, int]] = WeakKeyDictionary()
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
_COMPILED = (
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
        if not _is_plain(module)
    )


def _is_plain(module: nn.Module) -> bool:
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
                raise UnsupportedLayerError(f"A function {_COMPILED}")
            stack.extend(_modules_named_in(source))
        elif callable(source) and hasattr(source, "__dict__"):
            stack.extend(v for v in vars(source).values() if isinstance(v, nn.Module))
    return Behind(modules, scripts)


def _is_script(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def is_cold(module: nn.Module) -> bool:
    """Whether a module has yet to initialise itself on data, as normflows' ActNorm does.

    Once it has, its flag is not read again until it is written: reading it would wait for a GPU at
    every step.

    Args:
        module: Any module.

    Returns:
        True until its first call; False where values cannot be read, as while exporting.

    Examples:
        >>> is_cold(nf.flows.ActNorm((2,)))
        True
    """
    if _FLAG not in module._buffers or torch.compiler.is_compiling():
        return False
    done = module._buffers[_FLAG]
    if done is None:
        return False
    version = None if done.is_inference() else done._version
    known = _WARM.get(module)
    if known is not None and known[0] is done and known[1] == version:
        return False
    if not is_readable(done):
        return False
    warm = bool(done > 0)
    if warm and version is not None:
        _WARM[module] = done, version
    return not warm


def refuse_single_sample(modules: Iterable[nn.Module], batch: Tensor) -> None:
    """Raise if a layer would initialise itself on a batch of one sample.

    Args:
        modules: Modules that the batch will pass.
        batch: Batch of shape (B, *).

    Raises:
        ShapeError: If B is one and a module has yet to be initialised: one sample has no standard
            deviation, and the host's layers would fill their parameters with NaN.

    Examples:
        >>> refuse_single_sample([nf.flows.ActNorm((2,))], torch.zeros(2, 2))
    """
    if batch.shape[0] != 1:
        return
    # Our own layers initialise themselves on data alone, not on samples, and check them.
    if any(is_cold(module) and not hasattr(module, "initialise") for module in modules):
        raise ShapeError(
            "A layer that initialises itself on its first batch (ActNorm) got a batch of one "
            "sample, which has no standard deviation. Start with a larger batch."
        )


def refuse_unsupported(modules: Iterable[nn.Module]) -> None:
    """Raise at the first module that would make a Jacobian or its gradient silently wrong.

    Args:
        modules: Modules of the differentiated part, as from :func:`modules_of`.

    Raises:
        UnsupportedLayerError: For batch normalisation and dropout in training mode, stochastic
            layers, the host's ``Residual`` with ``reduce_memory=True`` in training mode, and
            compiled sub-networks; the message says what to use.

    Examples:
        >>> refuse_unsupported(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval().modules())
    """
    for module in modules:
        reason = None if _is_plain(module) else _reason_against(module)
        if reason is not None:
            raise UnsupportedLayerError(f"{type(module).__name__} {reason}")


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


def _dropout(module: nn.Module) -> float:
    if isinstance(module, _DropoutNd):
        return module.p
    return module.dropout if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) else 0.0


def _reason_against(module: nn.Module) -> str | None:
    if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
        mode = "in training mode" if module.training else "without running statistics"
        return (
            f"{mode} couples the samples of a batch, so no per-sample Jacobian exists. "
            "Use nn.GroupNorm, or .eval() it."
        )
    if module.training and _dropout(module) > 0:
        return (
            "in training mode draws another network at every call, so encoder, decoder and "
            "their Jacobians would not belong together. Set p=0, or .eval() it."
        )
    if isinstance(module, nf.flows.BatchNorm):
        return (
            "couples the samples of a batch and has no inverse. Use nf.flows.ActNorm, or put "
            "nn.GroupNorm into the networks."
        )
    if isinstance(module, (nf.flows.MetropolisHastings, nf.flows.HamiltonianMonteCarlo)):
        return (
            "is stochastic: it has a log-weight but no Jacobian. It can stand before the first "
            "injection only."
        )
    if isinstance(module, iResBlock) and module.grad_in_forward and module.training:
        return (
            "with reduce_memory=True drops its own branch from the graph of a vector-Jacobian "
            "product, so its weights get no gradient. Build nf.flows.Residual with "
            "reduce_memory=False."
        )
    if isinstance(module, nn.RReLU) and module.training:
        return "in training mode draws another slope at every call. Use a fixed smooth activation."
    compiled_in_place = getattr(module, "_compiled_call_impl", None) is not None
    if type(module).__name__ == "OptimizedModule" or compiled_in_place:
        return _COMPILED
    return None

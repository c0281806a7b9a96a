"""By which keyword a component receives its context, as its signature says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import normflows as nf
import torch
from torch import nn

__all__ = [
    "context_keyword",
    "methods_without_keyword",
    "names_context",
    "read_while_tracing",
    "requires_keyword",
]

_KEYWORDS = ("context", "y")
_METHODS = ("forward", "inverse", "log_prob")
# Where torch and normflows raise NotImplementedError for what a class does not bring.
_ABSTRACT = (
    "_forward_unimplemented",
    "Flow.forward",
    "Flow.inverse",
    "BaseDistribution.forward",
    "BaseDistribution.log_prob",
    "Target.log_prob",
)
_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_NAMED = (*_BY_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)


def context_keyword(component: Any, method: str = "forward") -> str | None:
    """Name of the keyword by which a method of a component receives the context, or None.

    Args:
        component: A module, any callable, or an object with that method.
        method: ``"forward"``, which is the call itself of what is no module, or another method.

    Returns:
        ``"context"``, ``"y"`` or None. ``**options`` can take every keyword, so it takes
        ``"context"``.

    Examples:
        >>> context_keyword(nn.Linear(2, 2)) is None
        True
        >>> context_keyword(lambda z, context=None: z)
        'context'
        >>> context_keyword(lambda z, **options: z)
        'context'
    """
    parameters = _parameters(component, method)
    for keyword in _KEYWORDS:
        if keyword in parameters and parameters[keyword].kind in _BY_KEYWORD:
            return keyword
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return _KEYWORDS[0] if takes_all else None


def methods_without_keyword(component: Any) -> str:
    """Names of the methods that cannot be handed a context, as a message lists them.

    Args:
        component: As in :func:`context_keyword`.

    Examples:
        >>> methods_without_keyword(nn.Linear(2, 2))
        'forward'
    """
    methods = _own_methods(component)
    return " and ".join(name for name in methods if context_keyword(component, name) is None)


def names_context(component: Any, hosts: bool = False) -> bool:
    """Whether a method of a component has an argument for a context, by keyword or not.

    Args:
        component: As in :func:`context_keyword`.
        hosts: Whether to look at the methods of flows and bases that normflows wrote, which have
            the argument whether or not they use it, or at all the others.

    Examples:
        >>> names_context(nn.Linear(2, 2)), names_context(lambda z, context, /: z)
        (False, True)
    """
    return any(
        context_keyword(component, name) is not None
        or any(keyword in _parameters(component, name) for keyword in _KEYWORDS)
        for name in _own_methods(component)
        if _is_hosts(component, name) == hosts
    )


def requires_keyword(component: Any) -> bool:
    """Whether a method of a component, not by normflows, cannot be called without a context.

    Args:
        component: As in :func:`context_keyword`.

    Examples:
        >>> requires_keyword(lambda z, context: z), requires_keyword(lambda z, **options: z)
        (True, False)
    """
    return any(
        parameter.default is inspect.Parameter.empty
        for name in _own_methods(component)
        if not _is_hosts(component, name)
        for keyword, parameter in _parameters(component, name).items()
        if keyword in _KEYWORDS and parameter.kind in _NAMED
    )


def read_while_tracing() -> None:
    """Let torch.compile read signatures as it traces, rather than trace the reading."""
    # Not a decorator: importing torch's compiler takes seconds and adds a warning filter.
    for function in (context_keyword, methods_without_keyword, names_context, requires_keyword):
        torch.compiler.assume_constant_result(function)


def _own_methods(component: Any) -> Iterator[str]:
    """Methods that a component brings along, leaving out those that only raise."""
    component = _unwrapped(component)
    if isinstance(component, torch.jit.ScriptModule):
        yield "forward"
        return
    if callable(component) and not isinstance(component, nn.Module):
        yield "forward"
    for name in _METHODS:
        method = getattr(type(component), name, None)
        brought = method is not None and getattr(method, "__qualname__", "") not in _ABSTRACT
        if brought or name in getattr(component, "__dict__", {}):
            yield name


def _is_hosts(component: Any, method: str) -> bool:
    # By where the method was written: a user's subclass may inherit it, or bring its own.
    component = _unwrapped(component)
    if not isinstance(component, nn.Module) or isinstance(component, nf.distributions.Target):
        return False
    written = getattr(getattr(type(component), method, None), "__module__", None) or ""
    return written.partition(".")[0] == "normflows"


def _parameters(component: Any, method: str) -> Mapping[str, inspect.Parameter]:
    component = _unwrapped(component)
    if isinstance(component, torch.jit.ScriptModule):
        return _scripted_parameters(getattr(component, method))
    if method in getattr(component, "__dict__", {}):
        return _signature(vars(component)[method])
    if isinstance(component, nn.Module):
        kind: Any = type(component)
        return _method_parameters(kind, method)
    if method == "forward" and callable(component):
        return _signature(component)
    return _signature(getattr(component, method))


def _unwrapped(component: Any) -> Any:
    """The module that a wrapper of torch calls, whose signature the wrapper hides."""
    while isinstance(component, nn.Module):
        # Compiled modules keep it under the first name, distributed ones under the second.
        distributed = isinstance(component, _wrappers())
        inner = getattr(component, "module" if distributed else "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            break
        component = inner
    return component


def _wrappers() -> tuple[type[nn.Module], ...]:
    return nn.parallel.DataParallel, nn.parallel.DistributedDataParallel


@cache
def _method_parameters(kind: Any, method: str) -> Mapping[str, inspect.Parameter]:
    return _signature(getattr(kind, method))


def _signature(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:
        # Functions written in C may say nothing of their arguments.
        return {}


def _scripted_parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    return {
        argument.name: inspect.Parameter(
            argument.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=argument.default_value
            if argument.has_default_value()
            else inspect.Parameter.empty,
        )
        for argument in function.schema.arguments
    }

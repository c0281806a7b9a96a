"""By which keyword a component receives its context, as its signature says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import normflows as nf
import torch
from torch import nn

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
    """Keyword by which a method of a component takes the context: "context", "y" or None.

    The method ``forward`` is the call itself of a component that is no module. ``**options`` can
    take every keyword, so they take "context".
    """
    parameters = _parameters(component, method)
    for keyword in _KEYWORDS:
        if keyword in parameters and parameters[keyword].kind in _BY_KEYWORD:
            return keyword
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return _KEYWORDS[0] if takes_all else None


def methods_without_keyword(component: Any) -> str:
    """Names of the methods that cannot be handed a context, as a message lists them."""
    methods = _own_methods(component)
    return " and ".join(name for name in methods if context_keyword(component, name) is None)


def names_context(component: Any, of_normflows: bool = False) -> bool:
    """Whether a method of a component has an argument for a context, by keyword or not.

    Flows and bases that normflows wrote have the argument whether or not they use it, so they are
    looked at apart, if ``of_normflows``.
    """
    return any(
        context_keyword(component, name) is not None
        or any(keyword in _parameters(component, name) for keyword in _KEYWORDS)
        for name in _own_methods(component)
        if _is_of_normflows(component, name) == of_normflows
    )


def requires_keyword(component: Any) -> bool:
    """Whether a method of a component, not by normflows, cannot be called without a context."""
    return any(
        parameter.default is inspect.Parameter.empty
        for name in _own_methods(component)
        if not _is_of_normflows(component, name)
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


def _is_of_normflows(component: Any, method: str) -> bool:
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
    wrappers = nn.parallel.DataParallel, nn.parallel.DistributedDataParallel
    while isinstance(component, nn.Module):
        # Compiled modules keep it under the first name, distributed ones under the second.
        distributed = isinstance(component, wrappers)
        inner = getattr(component, "module" if distributed else "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            break
        component = inner
    return component


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

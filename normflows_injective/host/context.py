"""Which components take a context, and how it reaches them.

Normflows hands a context to every flow or to none. Here one model serves both cases, so it must
know which parts take one: those whose call has the keyword (``context``, or ``y`` in the
class-conditional bases) *and* that were built for it. The splines and autoregressive flows of
normflows always have the keyword; only those built with context features own a layer that reads
it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_finite
from ..checks.tensors import check_type
from ..errors import ContextError
from .keywords import context_keyword, methods_without_keyword, names_context, requires_keyword

_BUILT_FOR_CONTEXT = ("context_features", "context_channels", "context_layer", "context_encoder")


def takes_context(component: Any) -> bool:
    """Whether a component (flow, network, base or callable) can use a context.

    An attribute ``takes_context`` of its own decides; otherwise its signature does, where
    ``**options`` take everything, and for classes of normflows also whether they were built with
    context features. A component that takes one but has no keyword for it is refused.
    """
    own = getattr(component, "takes_context", None)
    takes = bool(own)
    if own is None:
        takes = names_context(component) or _of_normflows_and_built(component)
    lacking = methods_without_keyword(component) if takes else ""
    if lacking:
        raise _no_keyword(component, lacking)
    return takes


def needs_context(component: Any) -> bool:
    """Whether a component cannot answer without a context; its own ``needs_context`` decides."""
    own = getattr(component, "needs_context", None)
    if own is not None:
        return bool(own)
    return requires_keyword(component) or _of_normflows_and_built(component)


def context_arguments(
    component: Any, context: Tensor | None, method: str = "forward"
) -> dict[str, Tensor]:
    """Keyword arguments that hand a context (B, *) to a method of a component, or none."""
    if context is None or not takes_context(component):
        return {}
    keyword = context_keyword(component, method)
    if keyword is None:
        raise _no_keyword(component, method)
    return {keyword: context}


def check_context(components: Iterable[Any], context: Tensor | None, length: int) -> None:
    """Raise if a context is missing, superfluous, not of B rows, or not finite."""
    components = list(components)
    if context is None:
        needing = [type(part).__name__ for part in components if needs_context(part)]
        if needing:
            raise ContextError(
                f"{' and '.join(sorted(set(needing)))} was built with a context, but none came. "
                "Pass context=, one row per sample."
            )
        return
    if not any(takes_context(part) for part in components):
        raise ContextError(
            "A context came, but no base, flow or network of this model takes one: the answer "
            "would ignore it. Leave it out, or build the networks with context_dim=."
        )
    check_type(context, "context")
    if context.dim() == 0 or context.shape[0] != length:
        raise ContextError(
            f"context must have one row per sample, {length} in all, got shape "
            f"{tuple(context.shape)}. Repeat a single row with context.repeat_interleave("
            f"{length}, 0), or ask sample() for num_samples=len(context)."
        )
    check_finite(context, "context")


def expect_context(context: Tensor | None, length: int, context_dim: int, name: str) -> None:
    """Raise unless a context has exactly the shape (B, C), or is None for C = 0."""
    expected = (length, context_dim) if context_dim else None
    if (None if context is None else tuple(context.shape)) == expected:
        return
    received = "none" if context is None else f"one of shape {tuple(context.shape)}"
    expectation = f"a context of shape {expected}" if context_dim else "no context"
    raise ContextError(
        f"{name} with context_dim={context_dim} takes {expectation}, got {received}. One-hot "
        "encode labels, and give one row per sample."
    )


def context_shape(context: Tensor | None) -> torch.Size:
    """Batch shape of a context: all but its last dimension, or all of one of class labels."""
    if context is None:
        return torch.Size()
    return context.shape[:-1] if context.is_floating_point() else context.shape


def context_rows(context: Tensor | None, batch_shape: Sequence[int]) -> Tensor | None:
    """A context (*batch, C), or labels (*batch), with one row for each sample of a batch."""
    if context is None:
        return None
    row = context.shape[len(context_shape(context)) :]
    return context.expand(*batch_shape, *row).reshape(-1, *row)


def _no_keyword(component: Any, methods: str) -> ContextError:
    name = getattr(component, "__name__", type(component).__name__)
    return ContextError(
        f"{name} takes a context, but {methods} has no keyword by which it could arrive. Add the "
        "keyword context=None (or y=None for class labels), or **options and read "
        "options['context']; if it takes none, set takes_context = False."
    )


def _of_normflows_and_built(component: Any) -> bool:
    return names_context(component, of_normflows=True) and built_for_context(component)


def built_for_context(component: nn.Module) -> bool:
    """Whether a module or one inside it was built with context features."""
    if getattr(component, "class_cond", False) or getattr(component, "num_classes", None):
        return True
    return any(
        getattr(module, name, None) is not None
        for module in component.modules()
        for name in _BUILT_FOR_CONTEXT
    )

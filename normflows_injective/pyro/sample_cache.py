"""What a draw remembers until it is scored."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["SampleCache", "state_of"]

State = tuple[Any, ...] | None
_steps = [0]


def _count(*_: Any) -> None:
    _steps[0] += 1


# Fused optimisers change parameters without a trace in their versions.
register_optimizer_step_post_hook(_count)


def state_of(modules: Iterable[nn.Module], *tensors: Tensor | None) -> State:
    """What must not change between a draw and its score, cheap to compare.

    Storage and version of every parameter, buffer and further tensor, the modes of the modules,
    and the number of steps that optimisers have made. A change through ``tensor.data`` leaves no
    trace in it, as autograd sees none either.

    Args:
        modules: Modules whose parameters and buffers count.
        *tensors: Further tensors that count, such as a context.

    Returns:
        A tuple to compare, or None where changes leave no trace, in inference mode.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> before = state_of([layer])
        >>> with torch.no_grad():
        ...     _ = layer.weight.add_(1.0)
        >>> before == state_of([layer])
        False
    """
    parts: list[Any] = [_steps[0]]
    found = list(tensors)
    for root in modules:
        for module in root.modules():
            parts.append(module.training)
            found += (*module._parameters.values(), *module._buffers.values())
    for tensor in found:
        if tensor is None:
            continue
        if tensor.is_inference():
            return None
        parts += (tensor.data_ptr(), tensor._version, tensor.requires_grad)
    return tuple(parts)


@final
class SampleCache:
    """One slot: a tensor that was drawn, known by identity, and what its score needs.

    A flow that drew ``x`` from ``z`` knows its density without an inverse. Nothing else is ever
    remembered: data scored twice around a change of the parameters would get the first score.

    The tensor is held weakly, and what goes with it is dropped when it dies. The slot is empty in
    copies and pickles.

    Examples:
        >>> cache = SampleCache()
        >>> x = 2 * torch.ones(2, requires_grad=True)
        >>> cache.store(x, "its latents", ())
        >>> cache.find(x, ()), cache.find(torch.ones(2), ())
        ('its latents', None)
    """

    _sample: weakref.ref[Tensor] | None
    _found: Any
    _state: State
    _version: int

    def __init__(self) -> None:
        self.clear()

    def store(self, sample: Tensor, found: Any, state: State) -> None:
        """Remember what goes with a sample.

        Args:
            sample: What was drawn.
            found: What goes with it.
            state: The state in which it was drawn, see :func:`state_of`; None remembers nothing.
        """
        self.clear()
        if state is None or sample.is_inference():
            return
        self._found, self._state, self._version = found, state, sample._version

        own = weakref.ref(self)

        def forget(reference: Any) -> None:
            owner = own()
            if owner is not None and owner._sample is reference:
                owner.clear()

        self._sample = weakref.ref(sample, forget)

    def find(self, sample: Tensor, state: State, trains: bool = True) -> Any:
        """What goes with a sample, or None if it must be found anew.

        Args:
            sample: What is to be scored.
            state: The present state.
            trains: Whether the score is to be differentiated in something.

        Returns:
            What was stored with this tensor, in this state, if it was not changed in place. A
            sample without a graph would take
            the dependence on the parameters out of a score with one, so it has nothing.
        """
        if self._sample is None or self._sample() is not sample or self._state != state:
            return None
        if sample._version != self._version:
            return None
        if torch.is_grad_enabled() and sample.grad_fn is None and (trains or sample.requires_grad):
            return None
        return self._found

    def clear(self) -> None:
        """Forget."""
        self._sample = None
        self._found = None
        self._state = None
        self._version = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleCache, ()

"""What a draw remembers until it is scored."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from ...modules.precision import factored_dtype

__all__ = ["SampleCache", "State", "state_of", "versions"]


class State(NamedTuple):
    """What a draw depends on: marks of every tensor, and norms of those with decimals."""

    marks: tuple[Any, ...] | None
    norms: Tensor | None

    def agrees(self, other: State) -> bool:
        """Whether nothing has changed; where changes leave no trace, it may have."""
        if self.marks is None or self.marks != other.marks:
            return False
        if self.norms is None or other.norms is None:
            return self.norms is other.norms
        return torch.equal(self.norms, other.norms)


def state_of(modules: Iterable[nn.Module], *tensors: Tensor | None) -> State:
    """What must not change between a draw and its score, cheap to compare.

    The modes of the modules; storage and version of every parameter, buffer and further tensor;
    and their norms, because fused optimisers and ``tensor.data`` leave no trace in versions.

    Args:
        modules: Modules whose parameters and buffers count.
        *tensors: Further tensors that count, such as a context.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> before = state_of([layer])
        >>> _ = layer.weight.data.add_(1.0)
        >>> before.agrees(state_of([layer]))
        False
    """
    parts = [module for root in modules for module in root.modules()]
    found = [tensor for tensor in tensors if tensor is not None]
    for module in parts:
        held = (*module._parameters.values(), *module._buffers.values())
        found += [tensor for tensor in held if tensor is not None]
    marks = versions(found)
    if marks is None:
        return State(None, None)
    modes = tuple(module.training for module in parts)
    # Traced norms would become a part of the traced function.
    norms = None if torch._C._get_tracing_state() is not None else _norms(found)
    return State((modes, marks), norms)


def versions(tensors: Iterable[Tensor]) -> tuple[Any, ...] | None:
    """Marks by which most changes of tensors are seen.

    Args:
        tensors: Any tensors.

    Returns:
        Storage, version and need of gradients of each, or None if one is of inference mode, where
        no changes are counted.

    Examples:
        >>> x = torch.ones(2)
        >>> before = versions([x])
        >>> _ = x.add_(1.0)
        >>> before == versions([x])
        False
    """
    tensors = list(tensors)
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple((t.data_ptr(), t._version, t.requires_grad) for t in tensors)


def _norms(tensors: list[Tensor]) -> Tensor | None:
    decimals = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
    if not decimals:
        return None
    home = decimals[0].device
    norms = torch._foreach_norm(decimals)
    return torch.stack([norm.to(home, factored_dtype(home)) for norm in norms])


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
        >>> state = state_of([])
        >>> cache.store(x, "its latents", state)
        >>> cache.find(x, lambda: state), cache.find(torch.ones(2), lambda: state)
        ('its latents', None)
    """

    _sample: weakref.ref[Tensor] | None
    _found: Any
    _state: State | None
    _version: int

    def __init__(self) -> None:
        self.clear()

    def store(self, sample: Tensor, found: Any, state: State) -> None:
        """Remember what goes with a sample.

        Args:
            sample: What was drawn.
            found: What goes with it.
            state: The state in which it was drawn, see :func:`state_of`.
        """
        self.clear()
        if sample.is_inference():
            return
        self._found, self._state, self._version = found, state, sample._version

        own = weakref.ref(self)

        def forget(reference: Any) -> None:
            owner = own()
            if owner is not None and owner._sample is reference:
                owner.clear()

        self._sample = weakref.ref(sample, forget)

    def find(self, sample: Tensor, state: Callable[[], State], trains: bool = True) -> Any:
        """What goes with a sample, or None if it must be found anew.

        Args:
            sample: What is to be scored.
            state: Gives the present state; it is not asked for a tensor that was not drawn.
            trains: Whether the score is to be differentiated in something.

        Returns:
            What was stored with this tensor, in this state, if it was not changed in place. A
            sample without a graph would take the dependence on the parameters out of a score with
            one, so it has nothing.
        """
        if self._sample is None or self._state is None or self._sample() is not sample:
            return None
        if sample._version != self._version or not self._state.agrees(state()):
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

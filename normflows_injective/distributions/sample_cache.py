"""The memory of a draw until it is scored."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from ..modules.contents import modules_of
from ..modules.precision import factored_dtype


class State(NamedTuple):
    """Marks of all tensors that a draw depends on, and norms of those with decimals."""

    marks: tuple[Any, ...] | None
    norms: Tensor | None

    def agrees(self, other: State) -> bool:
        """Whether nothing has changed, which is never true of tensors that leave no marks."""
        if self.marks is None or self.marks != other.marks:
            return False
        if self.norms is None or other.norms is None:
            return self.norms is other.norms
        return torch.equal(self.norms, other.norms)


def state_of(modules: Iterable[nn.Module], *tensors: Tensor | None) -> State:
    """The state of modules and further tensors, such as a context, which is cheap to compare."""
    parts = modules_of(*modules)
    counted = [tensor for tensor in tensors if tensor is not None]
    for module in parts:
        own = (*module._parameters.values(), *module._buffers.values())
        counted += [tensor for tensor in own if tensor is not None]
    marks = versions(counted)
    if marks is None:
        return State(None, None)
    modes = tuple(module.training for module in parts)
    # Fused optimisers and tensor.data leave no trace in versions, but in norms. Traced norms would
    # become a part of the traced function.
    norms = None if torch._C._get_tracing_state() is not None else _norms(counted)
    return State((modes, marks), norms)


def versions(tensors: Iterable[Tensor]) -> tuple[Any, ...] | None:
    """Marks that show most changes of tensors, or None for those of inference mode."""
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
    """One slot for a tensor that was drawn, known by identity, and for the data of its score."""

    # A flow that drew x from z knows its density without an inverse. Nothing else is ever stored:
    # data scored before and after a change of the parameters would get the first score.
    #
    # The tensor is held weakly, and its data are dropped when it dies. The slot is empty in copies
    # and pickles.

    def __init__(self) -> None:
        # The sample, its version, the state in which it was drawn, and its data.
        self._held: tuple[weakref.ref[Tensor], int, State, Any] | None = None

    def store(self, sample: Tensor, data: Any, state: State) -> None:
        """Store data of a sample that was drawn in some state."""
        self.clear()
        if sample.is_inference():
            return
        own = weakref.ref(self)

        def forget(reference: Any) -> None:
            owner = own()
            if owner is not None and owner._held is not None and owner._held[0] is reference:
                owner.clear()

        self._held = weakref.ref(sample, forget), sample._version, state, data

    def find(self, sample: Tensor, state: Callable[[], State], trains: bool = True) -> Any:
        """The data of a sample, or None if it is another one or if anything has changed."""
        if self._held is None:
            return None
        reference, version, known, data = self._held
        if reference() is not sample or sample._version != version or not known.agrees(state()):
            return None
        # A sample without a graph would take the dependence on the parameters out of a score.
        if torch.is_grad_enabled() and sample.grad_fn is None and (trains or sample.requires_grad):
            return None
        return data

    def holds(self, sample: Tensor) -> bool:
        """Whether a tensor is the sample, unchanged."""
        return (
            self._held is not None
            and self._held[0]() is sample
            and self._held[1] == sample._version
        )

    def clear(self) -> None:
        """Forget the sample."""
        self._held = None

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleCache, ()

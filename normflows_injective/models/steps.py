r"""Training steps, counted by losses.

A training step is all that happens between two updates of the parameters, however many losses are
asked for meanwhile: the micro-batches of an accumulated gradient, terms that are logged beside the
loss. So a loss begins a step if parameters have changed since the last loss. Changes show in the
tensors' version counters at no cost. Fused optimisers, FSDP and writes through ``.data`` leave
these alone, so where they are equal a few numbers of every parameter are compared as well.

The losses that ``optimizer.step(closure)`` asks for (LBFGS) are one step, although the parameters
move between them. Such a loss finds the optimiser among its callers, and the optimiser tells when
it is done.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from operator import attrgetter
from types import FrameType
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch._C import _functorch

from ..autodiff.transforms import open_transforms
from ..checks import check_count
from ..errors import OptionError
from ..modules.contents import modules_of

_SAMPLE = 8
_IS_META = attrgetter("is_meta")
_IS_WRAPPED: Callable[[Tensor], bool] = _functorch.is_functorch_wrapped_tensor


class _Mirror(NamedTuple):
    """A step in memory of the CPU, with the buffer and its version from which it was read."""

    buffer: Tensor
    version: int
    value: int
    # Without it the value is a lower bound.
    exact: bool


@final
class StepCounter:
    """Tells whether a training loss begins a step, and keeps the number of steps on the CPU.

    Examples:
        >>> layer, steps = nn.Linear(1, 1), StepCounter()
        >>> parameters = trainable(layer)
        >>> steps.begins(parameters), steps.end_loss(parameters), steps.begins(parameters)
        (True, None, False)
        >>> _ = nn.init.ones_(layer.weight)
        >>> steps.begins(parameters)
        True
    """

    def __init__(self, by_hand: bool = False) -> None:
        self.by_hand = by_hand
        self._mirror: _Mirror | None = None
        self._versions: list[tuple[int, int]] | None = None
        self._sample: Tensor | None = None
        self._closures = _Closures()
        # Minus one while a loss belongs to the step that was counted last.
        self.offset = 0

    def hand_over(self) -> bool:
        """Leave counting to the user, and say if the step that ends now is still to be counted."""
        is_counted = not self.by_hand and self._versions is not None
        self.by_hand = True
        return not is_counted

    def begins(self, parameters: list[Tensor]) -> bool | Tensor:
        """Whether a training loss of parameters, asked for now, begins a step.

        The answer is a boolean tensor where reading it would wait for an accelerator.
        """
        if self.by_hand:
            return False
        if not _outlive_the_call(parameters):
            return True
        within = self._closures.begin()
        if self._versions is None:
            return True
        if within is not None:
            return within
        if _versions(parameters) != self._versions:
            self._sample = None
            return True
        before, self._sample = self._sample, _sample(parameters)
        if before is None or before.shape != self._sample.shape:
            return False
        changed = (before != self._sample).any()
        return bool(changed) if changed.device.type == "cpu" else changed

    def end_loss(self, parameters: list[Tensor]) -> None:
        """Remember the parameters, as they are once a training loss has been computed."""
        if self.by_hand or not _outlive_the_call(parameters):
            return
        if self._versions is None:
            self._sample = _sample(parameters)
        self._versions = _versions(parameters)
        self._closures.end_loss()

    def value(self, step: Tensor) -> int:
        """The number in a buffer, read from its device only if somebody else has written it."""
        known = self._known(step)
        if known is None or not known.exact:
            known = _Mirror(step, _version(step), int(step), True)
            self._mirror = None if step.is_inference() else known
        return known.value

    def is_known_to_reach(self, step: Tensor, end: int) -> bool:
        """Whether the number in a buffer is at least so large, as far as that is known here."""
        known = self._known(step)
        return known is not None and known.value >= end

    def add(self, step: Tensor, number: bool | Tensor) -> None:
        """Add 0 or 1 to a buffer."""
        known = self._known(step)
        step += number
        if known is not None:
            is_read = isinstance(number, bool)
            value = known.value + number if isinstance(number, bool) else known.value
            self._mirror = _Mirror(step, _version(step), value, known.exact and is_read)

    def __reduce__(self) -> tuple[type[StepCounter], tuple[bool]]:
        return StepCounter, (self.by_hand,)

    def _known(self, step: Tensor) -> _Mirror | None:
        known = self._mirror
        if known is None or known.buffer is not step or known.version != _version(step):
            return None
        return known


class _Closures:
    """Losses that a running ``Optimizer.step`` asks for."""

    def __init__(self) -> None:
        self._last_was_within = False
        self._current: torch.optim.Optimizer | None = None
        self._running: _Running | None = None

    def begin(self) -> bool | None:
        """Whether a loss within an optimiser's step begins one; None if it is outside."""
        self._current = optimizer = _running_optimizer()
        running = self._running
        if running is not None and (running.ended or running.optimizer() is not optimizer):
            running.hook.remove()
            self._running = None
        if optimizer is None:
            return None
        # A loss that was asked for just before the optimiser's step belongs to it.
        return self._running is None and self._last_was_within

    def end_loss(self) -> None:
        """Remember where the loss was asked for."""
        optimizer, self._current = self._current, None
        self._last_was_within = optimizer is not None
        if optimizer is not None and self._running is None:
            # The hook holds nothing but this list.
            ended: list[bool] = []
            hook = optimizer.register_step_post_hook(lambda *_: ended.append(True))
            self._running = _Running(weakref.ref(optimizer), hook, ended)


class _Running(NamedTuple):
    """One call of ``Optimizer.step``, and a hook that tells when it is over."""

    optimizer: weakref.ref[torch.optim.Optimizer]
    hook: Any
    ended: list[bool]


def _running_optimizer() -> torch.optim.Optimizer | None:
    """The optimiser whose ``step`` is among the callers, if there is one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "step":
            candidate = frame.f_locals.get("self")
            if isinstance(candidate, torch.optim.Optimizer):
                return candidate
        frame = frame.f_back
    return None


def trainable(module: nn.Module, modules: Sequence[nn.Module] | None = None) -> list[Tensor]:
    """Parameters that take gradients, in a module or in modules that were found already."""
    # By the modules: parameters() puts together names that nobody reads, at every call.
    return [
        parameter
        for part in (modules_of(module) if modules is None else modules)
        for parameter in part._parameters.values()
        if parameter is not None and parameter.requires_grad
    ]


def _outlive_the_call(parameters: list[Tensor]) -> bool:
    """Whether there are parameters that can be compared with those of the next loss."""
    if not parameters or torch.compiler.is_compiling() or any(map(_IS_META, parameters)):
        return False
    # Those of a functional transform are gone after it, and new ones come with every call.
    return not (open_transforms() and any(map(_IS_WRAPPED, parameters)))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _versions(parameters: Iterable[Tensor]) -> list[tuple[int, int]]:
    return [(id(p), 0 if p.is_inference() else p._version) for p in parameters]


@torch.no_grad()
def _sample(parameters: list[Tensor]) -> Tensor:
    device = parameters[0].device
    near = [parameter for parameter in parameters if parameter.device == device]
    return torch.cat([parameter.detach().reshape(-1)[:_SAMPLE] for parameter in near])


def check_window(steps: Any) -> tuple[int, int] | None:
    """The steps at which a warm-up starts and ends, as plain integers, or None."""
    if steps is None:
        return None
    if isinstance(steps, (tuple, list)) and len(steps) == 2:
        with suppress(OptionError):
            start, end = (check_count(step, "warmup_steps", least=0) for step in steps)
            if start <= end:
                return start, end
    raise OptionError(
        "warmup_steps must be (start, end) with finite whole numbers 0 <= start <= end, got "
        f"{steps!r}. Give (0, 300) for a ramp over 300 training steps, or None for none. Multiply "
        "fractions by the number of training steps."
    )

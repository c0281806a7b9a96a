"""One pass through the phases of a training, which can stop at any look and go on from there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, NonFiniteError
from .averages import AveragedWeights, write
from .clock import Clock
from .phases import Phase, Score
from .result import Check, PhaseResult, TrainingResult
from .rows import Rows
from .state import random_states, set_random_states

_RISE = 0.05
_AVERAGED_EVERY = 4
_MAX_NORM = 1.0
# How often a phase starts again from its best weights, each time at half the rate, before it ends
# for want of a better score, or by an error if its loss is not finite.
_MAX_STALLS = 3
_MAX_RETREATS = 8


class Options(NamedTuple):
    """Options of a run, and the functions that it calls at every look."""

    batch_size: int
    learning_rate: float | None
    weight_decay: float
    seed: int
    autocast: Callable[[], AbstractContextManager[Any]]
    callback: Callable[[Check], None]
    save: Callable[[dict[str, Any]], None]


@final
class Run:
    """A training in progress."""

    def __init__(
        self, model: nn.Module, phases: Sequence[Phase], clock: Clock, options: Options
    ) -> None:
        self.model, self.phases, self.clock, self.options = model, phases, clock, options
        self.generator = torch.Generator().manual_seed(options.seed)
        self.history: list[Check] = []
        self.results: list[PhaseResult] = []
        self.floor: float | None = None

    def complete(self, state: dict[str, Any] | None = None) -> TrainingResult:
        """Go through all phases, or through those that a state leaves."""
        of_phase = None if state is None else self._restore(state)
        for phase in self.phases[len(self.results) :]:
            self._train(phase, of_phase)
            of_phase = None
        return TrainingResult(tuple(self.results), tuple(self.history), self.floor, self._beta())

    def _train(self, phase: Phase, state: dict[str, Any] | None) -> None:
        self.model.eval()
        phase.begin(self.floor)
        if state is None:
            before, start = self._score(phase, phase.max_at_ends), self._score(phase)
            current = _Progress(phase, start.value, before.value, self.options.weight_decay)
        else:
            current = _Progress(phase, 0.0, 0.0, self.options.weight_decay)
            current.load_state_dict(state)
            set_random_states(state["random"])
        shares = sum(other.share for other in self.phases[len(self.results) :])
        self.clock.begin(phase.share / shares, current.spent)
        losses: list[float] = []
        while (progress := self.clock.progress(current.step, phase.cost)) < 1:
            if current.has_stalled(phase.patience):
                if current.num_retreats >= _MAX_STALLS:
                    break
                current.retreat()
            losses.append(self._step(phase, current, progress))
            progress = self.clock.progress(current.step, phase.cost)
            if progress < min(1.0, (current.num_checks + 1) / phase.num_checks):
                continue
            self._check(phase, current, progress, losses)
            losses.clear()
        self._end(phase, current)

    def _step(self, phase: Phase, current: _Progress, progress: float) -> float:
        """Update the weights once, and return the loss."""
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        peak = self.options.learning_rate or phase.rate
        rate = peak * min(1.0, progress / _RISE + 0.01) * cosine / 2**current.num_retreats
        for group in current.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        current.step += 1
        rows = current.batch(phase.rows, self.options.batch_size, self.generator)
        try:
            with self.options.autocast():
                loss = phase.loss(rows)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NonFiniteError(f"The loss of the phase {phase.name} became {value}.")
        except NonFiniteError:
            current.retreat()
            return math.nan
        current.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(current.parameters, _MAX_NORM)
        current.optimizer.step()
        if current.step % _AVERAGED_EVERY == 0:
            current.averages.update()
        return value

    def _check(
        self, phase: Phase, current: _Progress, progress: float, losses: list[float]
    ) -> None:
        """Judge the averaged weights, and tell of it."""
        with current.averages.applied():
            score = self._score(phase)
            if score.value < current.best_score:
                current.best_score, current.best_at = score.value, progress
                current.best = current.copies()
        current.checked_at = progress
        current.num_checks = int(progress * phase.num_checks + 1e-9)
        current.spent = self.clock.spent(current.step, phase.cost)
        seconds, loss = self.clock.seconds(), sum(losses) / max(1, len(losses))
        self.history.append(Check(phase.name, current.step, seconds, loss, *score))
        self.options.callback(self.history[-1])
        self.options.save(self._state(current))

    def _end(self, phase: Phase, current: _Progress) -> None:
        """Take the best averages or the last weights, or else those from before the phase."""
        last, at_last = current.copies(), self._score(phase, phase.max_at_ends)
        write(current.parameters, current.best)
        after = self._score(phase, phase.max_at_ends)
        if at_last.value < after.value:
            write(current.parameters, last)
            after = at_last
        is_kept = after.value <= current.before
        if not is_kept:
            write(current.parameters, current.initial)
        phase.end()
        self.clock.end(current.step, phase.cost)
        if phase.name == "reconstruction":
            self.floor = after.value if is_kept else current.before
        seconds = self.clock.seconds()
        self.results.append(
            PhaseResult(phase.name, current.step, seconds, current.before, after.value, is_kept)
        )
        if len(self.results) == len(self.phases):
            self.options.save(self._state(None))

    @torch.no_grad()
    def _score(self, phase: Phase, max_rows: int | None = None) -> Score:
        """The held-out score in evaluation mode, infinite where it is not a finite number."""
        self.model.eval()
        try:
            score = phase.score(phase.max_held_out if max_rows is None else max_rows)
        except NonFiniteError:
            return Score(math.inf)
        return score if math.isfinite(score.value) else score._replace(value=math.inf)

    def _beta(self) -> float | None:
        beta = getattr(getattr(self.model, "likelihood", None), "beta", None)
        return beta if self.floor is not None and isinstance(beta, float) else None

    def _state(self, current: _Progress | None) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "beta": self._beta(),
            "floor": self.floor,
            "left": self.clock.left,
            "history": [list(check) for check in self.history],
            "results": [list(result) for result in self.results],
            "batches": self.generator.get_state(),
            "phase": None if current is None else current.state_dict(),
        }

    def _restore(self, state: dict[str, Any]) -> dict[str, Any] | None:
        try:
            self.model.load_state_dict(state["model"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"The checkpoint does not hold a training of this model: {error} Build the model "
                "as it was, or give another path."
            ) from error
        if state["beta"] is not None:
            self.model.likelihood.beta = state["beta"]  # type: ignore[union-attr]
        self.floor, self.clock.left = state["floor"], state["left"]
        self.history = [Check(*check) for check in state["history"]]
        self.results = [PhaseResult(*result) for result in state["results"]]
        self.generator.set_state(state["batches"])
        of_phase: dict[str, Any] | None = state["phase"]
        return of_phase


class _Progress:
    """The state within a phase: weights, their average and the best ones, and the batches."""

    def __init__(self, phase: Phase, start: float, before: float, weight_decay: float) -> None:
        self.parameters = phase.parameters()
        self.initial = self.copies()
        self.best, self.best_score, self.best_at = self.initial, start, 0.0
        self.before, self.weight_decay = before, weight_decay
        self.step = self.num_checks = self.num_retreats = 0
        self.spent = self.checked_at = 0.0
        self.order = torch.zeros(0, dtype=torch.long)
        self._start()

    def has_stalled(self, patience: float) -> bool:
        """Whether the best score is too long ago for more to be expected."""
        return self.checked_at - self.best_at > patience and self.averages.count >= 8

    def copies(self) -> list[Tensor]:
        """Copies of the present weights."""
        return [parameter.detach().clone() for parameter in self.parameters]

    def _start(self) -> None:
        # An update of all weights in one kernel takes a fifth of the time.
        fused = all(p.device.type in ("cpu", "cuda") for p in self.parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters, weight_decay=self.weight_decay, fused=fused
        )
        self.averages = AveragedWeights(self.parameters)

    def batch(self, rows: Rows, size: int, generator: torch.Generator) -> Rows:
        """The next rows in an order that is drawn anew when it is used up."""
        size = min(size, rows.count)
        if len(self.order) < size:
            self.order = torch.randperm(rows.count, generator=generator)
        index, self.order = self.order[:size], self.order[size:]
        return rows.take(index.to(rows.x.device))

    def retreat(self) -> None:
        """Start again from the best weights, at half the rate."""
        self.num_retreats += 1
        if self.num_retreats > _MAX_RETREATS:
            raise NonFiniteError(
                f"The training diverged {self.num_retreats} times, the last at half the rate of "
                "the time before. Look for values of absurd size in the data, or standardise them."
            )
        write(self.parameters, self.best)
        self.best_at = self.checked_at
        self._start()

    def state_dict(self) -> dict[str, Any]:
        """All of it, and the state of torch's random numbers."""
        tensors = {name: getattr(self, name) for name in ("initial", "best", "order")}
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        return {
            **tensors,
            **numbers,
            "optimizer": self.optimizer.state_dict(),
            "averages": self.averages.state_dict(),
            "random": random_states(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        for name in ("initial", "best", "order", *_NUMBERS):
            setattr(self, name, state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.averages.load_state_dict(state["averages"])


_COUNTS = ("step", "num_checks", "num_retreats")
_NUMBERS = ("best_score", "best_at", "checked_at", "before", "spent", *_COUNTS)

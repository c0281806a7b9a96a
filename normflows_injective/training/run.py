"""One pass through the phases of a training, which can stop at any look and go on from there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, final

import torch
from torch import nn

from ..errors import CheckpointError, NonFiniteError
from .averages import write
from .clock import Clock
from .phases import Phase, Score
from .processes import Processes
from .progress import Progress
from .result import Check, PhaseResult, TrainingResult
from .state import set_random_states

_RISE = 0.05
_AVERAGED_EVERY = 4
_MAX_NORM = 1.0
_LEAST_STEPS = 20
# Parts of a phase's time that scores may take, all looks and each one at an end, and the rows by
# which their cost is measured, the fewest ever taken.
_LOOKS, _END = 0.1, 0.02
_FEW_ROWS = 128


class Options(NamedTuple):
    """Options of a run, and the functions that it calls.

    A checkpoint is gone on from if its ``identity``, of data and options, is the same.
    """

    batch_size: int
    learning_rate: float | None
    weight_decay: float
    seed: int
    identity: dict[str, Any]
    wrap: Callable[[nn.Module], nn.Module]
    autocast: Callable[[], AbstractContextManager[Any]]
    callback: Callable[[Check], object]
    save: Callable[[dict[str, Any]], None]


@final
class Run:
    """A training in progress."""

    def __init__(
        self,
        model: Any,
        phases: Sequence[Phase],
        clock: Clock,
        processes: Processes,
        options: Options,
    ) -> None:
        self.model, self.phases, self.clock = model, phases, clock
        self.processes, self.options = processes, options
        self.generator = torch.Generator().manual_seed(options.seed + processes.rank)
        self.history: list[Check] = []
        self.results: list[PhaseResult] = []
        self.floor: float | None = None
        self.floor_rows = torch.zeros(0)

    def complete(self, state: dict[str, Any] | None = None) -> TrainingResult:
        """Go through all phases, or through those that a state leaves."""
        of_phase = None if state is None else self._restore(state)
        self.processes.copy_from_first(self.model)
        for phase in self.phases[len(self.results) :]:
            self._train(phase, of_phase)
            of_phase = None
        return TrainingResult(tuple(self.results), tuple(self.history), self.floor, self._beta())

    def _train(self, phase: Phase, state: dict[str, Any] | None) -> None:
        self.model.eval()
        shares = sum(other.share for other in self.phases[len(self.results) :])
        spent = 0.0 if state is None else state["spent"]
        self.clock.begin(phase.share / shares, spent)
        phase.floor = math.inf if self.floor is None else self.floor
        phase.floor_rows = self.floor_rows
        phase.begin()
        # Layers may have taken their first data, of which every process has its own.
        self.processes.copy_from_first(self.model)
        current = Progress(
            [p for p in phase.module.parameters() if p.requires_grad], self.options.weight_decay
        )
        if state is None:
            self._choose_rows(phase, current)
            before = self._score(phase, current.num_rows_at_ends)
            current.before, current.rows_before = before.value, before.rows
            if current.num_rows != current.num_rows_at_ends:
                before = self._score(phase, current.num_rows)
            current.best_score = before.value
        else:
            self._go_on(current, state)
        phase.wrapped = self.options.wrap(phase.module)
        losses: list[float] = []
        most_steps = self._most_steps(phase)
        self.model.train()
        # The clock is read once a step, because some systems take half a millisecond for it.
        progress = self._progress(phase, current)
        while progress < 1 and not current.is_over(phase.patience):
            losses.append(self._step(phase, current, progress))
            progress = self._progress(phase, current)
            if current.step % most_steps == 0:
                self._judge(phase, current, progress)
            if progress >= min(1.0, (current.num_checks + 1) / phase.num_checks):
                self._check(phase, current, progress, losses)
                losses.clear()
                progress = self._progress(phase, current)
        self._end(phase, current)

    def _progress(self, phase: Phase, current: Progress) -> float:
        return self.processes.mean(self.clock.progress(current.step, phase.cost))[0]

    def _step(self, phase: Phase, current: Progress, progress: float) -> float:
        """Update the weights once, and return the loss."""
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        peak = self.options.learning_rate or phase.rate
        for group in current.optimizer.param_groups:
            group["lr"] = peak * min(1.0, progress / _RISE + 0.01) * cosine * current.rate
        current.step += 1
        rows = current.batch(phase.rows, self.options.batch_size, self.generator)
        try:
            with self.options.autocast():
                loss = phase.loss(rows)
            value = float(loss.detach())
        except NonFiniteError:
            value = math.nan
        (mean,) = self.processes.mean(value)
        if not math.isfinite(mean):
            current.diverge()
            return mean
        current.optimizer.zero_grad()
        loss.backward()
        self.processes.average(p.grad for p in current.parameters if p.grad is not None)
        nn.utils.clip_grad_norm_(current.parameters, _MAX_NORM)
        current.optimizer.step()
        if current.step % _AVERAGED_EVERY == 0:
            current.averages.update()
        return mean

    def _most_steps(self, phase: Phase) -> float:
        """Steps between two scores at most, the same in all processes."""
        (rows,) = self.processes.mean(phase.rows.count)
        return max(_LEAST_STEPS, phase.num_epochs * math.ceil(rows / self.options.batch_size))

    def _judge(self, phase: Phase, current: Progress, progress: float) -> Score:
        """The held-out score of the averaged weights, which are kept if they are the best."""
        with current.averages.applied():
            score = self._score(phase, current.num_rows)
            if score.value < current.best_score:
                current.best_score, current.best_at = score.value, progress
                current.best = current.copies()
        self.model.train()
        return score

    def _check(
        self, phase: Phase, current: Progress, progress: float, losses: list[float]
    ) -> None:
        """Judge the averaged weights, and tell of it."""
        score = self._judge(phase, current, progress)
        current.checked_at = progress
        current.num_checks = int(progress * phase.num_checks + 1e-9)
        current.spent = self.clock.spent(current.step, phase.cost)
        seconds, loss = self.clock.seconds(), sum(losses) / max(1, len(losses))
        self.history.append(Check(phase.name, current.step, seconds, loss, *score[:3]))
        self.options.callback(self.history[-1])
        self.options.save(self._state(current))

    def _end(self, phase: Phase, current: Progress) -> None:
        """Take the last weights or the best averages, or those from before the phase.

        The best of many scores is better than the one before by chance already. Where the state
        before is good, rows have to be better by a number of standard errors.
        """
        candidates = []
        for weights in (current.best, current.copies()):
            write(current.parameters, weights)
            candidates.append((self._score(phase, current.num_rows_at_ends), weights))
        score, taken = min(candidates, key=lambda candidate: candidate[0].value)
        clear = self.processes.errors_above_zero(current.rows_before - score.rows)
        is_kept = score.value < current.before and clear >= phase.margin
        after = score.value if is_kept else current.before
        write(current.parameters, taken if is_kept else current.initial)
        # A wrapper that reduces gradients must not see those of the next phase.
        phase.wrapped = None
        phase.end()
        self.processes.copy_from_first(self.model)
        self.clock.end(current.step, phase.cost)
        if phase.name == "reconstruction":
            self.floor = after
            self.floor_rows = score.rows if is_kept else current.rows_before
        self.results.append(
            PhaseResult(
                phase.name, current.step, self.clock.seconds(), current.before, after, is_kept
            )
        )
        if len(self.results) == len(self.phases):
            self.options.save(self._state(None))

    def _choose_rows(self, phase: Phase, current: Progress) -> None:
        """Take fewer held-out rows than a phase asks for where their scores would take long."""
        current.num_rows, current.num_rows_at_ends = phase.num_rows, phase.num_rows_at_ends
        if not self.clock.is_time:
            return
        start = self.clock.seconds()
        self._score(phase, _FEW_ROWS)
        (cost,) = self.processes.mean((self.clock.seconds() - start) / _FEW_ROWS)
        affordable = self.clock.allotted / max(cost, 1e-9)
        looks, end = (int(part * affordable) for part in (_LOOKS, _END))
        current.num_rows = min(phase.num_rows, max(_FEW_ROWS, looks // phase.num_checks))
        current.num_rows_at_ends = min(phase.num_rows_at_ends, max(_FEW_ROWS, end))

    @torch.no_grad()
    def _score(self, phase: Phase, max_rows: int) -> Score:
        """The held-out score in evaluation mode, infinite where it is not a finite number."""
        self.model.eval()
        try:
            score = phase.score(max_rows)
        except NonFiniteError:
            score = Score(math.inf)
        value, reconstruction, nll = self.processes.mean(*score[:3])
        score = Score(value, reconstruction, nll, score.rows)
        return score if math.isfinite(score.value) else score._replace(value=math.inf)

    def _beta(self) -> float | None:
        beta = getattr(getattr(self.model, "likelihood", None), "beta", None)
        return beta if self.floor is not None and isinstance(beta, float) else None

    def _state(self, current: Progress | None) -> dict[str, Any]:
        return {
            "of": self.options.identity,
            "model": self.model.state_dict(),
            "beta": self._beta(),
            "floor": self.floor,
            "floor_rows": self.floor_rows,
            "left": self.clock.left,
            "history": [list(check) for check in self.history],
            "results": [list(result) for result in self.results],
            "batches": self.generator.get_state(),
            "phase": None if current is None else current.state_dict(),
        }

    def _restore(self, state: dict[str, Any]) -> dict[str, Any] | None:
        try:
            self.model.load_state_dict(state["model"])
            others = {
                name: (there, state["of"].get(name))
                for name, there in self.options.identity.items()
                if there != state["of"].get(name)
            }
        except (KeyError, TypeError, RuntimeError, AttributeError) as error:
            lines = str(error).splitlines()
            raise CheckpointError(
                "The checkpoint does not hold a training of this model: "
                f"{lines[min(1, len(lines) - 1)].strip()} Build the model as it was, or give "
                "another path."
            ) from error
        if others:
            name, (here, there) = next(iter(others.items()))
            raise CheckpointError(
                f"The checkpoint holds another training: {name} is {here} here and {there} in the "
                "file. Go on with the same data and options, or give another path."
            )
        if state["beta"] is not None:
            self.model.likelihood.beta = state["beta"]
        self.floor, self.clock.left = state["floor"], state["left"]
        self.history = [Check(*check) for check in state["history"]]
        self.results = [PhaseResult(*result) for result in state["results"]]
        # The rows are those of rank 0, as the file is.
        self.floor_rows = state["floor_rows"][: None if self.processes.rank == 0 else 0]
        self.generator.set_state(state["batches"])
        of_phase: dict[str, Any] | None = state["phase"]
        return of_phase

    def _go_on(self, current: Progress, state: dict[str, Any]) -> None:
        """Take up a phase; batches and random numbers of a file are those of rank 0."""
        current.load_state_dict(state)
        if self.processes.rank == 0:
            set_random_states(state["random"])
        else:
            current.order = current.order[:0]
            seed = self.options.seed + self.processes.rank + current.step
            self.generator = torch.Generator().manual_seed(seed)

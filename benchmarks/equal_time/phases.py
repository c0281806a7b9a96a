"""Trainings that end when their processor time is spent, plain ones and careful ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "Choice",
    "Phase",
    "PhaseReport",
    "Setting",
    "batches",
    "one_cycle",
    "rise_and_cosine",
    "train",
]

BATCH, MAX_GRAD_NORM = 256, 1.0
NUM_CHOICES, PATIENCE = 25, 0.25
RISE = 0.05
AVERAGE_EVERY, AVERAGE_POWER = 4, 8


class Setting(NamedTuple):
    """Learning rate in units of its peak, and Adam's first decay rate."""

    rate: float
    momentum: float = 0.9


class Choice(NamedTuple):
    """Averaged weights, chosen by a held-out score.

    Attributes:
        score: A number of the validation rows, smaller if better.
        most_wait: Share of the phase without a better score after which it ends.
    """

    score: Callable[[], Tensor]
    most_wait: float = PATIENCE


class Phase(NamedTuple):
    """One training.

    Attributes:
        name: Its name in the records.
        loss: Batch (B, D) to a 0-dimensional loss.
        parameters: What is trained.
        rows: Training rows (N, D).
        seconds: Processor time that it may spend, its held-out scores included.
        seed: Of the order of the batches.
        rate: Peak learning rate.
        schedule: Share of the time spent to the setting of the optimiser.
        choice: Averaging and choice of weights; None keeps the last weights.
        before_step: Gets the share of the time spent before every loss.
    """

    name: str
    loss: Callable[[Tensor], Tensor]
    parameters: Sequence[nn.Parameter]
    rows: Tensor
    seconds: float
    seed: int
    rate: float
    schedule: Callable[[float], Setting]
    choice: Choice | None = None
    before_step: Callable[[float], None] | None = None


class PhaseReport(NamedTuple):
    """What a training did.

    Attributes:
        name: Of the phase.
        steps: Number of updates.
        seconds: Processor time, choices included.
        step_seconds: Processor time of an update, choices excluded.
        chosen_at: Share of the time at which the weights were chosen; 1 for the last weights.
        score: The held-out score of these weights; NaN for the last weights.
    """

    name: str
    steps: int
    seconds: float
    step_seconds: float
    chosen_at: float = 1.0
    score: float = math.nan


def one_cycle(progress: float) -> Setting:
    """The cycle of torch's ``OneCycleLR`` with its defaults, of rate and momentum."""
    start, end, peak_at = 1 / 25, 1 / 25e4, 0.3
    if progress < peak_at:
        rising = _cosine(progress / peak_at)
        return Setting(start + (1 - start) * rising, 0.95 - 0.1 * rising)
    falling = _cosine((progress - peak_at) / (1 - peak_at))
    return Setting(1 + (end - 1) * falling, 0.85 + 0.1 * falling)


def rise_and_cosine(progress: float) -> Setting:
    """A linear rise in the first twentieth, then a cosine to zero."""
    if progress < RISE:
        return Setting(progress / RISE)
    return Setting(1 - _cosine((progress - RISE) / (1 - RISE)))


def train(phase: Phase) -> PhaseReport:
    """Train in place until the processor time of the phase is spent."""
    # An update of all weights in one kernel takes a fifth of the time.
    optimizer = torch.optim.Adam(phase.parameters, lr=phase.rate, fused=True)
    (group,) = optimizer.param_groups
    rows = batches(phase.rows, phase.seed)
    chooser = None if phase.choice is None else _Chooser(phase.parameters, phase.choice)
    steps, choosing, start = 0, 0.0, time.process_time()
    while (spent := (time.process_time() - start) / phase.seconds) < 1:
        setting = phase.schedule(spent)
        group["lr"] = phase.rate * setting.rate
        group["betas"] = (setting.momentum, group["betas"][1])
        if phase.before_step is not None:
            phase.before_step(spent)
        loss = phase.loss(next(rows))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(phase.parameters, MAX_GRAD_NORM)
        optimizer.step()
        steps += 1
        if chooser is not None:
            before = time.process_time()
            is_over = chooser.after_step(steps, (before - start) / phase.seconds)
            choosing += time.process_time() - before
            if is_over:
                break
    if chooser is not None:
        chooser.finish()
    seconds = time.process_time() - start
    report = PhaseReport(phase.name, steps, seconds, (seconds - choosing) / max(steps, 1))
    if chooser is not None:
        report = report._replace(chosen_at=chooser.best_at, score=chooser.best)
    return report


def batches(rows: Tensor, seed: int) -> Iterator[Tensor]:
    """Batches of shuffled rows without end, a new order for every pass over the rows."""
    generator = torch.Generator().manual_seed(seed)
    size = min(BATCH, len(rows))
    while True:
        order = torch.randperm(len(rows), generator=generator)
        yield from (rows[chosen] for chosen in order.split(size) if len(chosen) == size)


class _Chooser:
    r"""Averaged weights :math:`e`, and those of the best held-out score so far.

    .. math:: e \leftarrow e + (1 - (1 - 1/k)^8) (w - e) \quad \text{at the k-th average}
    """

    def __init__(self, parameters: Sequence[nn.Parameter], choice: Choice) -> None:
        self.best, self.best_at = math.inf, 0.0
        self._parameters, self._choice = list(parameters), choice
        self._average = self._copies()
        self._best_weights = self._copies()
        self._num_averages, self._num_choices = 0, 0

    @torch.no_grad()
    def after_step(self, steps: int, progress: float) -> bool:
        """Average and choose when it is time, and say whether the phase is to end."""
        if steps % AVERAGE_EVERY == 0:
            self._update_average()
        if progress * NUM_CHOICES >= self._num_choices + 1:
            self._num_choices = int(progress * NUM_CHOICES)
            self._choose(progress)
        return progress - self.best_at > self._choice.most_wait

    @torch.no_grad()
    def finish(self) -> None:
        """Choose for a last time, and leave the best weights in the parameters."""
        self._choose(1.0)
        self._write(self._best_weights)

    def _update_average(self) -> None:
        self._num_averages += 1
        share = 1 - (1 - 1 / self._num_averages) ** AVERAGE_POWER
        torch._foreach_lerp_(self._average, self._parameters, share)

    def _choose(self, progress: float) -> None:
        if self._num_averages == 0:
            self._update_average()
        last = self._copies()
        self._write(self._average)
        score = float(self._choice.score())
        if score < self.best:
            self.best, self.best_at = score, progress
            self._best_weights = self._copies()
        self._write(last)

    def _copies(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]

    def _write(self, weights: Sequence[Tensor]) -> None:
        for parameter, weight in zip(self._parameters, weights, strict=True):
            parameter.copy_(weight)


def _cosine(progress: float) -> float:
    """From zero to one along half a period."""
    return 0.5 * (1 - math.cos(math.pi * min(1.0, progress)))

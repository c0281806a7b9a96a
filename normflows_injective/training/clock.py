"""Budgets of a training, in steps or in processor seconds."""

from __future__ import annotations

import time
from typing import final


@final
class Clock:
    """The budget of a training, of which phases take shares of the rest.

    A budget in steps is one of work, too: a step of a phase takes its ``cost`` from it.

    Args:
        budget: Processor seconds, or steps times their mean cost.
        is_time: Whether the budget is in seconds.
    """

    def __init__(self, budget: float, is_time: bool) -> None:
        self.left, self.is_time = budget, is_time
        self.allotted = self._before = 0.0
        self._start = time.process_time()

    def begin(self, share: float, spent: float = 0.0) -> None:
        """Begin a phase with a share of the rest, a part of which may be spent already."""
        self.allotted, self._before = share * self.left, spent
        self._start = time.process_time()

    def spent(self, num_steps: int, cost: float) -> float:
        """The part of the budget that the phase has spent so far."""
        if self.is_time:
            return self._before + self.seconds()
        return num_steps * cost

    def seconds(self) -> float:
        """Processor seconds since the phase began or was taken up again."""
        return time.process_time() - self._start

    def progress(self, num_steps: int, cost: float) -> float:
        """The spent part of the phase's share, between 0 and 1."""
        return min(1.0, self.spent(num_steps, cost) / max(self.allotted, 1e-12))

    def end(self, num_steps: int, cost: float) -> None:
        """End a phase, and leave the rest of its share to those that follow."""
        self.left -= min(self.left, self.spent(num_steps, cost))

"""The state within a phase of a training: weights, their average, the best ones, and batches."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError
from .averages import AveragedWeights, write
from .rows import Rows
from .state import random_states

# How often a phase starts again from its best weights, each time at half the rate, before it ends
# for want of a better score, or by an error if its loss is not finite.
_MAX_STALLS = 3
_MAX_DIVERGENCES = 8
_COUNTS = ("step", "num_checks", "num_stalls", "num_divergences", "spent", "checked_at")
_SCORES = ("before", "best_score", "best_at", "rows_before", "num_rows", "num_rows_at_ends")
_SAVED = (*_COUNTS, *_SCORES, "initial", "best", "order")


@final
class Progress:
    """What changes from step to step, and is saved at every look."""

    def __init__(self, parameters: list[nn.Parameter], weight_decay: float) -> None:
        self.parameters, self.weight_decay = parameters, weight_decay
        self.initial = self.best = self.copies()
        self.before = self.best_score = self.best_at = 0.0
        self.step = self.num_checks = self.num_stalls = self.num_divergences = 0
        self.num_rows = self.num_rows_at_ends = 0
        self.spent = self.checked_at = 0.0
        self.order = torch.zeros(0, dtype=torch.long)
        self.rows_before = torch.zeros(0)
        self._start()

    @property
    def rate(self) -> float:
        """Part of the learning rate that is left after all returns to the best weights."""
        return 0.5 ** (self.num_stalls + self.num_divergences)

    def copies(self) -> list[Tensor]:
        """Copies of the present weights."""
        return [parameter.detach().clone() for parameter in self.parameters]

    def batch(self, rows: Rows, size: int, generator: torch.Generator) -> Rows:
        """The next rows in an order that is drawn anew when it is used up."""
        size = min(size, rows.count)
        if len(self.order) < size:
            self.order = torch.randperm(rows.count, generator=generator)
        index, self.order = self.order[:size], self.order[size:]
        return rows.take(index.to(rows.x.device))

    def is_over(self, patience: float) -> bool:
        """Whether no better score is to be expected, after returns to the best weights."""
        if self.checked_at - self.best_at <= patience or self.averages.count < 8:
            return False
        if self.num_stalls == _MAX_STALLS:
            return True
        self.num_stalls += 1
        self._return()
        return False

    def diverge(self) -> None:
        """Return to the best weights after a loss that is not finite."""
        self.num_divergences += 1
        if self.num_divergences > _MAX_DIVERGENCES:
            raise NonFiniteError(
                f"The training diverged {self.num_divergences} times, the last at half the rate "
                "of the time before. Look for values of absurd size in the data, or standardise "
                "them."
            )
        self._return()

    def state_dict(self) -> dict[str, Any]:
        """All of it, and the state of torch's random numbers."""
        return {
            **{name: getattr(self, name) for name in _SAVED},
            "optimizer": self.optimizer.state_dict(),
            "averages": self.averages.state_dict(),
            "random": random_states(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        for name in _SAVED:
            setattr(self, name, state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.averages.load_state_dict(state["averages"])

    def _return(self) -> None:
        write(self.parameters, self.best)
        self.best_at = self.checked_at
        self._start()

    def _start(self) -> None:
        # An update of all weights in one kernel takes a fifth of the time.
        fused = all(p.device.type in ("cpu", "cuda") for p in self.parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters, weight_decay=self.weight_decay, fused=fused
        )
        self.averages = AveragedWeights(self.parameters)

"""Records of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class Check(NamedTuple):
    """A look at a training.

    Attributes:
        phase: Name of the phase.
        step: Number of steps in the phase.
        seconds: Processor seconds in the phase.
        loss: Mean training loss since the last look.
        score: Held-out score of the averaged weights, which the phase minimises.
        reconstruction: Held-out reconstruction error; NaN where it was not measured.
        nll: Held-out negative log-density in nats; NaN where it was not measured.
    """

    phase: str
    step: int
    seconds: float
    loss: float
    score: float
    reconstruction: float
    nll: float


class PhaseResult(NamedTuple):
    """A phase in one line: its steps and seconds, scores before and after, and if it was kept."""

    name: str
    steps: int
    seconds: float
    before: float
    after: float
    is_kept: bool


@dataclass(frozen=True)
class TrainingResult:
    """Result of :func:`fit`; ``print`` it for a table of phases.

    Attributes:
        phases: One :class:`PhaseResult` for each phase.
        history: One :class:`Check` for every look at the held-out rows.
        floor: Held-out reconstruction error of the autoencoder, None for other models.
        beta: Weight of the reconstruction in the joint phase, None for other models.
    """

    phases: tuple[PhaseResult, ...]
    history: tuple[Check, ...]
    floor: float | None = None
    beta: float | None = None

    def __str__(self) -> str:
        lines = [f"{'phase':16}{'steps':>8}{'seconds':>9}{'before':>12}{'after':>12}"]
        for phase in self.phases:
            note = "" if phase.is_kept else "  undone"
            lines.append(
                f"{phase.name:16}{phase.steps:>8}{phase.seconds:>9.1f}{phase.before:>12.5g}"
                f"{phase.after:>12.5g}{note}"
            )
        if not all(phase.is_kept for phase in self.phases):
            lines.append("undone: no better on held-out rows, so the weights before were kept")
        if self.floor is not None and self.beta is not None and not math.isnan(self.beta):
            lines.append(f"reconstruction floor {self.floor:.4g}, beta {self.beta:.3g}")
        return "\n".join(lines)

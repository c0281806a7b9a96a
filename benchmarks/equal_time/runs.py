"""Runs of the comparison: one training and its scores, a line of a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.shared.records import Record, run_once

from .data import Split
from .job import Job, Networks
from .methods import KINDS, METHODS, available
from .scores import Limits, score

__all__ = ["FOLDER", "QUICK", "Run", "Setup", "chosen_methods", "perform", "run_all"]

FOLDER = Path("out") / "equal_time"
QUICK = Limits(120, 60, 40, timed_densities=20, timed_samples=200)


class Run(NamedTuple):
    """What one line of a file is about; ``rows`` is the number of rows, or "all"."""

    set: str
    rows: str
    seconds: float
    method: str
    seed: int

    @property
    def key(self) -> str:
        """The name of the line."""
        return f"{self.set} {self.rows} {self.seconds:g} {self.method} {self.seed}"

    def file(self, folder: Path) -> Path:
        """The file of the set."""
        return folder / f"{self.set.replace(':', '_')}.jsonl"


class Setup(NamedTuple):
    """How a set is read by a seed, the networks, and the limits of its scores."""

    read: Callable[[int], Split]
    networks: Networks
    limits: Limits


def perform(run: Run, setup: Setup) -> Record:
    """Train a method and score it; random numbers depend on the seed of the run alone."""
    split = setup.read(run.seed)
    job = Job(split, setup.networks, run.seconds, run.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        fitted = METHODS[run.method].fit(job)
        torch.manual_seed(run.seed)
        scores = score(fitted, split, job.latent_dim, setup.limits, run.seed)
    return {
        **run._asdict(),
        "dim": split.dim,
        "latent_dim": job.latent_dim,
        "train_rows": len(split.train),
        "train_seconds": sum(phase.seconds for phase in fitted.phases),
        "phases": [phase._asdict() for phase in fitted.phases],
        **scores,
    }


def run_all(runs: Sequence[Run], setups: dict[str, Setup], folder: Path) -> None:
    """Do the runs that the files of a folder lack, in order."""
    torch.set_num_threads(1)
    for run in runs:
        record = run_once(run.file(folder), run.key, partial(perform, run, setups[run.set]))
        sys.stderr.write(
            f"{run.key}: reconstruction {record['reconstruction']:.4f}, c2st-proj "
            f"{record['c2st_projected']:.3f}, NLL {record['nll']:.2f}\n"
        )


def chosen_methods(asked: Sequence[str] | None) -> list[str]:
    """The methods that were asked for, or all that can run; SystemExit for one that cannot."""
    missing = set(asked or ()) - set(available()) - set(KINDS)
    if missing:
        raise SystemExit(f"This version of the package has no {', '.join(sorted(missing))}.")
    return list(asked or available())

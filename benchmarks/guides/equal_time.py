"""Guides on standard posteriors, at equal steps and at equal processor time.

    python -m benchmarks.guides.equal_time [--quick] [--seeds 5] [--first-seed 0]
        [--posteriors funnel ...] [--guides NAME ...] [--runs FILE]
        [--page docs/results/posteriors.md]

Every run is a line of a file and is not repeated: a stopped comparison goes on. Flows of zuko are
rows where zuko is installed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import normflows_injective.pyro as nfp
from benchmarks.shared.records import Record, read, run_once

from .posterior_page import page
from .posteriors import POSTERIORS, Posterior, reference
from .quiet import quieten
from .rivals import FIRST, OURS, RATES, RIVALS, Factory

__all__ = ["BUDGETS", "Run", "main"]

BUDGETS = ("steps", "time", "one particle")
RUNS = Path("benchmarks/guides/runs/posteriors.jsonl")
_TIMED = 40


class Effort(NamedTuple):
    """Steps of a training, particles, and draws by which the result is judged."""

    steps: int
    particles: int
    judged: int


FULL, QUICK = Effort(1000, 16, 20_000), Effort(20, 4, 200)


class Run(NamedTuple):
    """One training."""

    posterior: str
    guide: str
    rate: float
    budget: str
    seed: int

    @property
    def key(self) -> str:
        """Its key in the file."""
        return "|".join(map(str, self))


class Training:
    """A guide, its loss, and the processor seconds that it has taken, its building included."""

    def __init__(self, posterior: Posterior, factory: Factory, particles: int, seed: int) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        self._start = time.process_time()
        self.guide: Any = factory(posterior.model)
        self.guide()
        estimator: Any = Trace_ELBO(
            num_particles=particles, vectorize_particles=True, max_plate_nesting=0
        )
        self.loss: nn.Module = estimator(posterior.model, self.guide)
        self.loss()
        self.steps = 0

    @property
    def seconds(self) -> float:
        """Processor seconds so far."""
        return time.process_time() - self._start

    def run(self, rate: float, progress: Callable[[], float]) -> None:
        """Adam, its rate brought to zero along a cosine, until the progress is one."""
        optimizer = torch.optim.Adam(self.loss.parameters(), lr=rate, fused=True)
        while (done := progress()) < 1:
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * rate * (1 + math.cos(math.pi * done))
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()
            self.steps += 1


def perform(run: Run, posterior: Posterior, moments: Tensor, effort: Effort) -> Record:
    """Train a guide and judge it; a run that fails has an infinite loss."""
    particles = 1 if run.budget == "one particle" else effort.particles
    factory = {**OURS, **RIVALS}[run.guide]
    seconds = _time_of_first(posterior, effort) if run.budget == "time" else None
    try:
        training = Training(posterior, factory, particles, run.seed)
        training.run(
            run.rate,
            lambda: (
                training.steps / effort.steps
                if seconds is None
                else min(1.0, training.seconds / seconds)
            ),
        )
        spent = training.seconds
        report = nfp.diagnose(training.guide, num_samples=effort.judged, parallel=True)
    except (ValueError, RuntimeError) as error:
        return {"elbo": -math.inf, "failure": str(error)[:200]}
    numbers = posterior.numbers(report.samples)
    mean, deviation = moments
    shift = (numbers.mean(0) - mean) / deviation
    ratio = numbers.std(0) / deviation - 1
    return {
        "elbo": report.elbo if math.isfinite(report.elbo) else -math.inf,
        "error": report.error,
        "pareto_k": report.pareto_k,
        "mean_error": float(shift.square().mean().sqrt()),
        "deviation_error": float(ratio.square().mean().sqrt()),
        "steps": training.steps,
        "seconds": spent,
    }


def _time_of_first(posterior: Posterior, effort: Effort) -> float:
    """Processor seconds of all steps of the first guide, under the machine's present load."""
    training = Training(posterior, OURS[FIRST], effort.particles, 0)
    built = training.seconds
    training.run(RATES[0], lambda: training.steps / min(_TIMED, effort.steps))
    return built + (training.seconds - built) * effort.steps / training.steps


def runs_of(
    posteriors: list[str], guides: list[str], budgets: list[str], seeds: range
) -> Iterator[Run]:
    """All runs, one round for each seed."""
    for seed in seeds:
        for posterior in posteriors:
            for guide in guides:
                for rate in RATES:
                    for budget in budgets:
                        if not (guide == FIRST and budget == "time"):
                            yield Run(posterior, guide, rate, budget, seed)


def moments_of(name: str, posterior: Posterior, path: Path, is_quick: bool) -> Tensor:
    """Mean and deviation of the posterior, from the file where they are known."""
    record = run_once(
        path, f"reference|{name}", lambda: {"moments": reference(posterior, is_quick).tolist()}
    )
    return torch.tensor(record["moments"], dtype=torch.float64)


def main() -> None:
    """Do the missing runs, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--posteriors", nargs="+", choices=POSTERIORS, default=list(POSTERIORS))
    names = [*OURS, *RIVALS]
    parser.add_argument("--guides", nargs="+", choices=names, default=names)
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--runs", type=Path, help="file of finished runs")
    parser.add_argument("--page", type=Path, help="page to write, with its figure")
    options = parser.parse_args()
    quieten()
    torch.set_num_threads(1)
    effort = QUICK if options.quick else FULL
    path = options.runs or (Path("out/posteriors_quick.jsonl") if options.quick else RUNS)
    seeds = range(options.first_seed, options.first_seed + (1 if options.quick else options.seeds))
    built = {name: POSTERIORS[name]() for name in options.posteriors}
    for run in runs_of(options.posteriors, options.guides, options.budgets, seeds):
        if run.key not in read(path):
            moments = moments_of(run.posterior, built[run.posterior], path, options.quick)
            record = run_once(
                path,
                run.key,
                lambda run=run, moments=moments: perform(
                    run, built[run.posterior], moments, effort
                ),
            )
            print(run.key, record, flush=True)
    page(read(path), options.page)


if __name__ == "__main__":
    main()

"""Guides and samplers of Pyro beside ours, on posteriors whose evidence is known.

    python -m benchmarks.guides.evidence [--quick] [--seeds 5] [--only NAME]
        [--page docs/results/guides.md]

Every run is a line of a file under out/ and is not repeated: a stopped benchmark goes on.
Learning rates are chosen first, by short runs of another seed.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyro

from benchmarks.shared.figures import beside
from benchmarks.shared.records import Record, read, run_once
from benchmarks.shared.tables import report

from .fits import GUIDES, fit
from .quiet import quieten
from .report import draw_figure, tables
from .samplers import CALIBRATED, MODES, SPHERE, calibrate, sample_sphere
from .targets import TARGETS, Target

RATES, RATE_SEED, RATE_SHARE = (3e-3, 1e-2, 3e-2), 100, 4


class Job(NamedTuple):
    """One run: its key in the file, and the call that gives its numbers."""

    key: str
    run: Callable[[], Record]


class Effort(NamedTuple):
    """A divisor of all steps, and numbers of draws."""

    divisor: int
    judged: int
    warmup: int
    draws: int
    thinning: int


FULL, QUICK = Effort(1, 20_000, 200, 600, 4), Effort(60, 200, 20, 30, 1)


def sampler_jobs(effort: Effort, only: str | None) -> Iterator[Job]:
    """Runs of NUTS on the sphere, and of calibration on the simplex."""
    for name in SPHERE if only in (None, "sphere") else ():
        for mode, direction in MODES.items():
            run = functools.partial(sample_sphere, name, direction, effort.warmup, effort.draws)
            yield Job(f"sphere|{name}|{mode}", run)
    for name in CALIBRATED if only in (None, "calibration") else ():
        run = functools.partial(calibrate, name, effort.warmup, effort.thinning)
        yield Job(f"calibration|{name}", run)


def fit_jobs(
    targets: dict[str, Target], effort: Effort, seeds: range, records: dict[str, Record]
) -> Iterator[Job]:
    """Trainings of all guides, one round for each seed, after those that choose the rates."""
    for key, target in targets.items():
        for guide, factory in GUIDES[key].items():
            steps = max(2, target.steps // effort.divisor // RATE_SHARE)
            for rate in RATES:
                run = functools.partial(
                    _fit, target, factory, rate, steps, RATE_SEED, effort.judged
                )
                yield Job(f"rate|{key}|{guide}|{rate}", run)
    for seed in seeds:
        for key, target in targets.items():
            for guide, factory in GUIDES[key].items():
                trials = {rate: records.get(f"rate|{key}|{guide}|{rate}") for rate in RATES}
                gaps = {rate: _gap(trial) for rate, trial in trials.items()}
                best = min(gaps, key=lambda rate, gaps=gaps: gaps[rate])
                steps = max(2, target.steps // effort.divisor)
                run = functools.partial(_fit, target, factory, best, steps, seed, effort.judged)
                yield Job(f"fit|{key}|{guide}|{seed}", run)


def _fit(target: Target, factory: Any, rate: float, steps: int, seed: int, draws: int) -> Record:
    try:
        result = fit(target, factory, rate, steps, seed, draws)
    except (ValueError, RuntimeError) as error:
        # A diverged run counts as such; anything else would show in the table.
        return {"gap": math.inf, "rate": rate, "steps": steps, "failure": str(error)[:200]}
    gap = target.log_evidence - result.elbo
    return {
        "gap": gap if math.isfinite(gap) else math.inf,
        "error": result.error,
        "rate": rate,
        "steps": steps,
        "per_step": result.seconds / steps,
    }


def _gap(record: Record | None) -> float:
    return math.inf if record is None else float(record["gap"])


def run(jobs: Iterator[Job], records: dict[str, Record], path: Path, match: str) -> None:
    """Do the jobs that are missing and match, and append them to the file."""
    for job in jobs:
        if job.key not in records and re.search(match, job.key):
            pyro.set_rng_seed(0)
            records[job.key] = run_once(path, job.key, job.run)
            print(job.key, records[job.key], flush=True)


def main() -> None:
    """Do the missing runs, print the tables, and write page and figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=[*TARGETS, "sphere", "calibration"])
    parser.add_argument("--match", default="", help="regular expression of the runs to do")
    parser.add_argument("--runs", type=Path, help="file of finished runs")
    parser.add_argument("--page", type=Path, help="page whose tables to write, and its figure")
    arguments = parser.parse_args()
    quieten()
    effort = QUICK if arguments.quick else FULL
    path = arguments.runs or Path("out") / f"guides{'_quick' if arguments.quick else ''}.jsonl"
    records = read(path)
    targets = {key: build() for key, build in TARGETS.items() if arguments.only in (None, key)}
    seeds = range(1 if arguments.quick else arguments.seeds)
    run(sampler_jobs(effort, arguments.only), records, path, arguments.match)
    run(fit_jobs(targets, effort, seeds, records), records, path, arguments.match)
    report(tables(records, targets), arguments.page)
    if arguments.page is not None:
        draw_figure(records, targets, beside(arguments.page))


if __name__ == "__main__":
    main()

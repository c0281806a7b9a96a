"""Guides and samplers of Pyro beside ours, on posteriors whose evidence is known.

    python benchmarks/guides.py [--quick] [--seeds 5] [--only NAME] [--page docs/results/guides.md]

Every run is appended to a file of JSON lines, and is not run again: a stopped benchmark goes on
where it was. Learning rates are chosen first, by short runs of another seed.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from guide_fits import GUIDES, fit
from guide_page import figure, page, tables
from guide_samplers import CALIBRATED, MODES, SPHERE, calibrate, sample_sphere
from guide_targets import TARGETS, Target

RATES, RATE_SEED, RATE_SHARE = (3e-3, 1e-2, 3e-2), 100, 4

Record = dict[str, Any]


class Job(NamedTuple):
    """One run: how it is known in the file, and what gives its numbers."""

    key: str
    run: Callable[[], Record]


class Effort(NamedTuple):
    """By what steps are divided, and numbers of draws."""

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
    known = gap if math.isfinite(gap) else math.inf
    per_step = result.seconds / steps
    return {
        "gap": known,
        "error": result.error,
        "rate": rate,
        "steps": steps,
        "per_step": per_step,
    }


def _gap(record: Record | None) -> float:
    return math.inf if record is None else float(record["gap"])


def load(path: Path) -> dict[str, Record]:
    """Records of a file by their keys; none if there is no file."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line.pop("key"): line for line in lines}


def run(jobs: Iterator[Job], records: dict[str, Record], path: Path, match: str) -> None:
    """Do what is not done and matches, and append it to the file."""
    for job in jobs:
        if job.key in records or not re.search(match, job.key):
            continue
        pyro.set_rng_seed(0)
        record = job.run()
        records[job.key] = record
        with path.open("a") as file:
            file.write(json.dumps({"key": job.key, **record}) + "\n")
        print(job.key, json.dumps(record), flush=True)


def main() -> None:
    """Run what is missing, print the tables, and write the page and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=[*TARGETS, "sphere", "calibration"])
    parser.add_argument("--match", default="", help="regular expression of the runs to do")
    parser.add_argument("--runs", type=Path, help="file of finished runs")
    parser.add_argument("--page", type=Path, help="page of results to write")
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/guides.png"))
    arguments = parser.parse_args()
    # Pyro tells of every latent without a site in the guide, jit of every constant.
    warnings.filterwarnings("ignore")
    logging.getLogger("pyro").setLevel(logging.ERROR)
    pyro.enable_validation(False)
    torch.distributions.Distribution.set_default_validate_args(False)
    effort = QUICK if arguments.quick else FULL
    path = arguments.runs or Path(
        "out/guides_quick.jsonl" if arguments.quick else "out/guides.jsonl"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    records = load(path)
    targets = {key: build() for key, build in TARGETS.items() if arguments.only in (None, key)}
    seeds = range(1 if arguments.quick else arguments.seeds)
    run(sampler_jobs(effort, arguments.only), records, path, arguments.match)
    run(fit_jobs(targets, effort, seeds, records), records, path, arguments.match)
    print(tables(records, targets))
    if arguments.page is not None:
        arguments.page.write_text(page(records, targets))
        figure(records, targets, arguments.figure)


if __name__ == "__main__":
    main()

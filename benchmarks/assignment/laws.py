"""Assignment flows beside linear flow matching, on laws of labels that are known in full.

    python -m benchmarks.assignment.laws [--seeds 3] [--steps 3000] [--quick] [--only NAME]
        [--no-runs] [--page docs/results/assignment.md]

Every run is a line of a file under out/ and is not repeated: a stopped benchmark goes on. Trained
weights lie beside it.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.shared.figures import beside
from benchmarks.shared.records import Record, read, run_once
from benchmarks.shared.tables import report

from .cost import costs
from .methods import DEFAULT, METHODS, draw, effective_parameters, late
from .report import GRIDS, draw_figure, tables
from .steps import misplaced
from .targets import Target, distances, grid, independent, ising

BATCH, RATE, SAMPLES, PER_STATE, FEWEST = 256, 2e-3, 40_000, 50, 20_000
DRAWS, LIKELIHOOD_STEPS = 16, 20
LIKELY, MORE = 8, 32
PREDECESSOR = "finite, velocity, weights"
ON_GRIDS = (DEFAULT, "as published", PREDECESSOR, "linear, velocity", "linear, classifier")
WITH_LIKELIHOOD = (DEFAULT, "leave-one-out", "as published")
FIRST = tuple(METHODS)[:6]
Run = Callable[[], Record]


def trained(name: str, target: Target, seed: int, steps: int, file: Path) -> nn.Module:
    """A model after training, from its file if there is one."""
    torch.manual_seed(seed)
    model = METHODS[name](target)
    if file.is_file():
        model.load_state_dict(load_file(file))
        return model
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = model.flow_matching_loss(target.draw(BATCH))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), file)
    return model


def judge(
    target: Target, num: int, fit: Callable[[], nn.Module], to_the_end: bool = False
) -> Record:
    """Distances of samples of a trained model."""
    model = fit()
    start = time.process_time()
    torch.manual_seed(1000)
    labels = draw(late(model) if to_the_end else model, num)
    return {
        **distances(target.histogram(labels), target),
        "samples": num,
        "parameters": effective_parameters(model),
        "sampling_seconds": time.process_time() - start,
    }


def judge_truth(target: Target, num: int, seed: int) -> Record:
    """Distances of as many true samples."""
    torch.manual_seed(2000 + seed)
    return {**distances(target.histogram(target.draw(num)), target), "samples": num}


def describe(target: Target) -> Record:
    """Size of a target, and how far the product of its marginals is from it."""
    return {
        **distances(independent(target), target),
        "states": len(target.probs),
        "entropy": target.entropy,
        "coupling": target.coupling,
    }


def likelihoods(target: Target, fit: Callable[[], nn.Module], draws: int) -> Record:
    """Estimated log-probabilities of all states, beside the true ones.

    A few states carry most of the probability, and with it of the error: these get more draws.
    """
    model, probs = fit(), target.probs
    torch.manual_seed(3000)
    start = time.process_time()
    of_all = model.log_prob(target.states, draws, steps=LIKELIHOOD_STEPS)
    likely = probs.topk(LIKELY).indices
    of_likely = model.log_prob(target.states[likely], MORE * draws, steps=LIKELIHOOD_STEPS)
    log_prob, error, share = (
        every.double().index_put((likely,), few.double())
        for every, few in zip(of_all, of_likely, strict=True)
    )
    return {
        "kl": float((probs * (probs.log() - log_prob)).sum()),
        "kl_error": float((probs * error).square().sum().sqrt()),
        "kl_bias": float((probs * error.square()).sum()) / 2,
        "effective": float(share.mean()),
        "effective_by_p": float((probs * share).sum()),
        "total": float(log_prob.exp().sum()),
        "total_error": float((log_prob.exp() * error).square().sum().sqrt()),
        "draws": draws,
        "seconds": time.process_time() - start,
    }


def jobs(seeds: int, steps: int, folder: Path, quick: bool) -> Iterator[tuple[str, Run]]:
    """All runs with their keys, the most telling first."""
    few = 200 if quick else None

    def fit(law: str, target: Target, name: str, seed: int) -> Callable[[], nn.Module]:
        file = folder / f"{law}_{name}_{seed}.safetensors".replace(", ", "_").replace(" ", "-")
        return functools.partial(trained, name, target, seed, steps, file)

    for seed in range(seeds):
        yield from _ising_jobs(FIRST, seed, few, fit)
    yield "cost", functools.partial(costs, quick)
    yield "steps", functools.partial(misplaced, few)
    for name in WITH_LIKELIHOOD:
        run, draws = fit("ising", ising(), name, 0), 2 if quick else DRAWS
        yield f"likelihood|{name}|0", functools.partial(likelihoods, ising(), run, draws)
    for seed in range(seeds):
        yield from _grid_jobs(seed, few, fit)
        yield from _ising_jobs([name for name in METHODS if name not in FIRST], seed, few, fit)


Fit = Callable[[str, Target, str, int], Callable[[], nn.Module]]


def _ising_jobs(
    names: Sequence[str], seed: int, few: int | None, fit: Fit
) -> Iterator[tuple[str, Run]]:
    target, num = ising(), few or SAMPLES
    yield "ising|independent", functools.partial(describe, target)
    yield f"ising|true|{seed}", functools.partial(judge_truth, target, num, seed)
    for name in names:
        run = fit("ising", target, name, seed)
        yield f"ising|{name}|{seed}", functools.partial(judge, target, num, run)
    if PREDECESSOR in names:
        key, run = f"ising|{PREDECESSOR}, to .99|{seed}", fit("ising", target, PREDECESSOR, seed)
        yield key, functools.partial(judge, target, num, run, True)


def _grid_jobs(seed: int, few: int | None, fit: Fit) -> Iterator[tuple[str, Run]]:
    for classes in GRIDS:
        law, target = f"grid {classes}", grid(classes)
        enough = 1000 * math.ceil(PER_STATE * math.exp(target.entropy) / 1000)
        num = few or max(FEWEST, enough)
        yield f"{law}|independent", functools.partial(describe, target)
        yield f"{law}|true|{seed}", functools.partial(judge_truth, target, num, seed)
        for name in ON_GRIDS:
            run = fit(law, target, name, seed)
            yield f"{law}|{name}|{seed}", functools.partial(judge, target, num, run)


def main() -> None:
    """Do the missing runs, print the tables, and write page and figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--quick", action="store_true", help="three steps of one seed, to try it")
    parser.add_argument("--only", help="a part of the keys of the runs to do")
    parser.add_argument("--no-runs", action="store_true", help="report what has been run")
    parser.add_argument("--page", type=Path, help="page whose tables to write, and its figure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.quick:
        arguments.seeds, arguments.steps = 1, 3
    name = f"assignment_{arguments.steps}"
    file = Path("out") / f"{name}.jsonl"
    records = read(file) if arguments.no_runs else {}
    for key, run in jobs(arguments.seeds, arguments.steps, Path("out") / name, arguments.quick):
        if (arguments.only or "") in key and not arguments.no_runs:
            records[key] = run_once(file, key, run)
            print(key, records[key], flush=True)
    report(tables(records), arguments.page)
    if arguments.page is not None:
        draw_figure(records, beside(arguments.page))


if __name__ == "__main__":
    main()

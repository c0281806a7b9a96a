"""Flow matching of codes: samples in few steps, exact densities, and few rows.

    python -m benchmarks.flows.matching higgs_small uci:protein --data DIR \
        [--seeds 2] [--page docs/results/matching.md] [--quick]

DIR holds the .npz files of the tables; the environment variable NFI_DATA may name it. Without
names all tables of the comparison at equal time are taken. Every run is a line of
``out/matching.jsonl`` and is not repeated. ``--quick`` takes a synthetic table and one second.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import normflows as nf
import torch
from torch import Tensor

import normflows_injective as nfi
from benchmarks.equal_time.data import TABLES, Split, read_table
from benchmarks.equal_time.distances import classifier_two_sample
from benchmarks.equal_time.job import Job, Networks
from benchmarks.equal_time.methods import fit_paired
from benchmarks.shared.data import add_data_option
from benchmarks.shared.records import Record, run_once
from benchmarks.shared.tables import publish, table, with_error, wrapped
from benchmarks.shared.timing import in_turn
from normflows_injective.flows.stack import joint_encode

FILE = Path("out") / "matching.jsonl"
SAMPLERS = (
    ("euler", 2),
    ("midpoint", 1),
    ("euler", 4),
    ("midpoint", 2),
    ("euler", 8),
    ("midpoint", 4),
    ("midpoint", 8),
    ("rk4", 4),
    ("rk4", 8),
    ("rk4", 30),
)
EVALUATIONS = {"euler": 1, "midpoint": 2, "rk4": 4}
COUPLINGS = "mixed"
STEPS = (2, 4, 8, 16, 32)
EXACT = 128
TOLERANCE = 0.01
FEW = (300, 1000)
RATE, BATCH = 1e-3, 256


class Limits(NamedTuple):
    """Sizes of a run.

    Attributes:
        seconds: Of a training.
        samples: Rows of the classifier.
        densities: Rows of the errors of densities.
        timed: Samples whose time is taken.
        rounds: Times that it is taken.
        updates: Steps of a training of few rows.
    """

    seconds: float = 25.0
    samples: int = 5000
    densities: int = 1000
    timed: int = 2000
    rounds: int = 15
    updates: int = 4000


QUICK = Limits(seconds=1.0, samples=200, densities=20, timed=200, rounds=2, updates=20)


def trained(split: Split, kind: str, seconds: float, seed: int) -> Any:
    """``nfi.training.fit`` of a model with one kind of latent density, from the start of all."""
    job = Job(split, Networks(split.dim, split.dim // 2), seconds, seed)
    return fit_paired(job, kind).model.eval()


def samples_and_densities(split: Split, seed: int, limits: Limits) -> Record:
    """Classifier, times and errors of densities of one table and seed."""
    kinds = ("matching", COUPLINGS)
    models = [trained(split, kind, limits.seconds, seed) for kind in kinds]
    return _measured(*models, split, seed, limits)


@torch.no_grad()
def _measured(matching: Any, couplings: Any, split: Split, seed: int, limits: Limits) -> Record:
    layer = matching.flows[0]
    test = split.test[: limits.samples]
    record: Record = {"c2st": {}, "seconds": {}}
    calls: dict[str, Callable[[], object]] = {}

    def draw(model: Any, count: int, solver: str | None = None, steps: int = 0) -> Tensor:
        if solver is not None:
            layer.solver, layer.steps = solver, steps
        return model.sample(count, log_prob=False)[0]

    sources: dict[str, Callable[[int], Tensor]] = {
        f"{solver} {steps}": partial(draw, matching, solver=solver, steps=steps)
        for solver, steps in SAMPLERS
    }
    sources[COUPLINGS] = partial(draw, couplings)
    for name, source in sources.items():
        projected = (couplings if name == COUPLINGS else matching).project(test)
        torch.manual_seed(seed)
        record["c2st"][name] = classifier_two_sample(source(len(test)), projected, seed)
        calls[name] = partial(source, limits.timed)
        calls[name]()
    times = in_turn(calls, limits.rounds, seed)
    record["seconds"] = {name: median(values) / limits.timed for name, values in times.items()}
    return record | densities(matching, layer, split.test[: limits.densities])


def densities(model: Any, layer: nfi.flows.FlowMatching, x: Tensor) -> Record:
    """Errors of the log-densities of codes in float64, and what the layer says of them."""
    _, *others = model.double().flows
    codes = joint_encode(others, x.double())
    layer.solver = "rk4"

    def log_prob(steps: int) -> Tensor:
        layer.steps = steps
        z, log_det = layer.inverse(codes)
        return log_det - 0.5 * z.square().sum(1)

    exact = log_prob(EXACT)
    errors = {}
    for steps in STEPS:
        off = (log_prob(steps) - exact).abs()
        errors[str(steps)] = [float(off.mean()), float(off.max())]
    layer.steps = STEPS[1]
    stated = float(layer.density_error(codes).max())
    return {"errors": errors, "stated": stated, "enough": layer.steps_for(codes, TOLERANCE)}


def few_rows(split: Split, rows: int, kind: str, seed: int, limits: Limits) -> Record:
    """Held-out NLL of principal components, trained on few rows without any choice of weights."""
    codes, test = _components(split, rows, seed, limits.densities)
    dim = codes.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = nfi.flows.latent_block(dim, kind)
        flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=False), block)
        optimizer = torch.optim.Adam(flow.parameters(), RATE)
        scores = []
        for update in range(1, limits.updates + 1):
            batch = codes[torch.randint(len(codes), (BATCH,))]
            if kind == "matching":
                loss = block[0].matching_loss(batch).mean()
            else:
                loss = flow.forward_kld(batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
            optimizer.step()
            if update % (limits.updates // 20) == 0:
                with torch.no_grad():
                    scores.append(float(flow.forward_kld(test)))
    return {"best": min(scores), "end": scores[-1]}


def _components(split: Split, rows: int, seed: int, num_test: int) -> tuple[Tensor, Tensor]:
    """Whitened principal components of few training rows and of test rows."""
    generator = torch.Generator().manual_seed(seed)
    x = split.train
    _, deviations, directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    count = split.dim // 2
    maps = directions[:count].T * math.sqrt(len(x)) / deviations[:count]
    chosen = x[torch.randperm(len(x), generator=generator)[:rows]]
    return (chosen - x.mean(0)) @ maps, (split.test[:num_test] - x.mean(0)) @ maps


def page(records: dict[str, dict[int, Record]], few: dict[str, dict[str, list[Record]]]) -> str:
    """The page, from records by table and seed, and those of few rows by table and row."""
    names = list(records)
    seeds = len(next(iter(records.values())))
    return f"""# Flow matching of codes

    python -m benchmarks.flows.matching --page docs/results/matching.md

{
        wrapped(
            "Models of nfi.training.fit with the latent densities 'matching' and 'mixed', from "
            "the same start and in the same processor time, d half of D, 25 s a training, on one "
            f"thread. Seeds: {seeds}; with several, means ± their standard errors. "
            f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}."
        )
    }

## Samples in few steps

{
        wrapped(
            "c2st-proj, the accuracy of gradient boosting between samples and projections of test "
            "rows, by solver and number of steps. *Time* is that of a sample over that of eight "
            "Heun steps, for which the eight steps of the midpoint rule stand: both evaluate the "
            "network sixteen times. Median of rounds in random order, mean over tables."
        )
    }

{_samples(records, names)}

## Densities

{
        wrapped(
            "Errors of log-densities of codes in nats, mean and worst row, by numbers of steps "
            f"of the fourth-order method, against {EXACT} steps in float64; the largest over "
            f"seeds. *Stated* is the worst error of {STEPS[1]} steps as density_error has it, "
            f"and *enough* the steps that steps_for takes for {TOLERANCE} nat in the worst row."
        )
    }

{_errors(records)}

## Few rows

{
        wrapped(
            "Held-out NLL, in nats, of whitened principal components of few rows in 4,000 steps "
            "of 256 rows with Adam at 1e-3, without choice of weights: the best of twenty looks, "
            "and the last. Their difference is what over-fitting costs a training that is not "
            "stopped."
        )
    }

{_few(few)}
"""


def _samples(records: dict[str, dict[int, Record]], names: list[str]) -> str:
    sources = [f"{solver} {steps}" for solver, steps in SAMPLERS] + [COUPLINGS]
    rows = []
    for source in sources:
        runs = [list(records[name].values()) for name in names]
        cells = [with_error([run["c2st"][source] for run in each], 3) for each in runs]
        ratios = [
            run["seconds"][source] / run["seconds"]["midpoint 8"] for each in runs for run in each
        ]
        solver, _, steps = source.partition(" ")
        count = str(EVALUATIONS[solver] * int(steps)) if steps else "–"
        title = source if steps else "couplings, one pass"
        rows.append([title, count, f"{mean(ratios):.2f}", *cells])
    return table(["sampler", "evaluations", "time", *names], rows)


def _errors(records: dict[str, dict[int, Record]]) -> str:
    rows = []
    for name, seeds in records.items():
        runs = seeds.values()
        worst = [
            [max(run["errors"][str(steps)][part] for run in runs) for part in (0, 1)]
            for steps in STEPS
        ]
        cells = [f"{mean_error:.2g} / {largest:.2g}" for mean_error, largest in worst]
        stated, enough = (max(run[key] for run in runs) for key in ("stated", "enough"))
        rows.append([name, *cells, f"{stated:.2g}", str(enough)])
    return table(["table", *(f"{steps} steps" for steps in STEPS), "stated", "enough"], rows)


def _few(few: dict[str, dict[str, list[Record]]]) -> str:
    kinds = ("matching", COUPLINGS)
    rows = []
    for name, cells in few.items():
        row = [name]
        for kind in kinds:
            runs = cells[kind]
            row += [with_error([run[key] for run in runs], 2) for key in ("best", "end")]
        rows.append(row)
    head = [f"{kind}, {key}" for kind in kinds for key in ("best", "end")]
    return table(["table, rows", *head], rows)


def main() -> None:
    """Do the missing runs and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=list(TABLES), help="tables, uci:NAME as well")
    add_data_option(parser)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--page", type=Path, help="write the page of results")
    parser.add_argument("--quick", action="store_true", help="see that everything runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    file, limits = FILE, Limits()
    if options.quick:
        options.names, options.seeds, limits = ["synthetic"], 1, QUICK
        file = FILE.with_name("matching_quick.jsonl")
    records: dict[str, dict[int, Record]] = {}
    few: dict[str, dict[str, list[Record]]] = {}
    for name in options.names:
        split = read_table(name, options.data)
        for seed in range(options.seeds):
            key = f"{name} {limits.seconds:g} {seed}"
            run = partial(samples_and_densities, split, seed, limits)
            records.setdefault(name, {})[seed] = run_once(file, key, run)
            sys.stderr.write(f"{key}\n")
            for rows in FEW:
                for kind in ("matching", COUPLINGS):
                    key = f"{name} few {rows} {kind} {seed}"
                    train = partial(few_rows, split, rows, kind, seed, limits)
                    cells = few.setdefault(f"{name}, {rows}", {}).setdefault(kind, [])
                    cells.append(run_once(file, key, train))
    publish(page(records, few), options.page)


if __name__ == "__main__":
    main()

"""Kernelised couplings against the same architecture with networks, on four real tables.

    python -m benchmarks.flows.kernel_couplings --data path/to/data \
        [--page docs/results/kernel_couplings.md]

The folder holds the .npz files of the tables; the environment variable NFI_DATA can name it. Every
run is one line of ``out/kernel_couplings.jsonl``, and a run that is there is not repeated.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.shared.data import add_data_option
from benchmarks.shared.figures import beside
from benchmarks.shared.records import Record, read, run_once
from benchmarks.shared.tables import report

from .kernel_data import TABLES, read_split
from .kernel_methods import METHODS, Plan, fit, gaussian, kernel_density, timings
from .kernel_report import SELECTION_SEED, draw_figure, tables

RATES = (1e-3, 3e-3, 1e-2)
REFERENCES = {"gaussian": gaussian, "density": kernel_density}


class Run(NamedTuple):
    """One training."""

    table: str
    few: bool
    method: str
    seed: int
    rate: float

    @property
    def key(self) -> str:
        """The line of the run in the file."""
        rows = "few" if self.few else "all"
        return f"{self.table} {rows} {self.method} {self.seed} {self.rate:g}"


class Bench(NamedTuple):
    """Folder of the data, file of the runs, and length of training by few or all rows."""

    data: str
    runs: Path
    plans: dict[bool, Plan]

    def train(self, run: Run) -> Record:
        """A run from the file, or trained now."""

        def now() -> Record:
            split = read_split(run.table, run.few, run.seed, self.data)
            fitted = fit(METHODS[run.method], split, run.rate, run.seed, self.plans[run.few])
            sizes = {"train_rows": len(split.train), "dim": split.train.shape[1]}
            sys.stderr.write(f"{run.key}: {fitted.validation:.3f}\n")
            return run._asdict() | fitted._asdict() | sizes

        return run_once(self.runs, run.key, now)

    def rate(self, table: str, method: str) -> float:
        """The learning rate of best validation likelihood on few rows, by a seed of its own."""
        runs = [Run(table, True, method, SELECTION_SEED, rate) for rate in RATES]
        return max(runs, key=lambda run: float(self.train(run)["validation"])).rate

    def reference(self, table: str, few: bool, name: str, seed: int) -> None:
        """Score an estimate that is not trained."""

        def now() -> Record:
            test = REFERENCES[name](read_split(table, few, seed, self.data))
            return {"table": table, "few": few, "method": name, "seed": seed, "test": test}

        run_once(self.runs, f"{table} {'few' if few else 'all'} {name} {seed}", now)

    def time_steps(self, table: str, repeats: int) -> None:
        """Time a step of every method, in turn, in one process."""

        def now() -> Record:
            dim = read_split(table, True, 0, self.data).train.shape[1]
            return {"timing": table, **timings(dim, self.plans[True].batch, repeats)}

        run_once(self.runs, f"{table} timings", now)


def measure(
    bench: Bench, sizes: list[bool], names: list[str], methods: list[str], seeds: int
) -> None:
    """All runs, those of few rows and of the first seeds first."""
    for table in names:
        bench.time_steps(table, 5 if bench.plans[True].steps < 100 else 40)
    for few in sizes:
        for seed in range(seeds):
            for table in names:
                # All rows are the same rows for every seed.
                if few or seed == 0:
                    for name in REFERENCES:
                        bench.reference(table, few, name, seed)
                for method in methods:
                    if few or not METHODS[method].few_only:
                        rate = bench.rate(table, method)
                        bench.train(Run(table, few, method, seed, rate))


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_data_option(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=TABLES, help="one table")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rows", nargs="*", choices=["few", "all"], default=["few", "all"])
    parser.add_argument("--quick", action="store_true", help="see that everything runs")
    parser.add_argument("--runs", type=Path, help="file of the runs")
    parser.add_argument("--page", type=Path, help="page whose tables to write, and its figure")
    options = parser.parse_args()
    if options.data is None:
        parser.error("where are the data? Give --data path/to/data, or set NFI_DATA.")
    torch.set_num_threads(1)
    plans = {True: Plan(1000, 200), False: Plan(1000, 200)}
    if options.quick:
        plans = dict.fromkeys(plans, Plan(25, 25))
    name = "kernel_couplings_quick" if options.quick else "kernel_couplings"
    runs = options.runs or Path("out") / f"{name}.jsonl"
    bench = Bench(options.data, runs, plans)
    names = [options.only] if options.only else list(TABLES)
    sizes = [rows == "few" for rows in options.rows]
    measure(bench, sizes, names, options.methods, 1 if options.quick else options.seeds)
    records = list(read(runs).values())
    report(tables(records), options.page)
    if options.page is not None:
        draw_figure(records, beside(options.page))


if __name__ == "__main__":
    main()

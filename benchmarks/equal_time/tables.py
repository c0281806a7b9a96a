"""Injective flows and what people would use instead, on tables, at equal processor time.

    python -m benchmarks.equal_time.tables higgs_small uci:protein --data DIR --seconds 25 \
        --seeds 5 --out out/equal_time [--rows 300] [--methods plan_f plan_n] [--quick]

DIR holds the .npz files; the environment variable NFI_DATA may name it. Without names all tables
are taken. Every run is a line of a file in the folder of ``--out`` and is not repeated: a stopped
comparison goes on, and later calls add seeds by ``--first-seed``. ``--quick`` takes a synthetic
table and a third of a second. ``python -m benchmarks.equal_time.report out/equal_time`` makes the
tables.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from benchmarks.shared.data import add_data_option

from .data import TABLES, Split, few_rows, read_table
from .job import Networks
from .methods import METHODS
from .runs import FOLDER, QUICK, Run, Setup, chosen_methods, run_all
from .scores import Limits


def main() -> None:
    """Do the missing runs that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=list(TABLES), help="tables, uci:NAME as well")
    add_data_option(parser)
    parser.add_argument("--seconds", type=float, default=25.0, help="of a processor, for a run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all")
    parser.add_argument("--latent-dim", type=int)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the runs")
    parser.add_argument("--rows", type=int, help="training and validation rows, default all")
    parser.add_argument("--quick", action="store_true", help="see that everything runs")
    options = parser.parse_args()
    limits = Limits()
    if options.quick:
        options.names, options.seconds, options.seeds = ["synthetic"], 0.3, 1
        limits = QUICK
    rows = "all" if options.rows is None else str(options.rows)
    setups = {}
    for name in options.names:
        split = read_table(name, options.data)
        latent_dim = options.latent_dim or split.dim // 2
        networks = Networks(split.dim, latent_dim)
        setups[name] = Setup(partial(_part, split, options.rows), networks, limits)
    runs = [
        Run(name, rows, options.seconds, method, seed)
        for seed in range(options.first_seed, options.first_seed + options.seeds)
        for name in options.names
        for method in chosen_methods(options.methods)
    ]
    run_all(runs, setups, options.out)


def _part(split: Split, rows: int | None, seed: int) -> Split:
    return split if rows is None else few_rows(split, rows, seed)


if __name__ == "__main__":
    main()

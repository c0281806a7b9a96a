"""Flows of angles and of columns on surfaces of their own, beside mixtures and independent models.

    python -m benchmarks.surfaces.products [--quick] [--data DIR] [--seeds 3]
        [--only torus ...] [--runs FILE] [--page docs/results/products.md]

* *torus*: correlated densities with two modes a step on T^2 and T^7, drawn exactly, and the
  divergence of the trained model from them.
* *rna*: torsion angles of RNA, rows at random, beside mixtures whose number of components is
  chosen by validation rows.
* *power*: time of day with power and voltage of a household, held out by whole hours.
* *rivers*: time of year, ions as a composition, and three concentrations.

The last two compare one flow of all columns with one flow for each column, trained for as long in
all. Every run is a line of a file and is not repeated.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.shared.data import add_data_option, read_arrays
from benchmarks.shared.records import Record, read, run_once
from benchmarks.shared.tables import report, table, with_error
from normflows_injective.flows import product_flow, torus_flow
from normflows_injective.training import fit

from .mixtures import KINDS, best_mixture

RUNS = Path("benchmarks/surfaces/runs/products.jsonl")
COUNTS = [20, 50, 120]
# Couplings of angles take a higher rate than the default of fit.
TORUS_RATE = 4e-3
IONS = ("Na", "K", "Mg", "Ca", "Cl", "NO3", "SO4", "HCO3")


class Effort(NamedTuple):
    """Processor seconds of a training, rows of synthetic densities, and components to try."""

    seconds: float
    rows: int
    counts: list[int]


FULL, QUICK = Effort(60.0, 50_000, COUNTS), Effort(1.0, 1000, [2, 4])


class Columns(NamedTuple):
    """Columns by name with their words, and those rows that are held out."""

    words: dict[str, str]
    values: dict[str, Tensor]
    held_out: Tensor

    def part(self, is_held_out: bool) -> dict[str, Tensor]:
        """The rows for training, or those that are held out."""
        rows = self.held_out if is_held_out else ~self.held_out
        return {name: column[rows] for name, column in self.values.items()}


def chain(num: int, dim: int) -> tuple[Tensor, Tensor]:
    """Angles (N, d) of a chain in which each follows the last or its opposite, and log-densities.

    The density is a product of conditional ones, known exactly.
    """
    modes = torch.distributions.Categorical(torch.tensor([0.6, 0.4]))

    def law(last: Tensor | None) -> torch.distributions.Distribution:
        if last is None:
            means, widths = torch.tensor([0.0, 2.5]), torch.tensor([2.0, 4.0])
        else:
            ahead = last + 0.5 * last.sin()
            means = torch.stack([ahead, ahead + math.pi], -1)
            widths = torch.tensor([6.0, 3.0]).expand_as(means)
        kernels = torch.distributions.VonMises(means, widths)
        shares = modes if last is None else modes.expand((len(means),))
        return torch.distributions.MixtureSameFamily(shares, kernels)

    angles = [law(None).sample((num,))]
    log_p = law(None).log_prob(angles[0])
    for _ in range(dim - 1):
        step = law(angles[-1])
        angles.append(step.sample())
        log_p = log_p + step.log_prob(angles[-1])
    return torch.stack(angles, 1), log_p


def on_torus(dim: int, seed: int, effort: Effort, folder: str | None) -> Record:
    """Divergence of a model from a known density on the torus, with its error."""
    torch.manual_seed(seed)
    x, _ = chain(effort.rows, dim)
    model = torus_flow(dim)
    seconds = effort.seconds * max(1.0, dim / 2)
    fit(model, x, seconds=seconds, learning_rate=TORUS_RATE, seed=seed)
    fresh, log_p = chain(20_000, dim)
    with torch.no_grad():
        gap = log_p - torch.cat([model.log_prob(part) for part in fresh.split(2000)])
    return {"kl": float(gap.mean()), "error": float(gap.std()) / math.sqrt(len(gap))}


def on_rna(seed: int, effort: Effort, folder: str | None) -> Record:
    """Negative log-likelihoods of held-out torsion angles, in radians."""
    (degrees,) = read_arrays(folder, "rna_torus.npz", "angles_deg")
    torch.manual_seed(seed)
    x = torch.deg2rad(torch.from_numpy(degrees))
    x = x[torch.randperm(len(x))]
    test, valid, train = x[: len(x) // 10], x[len(x) // 10 : len(x) // 5], x[len(x) // 5 :]
    record: Record = {}
    for kind in KINDS:
        mixture, count = best_mixture(kind, train, valid, effort.counts)
        record[kind] = -float(mixture.log_prob(test).mean())
        record[f"components of {kind}"] = count
    model = torus_flow(7)
    seconds = 5 * effort.seconds
    fit(model, train, seconds=seconds, validation=valid, learning_rate=TORUS_RATE, seed=seed)
    with torch.no_grad():
        log_p = torch.cat([model.log_prob(part) for part in test.split(500)])
    record["torus_flow"] = -float(log_p.mean())
    record["error"] = float(log_p.std()) / math.sqrt(len(log_p))
    return record


def power(folder: str | None) -> Columns:
    """Minute of the day, active power and voltage of a household; whole hours are held out."""
    x, day = read_arrays(folder, "power_26days.npz", "x", "day")
    generator = np.random.default_rng(0)
    hour = day.astype(np.int64) * 24 + (x[:, 7] // 60).astype(np.int64)
    hours = generator.permutation(np.unique(hour))
    held_out = np.isin(hour, hours[: len(hours) // 5])
    ties = [0.002, 0.01]  # widths of the last digit, over which ties are spread
    noise = generator.random((len(x), 3)).astype(np.float32)
    values = {
        "time": x[:, 7] + noise[:, 0],
        "power": x[:, 0] + ties[0] * noise[:, 1],
        "voltage": x[:, 2] + ties[1] * noise[:, 2],
    }
    words = {"time": "circle:1440", "power": "positive", "voltage": "real"}
    return _columns(words, values, held_out)


def rivers(folder: str | None) -> Columns:
    """Time of year, shares of ions, acidity, ammonium and organic carbon of river water."""
    x, names = read_arrays(folder, "compositions_aitchison.npz", "Hydrochem", "Hydrochem_names")
    column = dict(zip(names.tolist(), x.T, strict=True))
    generator = np.random.default_rng(0)
    ions = np.stack([column[name] for name in IONS], 1)
    # The last five digits of the code count days, after those of the site.
    days = column["Code"] % 100_000 + generator.random(len(x))
    values = {
        "season": days % 365.25,
        "ions": ions / ions.sum(1, keepdims=True),
        "acid": column["H"] * 1e9 * np.exp(0.2 * (generator.random(len(x)) - 0.5)),
        "ammonium": column["NH4"],
        "carbon": column["TOC"],
    }
    held_out = generator.permutation(len(x)) < len(x) // 5
    words = {
        "season": "circle:365.25",
        "ions": f"simplex:{len(IONS)}",
        "acid": "positive",
        "ammonium": "positive",
        "carbon": "positive",
    }
    return _columns(words, values, held_out)


def _columns(words: dict[str, str], values: dict[str, Any], held_out: Any) -> Columns:
    tensors = {name: torch.tensor(column, dtype=torch.float32) for name, column in values.items()}
    return Columns(words, tensors, torch.from_numpy(held_out))


def on_columns(
    load: Callable[[str | None], Columns], seed: int, effort: Effort, folder: str | None
) -> Record:
    """Held-out scores of one flow of all columns, and of one for each."""
    columns = load(folder)
    train, test = columns.part(False), columns.part(True)

    def score(words: dict[str, str], seconds: float) -> Tensor:
        torch.manual_seed(seed)
        flow = product_flow(words, train)
        fit(flow.model, flow.rows(train), seconds=seconds, seed=seed)
        with torch.no_grad():
            rows = flow.rows(test)
            return torch.cat([flow.log_prob(part) for part in rows.split(1000)])

    joint = score(columns.words, 2 * effort.seconds)
    each = [
        score({name: word}, 2 * effort.seconds / len(columns.words))
        for name, word in columns.words.items()
    ]
    independent = torch.stack(each).sum(0)
    gain = joint - independent
    return {
        "joint": -float(joint.mean()),
        "independent": -float(independent.mean()),
        "gain": float(gain.mean()),
        "error": float(gain.std()) / math.sqrt(len(gain)),
    }


TASKS: dict[str, dict[str, Callable[..., Record]]] = {
    "torus": {
        f"T^{dim}": lambda seed, effort, folder, dim=dim: on_torus(dim, seed, effort, folder)
        for dim in (2, 7)
    },
    "rna": {"rna": on_rna},
    "power": {"power": lambda *rest: on_columns(power, *rest)},
    "rivers": {"rivers": lambda *rest: on_columns(rivers, *rest)},
}


def tables(runs: dict[str, Record]) -> dict[str, str]:
    """The tables of the page."""

    def of(name: str) -> list[Record]:
        return [record for key, record in runs.items() if key.split("|")[0] == name]

    torus = [
        (name, str(len(of(name))), with_error([run["kl"] for run in of(name)], 4))
        for name in TASKS["torus"]
        if of(name)
    ]
    rna = [
        (name, with_error([run[name] for run in of("rna")], 3))
        for name in ("torus_flow", *KINDS)
        if of("rna")
    ]
    joint = [
        (
            name,
            *(with_error([run[key] for run in of(name)], 3) for key in ("joint", "independent")),
        )
        + (with_error([run["gain"] for run in of(name)], 3), f"{of(name)[0]['error']:.3f}")
        for name in ("power", "rivers")
        if of(name)
    ]
    heads = {
        "Known densities on tori": (("density", "seeds", "KL, nats"), torus),
        "Torsion angles of RNA": (("model", "test NLL, nats"), rna),
        "One flow of all columns, and one for each": (
            ("data", "joint NLL", "independent NLL", "gain", "error of the gain, one seed"),
            joint,
        ),
    }
    return {title: table(head, rows) for title, (head, rows) in heads.items() if rows}


def main() -> None:
    """Do the missing runs, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a second of everything")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--runs", type=Path, help="file of finished runs")
    parser.add_argument("--page", type=Path, help="page whose tables are to be replaced")
    add_data_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    effort = QUICK if options.quick else FULL
    path = options.runs or (Path("out/products_quick.jsonl") if options.quick else RUNS)
    for seed in range(1 if options.quick else options.seeds):
        for kind in options.only:
            for name, task in TASKS[kind].items():
                record = run_once(
                    path,
                    f"{name}|{seed}",
                    lambda task=task, seed=seed: task(seed, effort, options.data),
                )
                print(record, flush=True)
    report(tables(read(path)), options.page)


if __name__ == "__main__":
    main()

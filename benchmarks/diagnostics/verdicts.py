"""What the injectivity report says of models whose truth is known.

    python -m benchmarks.diagnostics.verdicts [--quick] [--page docs/results/verdicts.md]

Small models of synthetic manifolds, with the right and with wrong latent dimensions, with small
betas and with few steps. Every run is a line of ``out/verdicts.jsonl`` and is not repeated; the
verdicts are found again from its numbers, so that thresholds can be changed without training.
``--quick`` does a few short runs, into another file, to see that everything runs.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import normflows as nf
import torch
from torch import Tensor

import normflows_injective as nfi
from benchmarks.diagnostics.manifolds import FITTED, HELD_OUT, draw
from benchmarks.shared.records import Record, read, run_once
from benchmarks.shared.tables import publish, table, wrapped
from normflows_injective.diagnostics.verdict import (
    MUCH,
    OVERSHOOT,
    WORSE_SHARE,
    Evidence,
    judge,
)

TRAIN, TEST, BATCH, WIDTH, RATE = 4500, 500, 128, 64, 4e-3
BETA, STEPS = 10.0, 1000
SIZES = {"fitted": ((10, 3), (20, 6), (20, 12)), "held out": ((12, 4), (30, 8))}
NOISES = {"fitted": (0.02, 0.1), "held out": (0.05,)}
KINDS = {"fitted": tuple(FITTED), "held out": (*HELD_OUT,)}
# Latent dimensions on a table of rank 18 in 20 columns.
TABLE = (4, 12, 18, 19)


class Run(NamedTuple):
    """One training; ``wrong`` says in which way it differs from a good one."""

    group: str
    wrong: str
    kind: str
    data_dim: int
    true_dim: int
    noise: float
    latent_dim: int
    beta: float
    steps: int
    seed: int

    @property
    def key(self) -> str:
        """The name of its line."""
        return "-".join(str(value) for value in self[2:])


def variants(true_dim: int, data_dim: int) -> Iterator[tuple[str, int, float, int]]:
    """Ways of training a model: their name, latent dimension, beta and number of steps."""
    yield "right", true_dim, BETA, STEPS
    for dim in sorted({true_dim + 1, min(true_dim + 4, data_dim - 1), data_dim - 1}):
        name = {true_dim + 1: "d + 1", data_dim - 1: "D - 1"}.get(dim, "d + 4")
        yield name, dim, BETA, STEPS
    for dim in sorted({true_dim - 1, true_dim // 2}, reverse=True):
        yield "d - 1" if dim == true_dim - 1 else "d / 2", dim, BETA, STEPS
    for beta in (2.0, 0.5, 0.1):
        yield f"beta {beta:g}", true_dim, beta, STEPS
    for steps in (150, 50, 0):
        yield f"{steps} steps", true_dim, BETA, steps


def runs(seeds: int) -> Iterator[Run]:
    """All trainings."""
    for seed in range(seeds):
        for group, kinds in KINDS.items():
            for kind in kinds:
                for data_dim, true_dim in SIZES[group]:
                    for noise in NOISES[group]:
                        for name, *options in variants(true_dim, data_dim):
                            yield Run(group, name, kind, data_dim, true_dim, noise, *options, seed)
        for dim in TABLE:
            yield Run("table", f"d = {dim}", "flat", 20, 18, 0.0, dim, BETA, STEPS, seed)


def trained(x: Tensor, run: Run) -> nfi.InjectiveNormalizingFlow:
    """A model after its steps, in evaluation mode."""
    pair = nfi.nets.mlp_autoencoder(run.data_dim, run.latent_dim, (WIDTH, WIDTH))
    model = nfi.InjectiveNormalizingFlow(
        nf.distributions.DiagGaussian(run.latent_dim),
        [nfi.flows.FreeFormInjection(*pair)],
        nfi.SurrogateLikelihood(beta=run.beta),
    )
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=run.steps + 2)
    for _ in range(run.steps):
        loss = model.forward_kld(x[torch.randint(len(x), (BATCH,))])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def measure(run: Run) -> Record:
    """Train, and keep the numbers of the report on test rows."""
    generator = torch.Generator().manual_seed(run.seed)
    x = draw(run.kind, TRAIN + TEST, run.data_dim, run.true_dim, run.noise, generator)
    with torch.random.fork_rng(), warnings.catch_warnings():
        # The watch of the training says the same of small betas.
        warnings.simplefilter("ignore", nfi.errors.CollapseWarning)
        torch.manual_seed(run.seed)
        model = trained(x[:TRAIN], run)
    report = nfi.diagnostics.injectivity_report(model, x[TRAIN:])
    return {**run._asdict(), "evidence": report.evidence._asdict()}


def evidence_of(record: Record) -> Evidence:
    """The numbers of a line."""
    numbers = record["evidence"]
    return Evidence(**{**numbers, "variances": tuple(numbers["variances"])})


def _span(values: Sequence[float]) -> str:
    low, high = (f"{_plain(value):.3g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _plain(value: float) -> float:
    """Two digits, and nothing below a ten-thousandth."""
    return float(f"{value:.2g}") if abs(value) >= 1e-4 else 0.0


def _beyond_components(evidence: Evidence) -> float:
    return 100 * (evidence.share - evidence.linear_share(evidence.latent_dim))


def margins(records: list[Record]) -> str:
    """Every threshold between the numbers of right and of wrong trainings."""
    rows = []
    for name, threshold, number, wrong in (
        ("directions lost", "1", lambda e: e.lost, "D - 1"),
        ("overshoot", f"{OVERSHOOT:g}", lambda e: e.overshoot, "beta 0.1"),
        ("% missing of a pair without loss", f"{100 * MUCH:g}", lambda e: 100 * e.share, "d / 2"),
        ("the same", f"{100 * MUCH:g}", lambda e: 100 * e.share, "d - 1"),
        ("% beyond components", f"{100 * WORSE_SHARE:g}", _beyond_components, "50 steps"),
        ("the same", f"{100 * WORSE_SHARE:g}", _beyond_components, "0 steps"),
    ):
        chosen = {
            way: [number(evidence_of(r)) for r in records if r["wrong"] == way]
            for way in ("right", wrong)
        }
        if all(chosen.values()):
            rows.append((name, wrong, threshold, *map(_span, chosen.values())))
    return table(("number", "wrong training", "threshold", "when right", "when wrong"), rows, 2)


def numbers(records: list[Record]) -> str:
    """A row for every way of training: ranges of the numbers, and counts of the findings."""
    rows = []
    for name in dict.fromkeys(record["wrong"] for record in records):
        chosen = [evidence_of(record) for record in records if record["wrong"] == name]
        found = Counter(" + ".join(f.name for f in judge(one)) for one in chosen)
        verdicts = ", ".join(f"{text} {count}" for text, count in found.most_common())
        rows.append(
            (
                name,
                verdicts,
                _span([one.lost for one in chosen]),
                _span([one.overshoot for one in chosen]),
                _span([one.left_inverse_error for one in chosen]),
                _span([100 * one.share for one in chosen]),
                _span([100 * one.linear_share(one.latent_dim) for one in chosen]),
                _span([one.condition for one in chosen]),
                _span([one.cosine for one in chosen]),
            )
        )
    head = ("training", "verdicts, and how often", "lost", "overshoot", "left inverse")
    return table((*head, "% missing", "% by components", "condition", "cosine"), rows, 2)


def page(records: list[Record]) -> str:
    """The whole page."""
    by_group = {
        group: [record for record in records if record["group"] == group]
        for group in dict.fromkeys(record["group"] for record in records)
    }
    titles = {
        "fitted": "Manifolds by which the thresholds were chosen",
        "held out": "Other kinds of manifolds, sizes and noise",
        "table": "A table of linear rank 18 in 20 columns",
    }
    parts = [
        "# Verdicts of the injectivity report",
        wrapped(
            f"Models with encoder and decoder of {WIDTH}-{WIDTH}, trained on {TRAIN} standardised "
            f"rows in batches of {BATCH} by Adam (one cycle to {RATE:g}), and their reports on "
            f"{TEST} others; beta {BETA:g} and {STEPS} steps where nothing else is said. *right* "
            "has as many latent dimensions as the manifold. *lost* counts the directions of which "
            "the round trip returns less than half, *overshoot* is its largest singular value, "
            "both medians over the rows; *missing* is the share of the variance that the model "
            "does not reconstruct, beside the share that as many principal components leave. "
            "Ranges go from the least to the largest run."
        ),
    ]
    for group, chosen in by_group.items():
        parts += [f"## {titles[group]}", _conditions(group, chosen), numbers(chosen)]
    fitted = by_group["fitted"]
    parts += ["## Thresholds, on the first manifolds", margins(fitted)]
    parts += ["## How to read them", READING]
    return "\n\n".join(parts) + "\n"


def _conditions(group: str, records: list[Record]) -> str:
    if group == "table":
        return wrapped("Without noise, so that 18 components leave nothing.")
    sizes = sorted({(record["data_dim"], record["true_dim"]) for record in records})
    return wrapped(
        f"Kinds: {', '.join(dict.fromkeys(r['kind'] for r in records))}. Dimensions "
        f"{', '.join(f'{d} in {wide}' for wide, d in sizes)}; noise of "
        f"{', '.join(str(n) for n in sorted({r['noise'] for r in records}))} standard deviations "
        "of the columns."
    )


READING = "\n".join(
    wrapped(f"* {text}").replace("\n", "\n  ")
    for text in (
        "A truth in the settings need not be one in the model. A *flat* manifold of 12 dimensions "
        "in 20 standardised columns has directions with half a percent of the variance, and a "
        "model that loses one has one dimension too many for its training. An extra coordinate on "
        "a curved manifold is used, and lowers the error: nothing is wrong with it.",
        "Where the ranges of right and wrong overlap the settings do: the flat manifold of 12 "
        "dimensions, a small beta on a flat manifold, and one dimension too few where the last "
        "one has half a percent of the variance.",
        "One dimension too few or too many often passes as fine, above all where networks of this "
        "size leave several percent of a curved manifold anyway.",
        "A beta of 0.1 harms a flat manifold little and ruins a curved one. The verdict follows "
        "the harm.",
        "Some hundred steps leave a consistent pair with a large error, better than components on "
        "a curved manifold. That looks like too few dimensions, and only more steps tell.",
        "Overshoot where hardly any variance is missing is a direction of noise along which the "
        "pair is no inverse: too many dimensions. Where variance is missing the likelihood "
        "outweighs the reconstruction.",
    )
)


def main() -> None:
    """Do the missing runs, print the page, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--page", type=Path, help="page to write")
    arguments = parser.parse_args()
    chosen = list(runs(1 if arguments.quick else arguments.seeds))
    if arguments.quick:
        chosen = [run._replace(steps=min(run.steps, 5)) for run in chosen[::40]]
    path = Path("out") / f"verdicts{'_quick' if arguments.quick else ''}.jsonl"
    for run in chosen:
        record = run_once(path, run.key, lambda run=run: measure(run))
        print(run.key, *(f.name for f in judge(evidence_of(record))), sep=", ", flush=True)
    records = read(path)
    publish(page([records[run.key] for run in chosen]), arguments.page)


if __name__ == "__main__":
    main()

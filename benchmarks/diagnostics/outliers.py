"""Which score of a row finds which outliers.

    python -m benchmarks.diagnostics.outliers [--data DIR] [--seeds 3] [--steps 2500] [--quick]
        [--page docs/results/outliers.md]

Models are trained by ``nfi.training.fit`` on rows of two known manifolds and, where ``--data``
names a folder with them, of two real tables. Six kinds of anomalies are then told from fresh rows
by the scores of ``nfi.score``, and by the Mahalanobis distance of the training rows, which needs
no model. Every run is a line of ``out/outliers.jsonl`` and is not repeated. ``--quick`` trains 60
steps on few rows, into another file, to see that everything runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import normflows as nf
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

import normflows_injective as nfi
from benchmarks.diagnostics.anomalies import (
    KINDS,
    MANIFOLDS,
    TABLES,
    Rows,
    manifold_rows,
    table_rows,
)
from benchmarks.shared.data import add_data_option
from benchmarks.shared.records import Record, read, run_once
from benchmarks.shared.tables import report, table, with_error
from benchmarks.shared.timing import processor_seconds

ROWS, HIDDEN = 1000, (128, 128)
SCORES = {
    "reconstruction": "reconstruction error",
    "log_prob": "minus log-density",
    "tube": "minus tube score",
    "mahalanobis": "Mahalanobis distance",
}
LEVEL = 0.05


def new_model(rows: Rows) -> nfi.InjectiveNormalizingFlow:
    """A free-form injective flow in the units of the data, four couplings on its latents."""
    dim = rows.latent_dim
    flows: list[nf.flows.Flow] = []
    for index in range(4):
        coupling = nfi.flows.coupling.NetworkCoupling(dim, hidden=(64,), reverse=index % 2 == 1)
        flows += [coupling, nfi.flows.coupling.LULinear(dim)]
    pair = nfi.nets.mlp_autoencoder(rows.train.shape[1], dim, HIDDEN)
    units = nfi.flows.Standardise.fit(rows.train)
    base = nf.distributions.DiagGaussian(dim, trainable=False)
    return nfi.InjectiveNormalizingFlow(base, [*flows, nfi.flows.FreeFormInjection(*pair), units])


def strangeness(
    model: nfi.InjectiveNormalizingFlow, rows: Rows, x: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Numbers (B,) that should be large for anomalies, by their names, and p-values (B,)."""
    scores = nfi.score(model, x, rows.reference)
    train, few = rows.train.double(), x.double()
    few = (few - train.mean(0)) / train.std(0)
    # Columns that hang together have no inverse covariance, but a pseudo-inverse.
    precision = torch.linalg.pinv(torch.corrcoef(train.T), rtol=1e-6, hermitian=True)
    numbers = {
        "reconstruction": scores.reconstruction_error,
        "log_prob": -scores.log_prob,
        "tube": -scores.tube_score,
        "mahalanobis": ((few @ precision) * few).sum(1),
    }
    return numbers, scores.p_value


def measure(rows: Rows, steps: int, seed: int) -> Record:
    """Train one model, and the areas under the curves of every score for every anomaly."""
    torch.manual_seed(seed)
    model = new_model(rows)
    seconds = processor_seconds(
        lambda: nfi.training.fit(model, rows.train, steps=steps, seed=seed, progress=False)
    )
    usual, p_values = strangeness(model, rows, rows.test)
    areas: dict[str, dict[str, float]] = {}
    found: dict[str, float] = {}
    for kind, x in rows.anomalies.items():
        unusual, of_anomalies = strangeness(model, rows, x)
        labels = [0] * len(rows.test) + [1] * len(x)
        areas[kind] = {
            name: float(roc_auc_score(labels, torch.cat([usual[name], unusual[name]]).numpy()))
            for name in SCORES
        }
        found[kind] = float((of_anomalies <= LEVEL).double().mean())
    alarms = float((p_values <= LEVEL).double().mean())
    return {"areas": areas, "found": found, "alarms": alarms, "seconds": seconds}


def areas(records: Sequence[Record]) -> str:
    """Table of areas under the ROC curve."""
    rows = []
    for name in [*MANIFOLDS, *TABLES]:
        runs = _of_set(records, name)
        for kind, title in KINDS.items():
            having = [run["areas"][kind] for run in runs if kind in run["areas"]]
            if having:
                cells = (with_error([area[score] for area in having], 3) for score in SCORES)
                rows.append((f"{name} [{len(having)}]", title, *cells))
    return table(("rows [seeds]", "anomaly", *SCORES.values()), rows, 2)


def alarms(records: Sequence[Record]) -> str:
    """Table of shares of rows whose p-value is at most .05."""
    rows = []
    for name in [*MANIFOLDS, *TABLES]:
        runs = _of_set(records, name)
        if runs:
            shares = (
                with_error([run["found"][kind] for run in runs], 3)
                if kind in runs[0]["found"]
                else "-"
                for kind in KINDS
            )
            seconds = f"{sum(run['seconds'] for run in runs) / len(runs):.0f}"
            rows.append((name, with_error([r["alarms"] for r in runs], 3), *shares, seconds))
    return table(("rows", "fresh rows", *KINDS.values(), "seconds of training"), rows)


def _of_set(records: Sequence[Record], name: str) -> list[Record]:
    return [record for record in records if record["key"].rpartition("-")[0] == name]


def main() -> None:
    """Do the missing runs, print the tables, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_data_option(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--page", type=Path, help="page whose tables to write")
    arguments = parser.parse_args()
    count, steps = (60, 60) if arguments.quick else (ROWS, arguments.steps)
    path = Path("out") / f"outliers{'_quick' if arguments.quick else ''}.jsonl"
    readers = {name: partial(manifold_rows, name) for name in MANIFOLDS}
    if arguments.data is not None:
        readers |= {name: partial(table_rows, name, folder=arguments.data) for name in TABLES}
    for seed in range(arguments.seeds):
        for name, rows_of in readers.items():
            key = f"{name}-{seed}"
            run_once(path, key, lambda r=rows_of, s=seed: measure(r(count, s), steps, s))
            print(key, flush=True)
    records = list(read(path).values())
    report({"Areas": areas(records), "Alarms": alarms(records)}, arguments.page)


if __name__ == "__main__":
    main()

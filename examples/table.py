"""An injective flow on a table of your own.

    python examples/table.py FILE.csv [--latent-dim 3] [--seconds 30] [--out out]

The file has one row per sample, with names of columns in its first line or without. Columns that
hold no numbers are left out, and rows with gaps, and both are said. The script prints what the
columns are like, how the training went and how good the model is, and writes samples, the scores
of all rows and a figure.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import normflows_injective as nfi


class Table(NamedTuple):
    """Names of the columns of numbers, their complete rows (N, D), and what was left out."""

    names: list[str]
    rows: Tensor
    remarks: list[str]


def main() -> None:
    """Read a table, train on it, and write what came out."""
    options = _options()
    torch.manual_seed(options.seed)
    table = read_table(options.file)
    for remark in table.remarks:
        print(remark)
    report = nfi.diagnostics.column_report(table.rows, table.names)
    print(report, end="\n\n")
    x = table.rows.to(torch.get_default_dtype())
    order = torch.randperm(len(x))
    test, train = x[order[: len(x) // 5]], x[order[len(x) // 5 :]]
    latent_dim = options.latent_dim
    if latent_dim is None:
        suggestion = nfi.diagnostics.suggest_latent_dim(train)
        print(suggestion, end="\n\n")
        latent_dim = min(suggestion.recommended[1], x.shape[1] - 1)
    model = nfi.injective_flow(train, latent_dim)
    print(nfi.training.fit(model, train, seconds=options.seconds), end="\n\n")
    model.eval()
    print(nfi.diagnostics.injectivity_report(model, test[:500]), end="\n\n")
    write_results(model, table, options.out)


def read_table(path: Path) -> Table:
    """Read a file of comma-separated values."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = [line for line in csv.reader(file) if line]
    if not lines:
        raise SystemExit(f"{path} is empty.")
    has_names = not any(_is_number(cell) for cell in lines[0])
    names = lines[0] if has_names else [f"column {i}" for i in range(len(lines[0]))]
    lines = lines[has_names:]
    remarks = []
    numeric = [
        i
        for i in range(len(names))
        if any(_is_number(line[i]) for line in lines if i < len(line))
        and all(_is_number(line[i]) or not line[i].strip() for line in lines if i < len(line))
    ]
    if len(numeric) < len(names):
        left_out = [name for i, name in enumerate(names) if i not in numeric]
        remarks.append(f"Left out, because they hold no numbers: {', '.join(left_out)}.")
    complete = [
        [float(line[i]) for i in numeric]
        for line in lines
        if all(i < len(line) and line[i].strip() for i in numeric)
    ]
    if len(complete) < len(lines):
        remarks.append(f"Left out, because they have gaps: {len(lines) - len(complete)} rows.")
    if len(numeric) < 2 or len(complete) < 20:
        raise SystemExit(
            f"{path} has {len(numeric)} columns of numbers and {len(complete)} complete rows. An "
            "injective flow needs two columns and twenty rows at least."
        )
    rows = torch.tensor(complete, dtype=torch.float64)
    return Table([names[i] for i in numeric], rows, remarks)


@torch.no_grad()
def write_results(model: nfi.InjectiveNormalizingFlow, table: Table, folder: Path) -> None:
    """Write samples, and log-density and error of every row."""
    folder.mkdir(parents=True, exist_ok=True)
    x = table.rows.to(torch.get_default_dtype())
    samples, log_q = model.sample(1000)
    assert log_q is not None
    error = model.reconstruction_error(x, standardised=True)
    log_prob = torch.cat([model.log_prob(rows) for rows in x.split(1024)])
    _write(folder / "samples.csv", [*table.names, "log density"], samples, log_q)
    names = ["log density of the projection", "squared distance, standardised"]
    _write(folder / "scores.csv", names, log_prob.unsqueeze(1), error)
    print(f"Written to {folder}: samples.csv, scores.csv.")


def _write(path: Path, names: list[str], rows: Tensor, last: Tensor) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(torch.cat([rows, last.unsqueeze(1)], dim=1).tolist())


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="file of comma-separated values")
    parser.add_argument("--latent-dim", type=int, help="default: as suggested")
    parser.add_argument("--seconds", type=float, default=30.0, help="processor time, default 30")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder, default out")
    return parser.parse_args()


if __name__ == "__main__":
    main()

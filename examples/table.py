"""An injective flow on a table of your own.

    python examples/table.py [FILE.csv] [--latent-dim 3] [--seconds 30] [--out out]

The file has one row per sample, with names of columns in its first line or without; values are
separated by commas, semicolons or tabs. Columns that hold no numbers are left out, and rows with
gaps, and both are said. Without a file the script takes the 30 measurements of cell nuclei of 569
patients that scikit-learn ships. It prints what the columns are like, how the training went, how
good the model is and which held-out rows are unusual, and writes samples, the scores of all rows
and two figures.
"""

from __future__ import annotations

import argparse
import csv
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from support.csv_tables import Table, read_table
from torch import Tensor

import normflows_injective as nfi

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main() -> None:
    """Read a table, train on it, and write what came out."""
    options = _options()
    try:
        run(options)
    except nfi.errors.InjectiveFlowError as error:
        raise SystemExit(str(error)) from error


def run(options: argparse.Namespace) -> None:
    """The same, with the errors of the package."""
    torch.manual_seed(options.seed)
    table = read_nuclei() if options.file is None else read_table(options.file)
    for remark in table.remarks:
        print(remark)
    print(nfi.diagnostics.column_report(table.rows, table.names), end="\n\n")
    x = table.rows.to(torch.get_default_dtype())
    held_out, trained = torch.randperm(len(x)).split([len(x) // 5, len(x) - len(x) // 5])
    latent_dim = options.latent_dim
    if latent_dim is None:
        suggestion = nfi.diagnostics.suggest_latent_dim(x[trained])
        print(suggestion, end="\n\n")
        latent_dim = min(suggestion.recommended[1], x.shape[1] - 1)
    model = nfi.injective_flow(x[trained], latent_dim, transform="auto")
    print(nfi.training.fit(model, x[trained], seconds=options.seconds), end="\n\n")
    model.eval()
    print(nfi.diagnostics.injectivity_report(model, x[held_out][:500]), end="\n\n")
    write_results(model, table, held_out, options.out)


def read_nuclei() -> Table:
    """Read a table that scikit-learn ships: Street et al., Nuclear feature extraction, 1993."""
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError as error:
        raise SystemExit("Give a file, or install scikit-learn for its example.") from error
    nuclei = load_breast_cancer()
    rows = torch.as_tensor(nuclei.data)
    return Table([*map(str, nuclei.feature_names)], rows, 1 + torch.arange(len(rows)), [])


@torch.no_grad()
def write_results(
    model: nfi.InjectiveNormalizingFlow, table: Table, held_out: Tensor, folder: Path
) -> None:
    """Write samples, scores of every row, and figures; print the most unusual held-out rows."""
    folder.mkdir(parents=True, exist_ok=True)
    x = table.rows.to(torch.get_default_dtype())
    samples, log_q = model.sample(1000)
    assert log_q is not None
    _write(folder / "samples.csv", {**_columns(table.names, samples), "log density": log_q})
    reference = x[held_out]
    scores = nfi.score(model, x, reference=reference)
    is_held_out = torch.zeros(len(x)).index_fill(0, held_out, 1.0)
    per_row = {name: torch.as_tensor(values) for name, values in scores.to_dict().items()}
    _write(folder / "scores.csv", {"line": table.lines, "held out": is_held_out.long(), **per_row})
    units = model.flows[-1]
    residual = units.inverse(x)[0] - units.inverse(model.project(x))[0]
    print(f"Most unusual of {len(held_out)} held-out rows, by their distance from the manifold")
    print(f"{'line':>8}{'distance':>10}{'p-value':>9}  columns that are farthest off")
    order = scores.reconstruction_error[held_out].argsort(descending=True)
    for row in held_out[order][:5].tolist():
        columns = residual[row].abs().argsort(descending=True)[:3].tolist()
        print(
            f"{int(table.lines[row]):>8}{scores.reconstruction_error[row].sqrt():>10.3g}"
            f"{scores.p_value[row]:>9.3f}  {', '.join(table.names[i] for i in columns)}"
        )
    files = ["samples.csv", "scores.csv"]
    if find_spec("matplotlib") is not None:
        places = units.inverse(x)[0], units.inverse(samples)[0]
        draw(*places, residual[held_out], table.names).savefig(folder / "table.png", dpi=150)
        # On training rows distances are smaller, and p-values mean nothing.
        figure = nfi.score(model, reference, reference=reference).plot()
        figure.savefig(folder / "scores.png", dpi=150)
        files += ["table.png", "scores.png"]
    print(f"\nWritten to {folder}: {', '.join(files)}.")


def draw(x: Tensor, samples: Tensor, residual: Tensor, names: list[str]) -> Figure:
    """Draw data and samples along two principal components, and the lost part of each column.

    Data (N, D), samples (M, D) and residuals (n, D) are in standardised coordinates.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5), layout="constrained")
    panels = figure.subplots(1, 3)
    mean = x.mean(0)
    _, _, directions = torch.linalg.svd(x - mean, full_matrices=False)
    for panel, rows, title in zip(panels, (x, samples), ("data", "samples"), strict=False):
        plane = ((rows[: len(x)] - mean) @ directions[:2].T).numpy()
        panel.scatter(plane[:, 0], plane[:, 1], s=6, alpha=0.5)
        panel.set(xlabel="first principal component", title=f"{len(plane)} rows of {title}")
    panels[0].set(ylabel="second principal component")
    panels[1].sharex(panels[0])
    panels[1].sharey(panels[0])
    lost = residual.square().mean(0) / x.var(0).clamp(min=1e-12)
    most = lost.argsort(descending=True)[:20].flip(0)
    panels[2].barh([names[column] for column in most.tolist()], lost[most].numpy())
    panels[2].set(
        xlabel="part of the variance that the manifold loses, held-out rows", xlim=(0, None)
    )
    return figure


def _columns(names: list[str], rows: Tensor) -> dict[str, Tensor]:
    return dict(zip(names, rows.unbind(1), strict=True))


def _write(path: Path, columns: dict[str, Tensor]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(values.tolist() for values in columns.values()), strict=True))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", help="file of comma-separated values")
    parser.add_argument("--latent-dim", type=int, help="default: as suggested")
    parser.add_argument("--seconds", type=float, default=30.0, help="processor time, default 30")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder, default out")
    return parser.parse_args()


if __name__ == "__main__":
    main()

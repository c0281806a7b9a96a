"""The table, the figure and the page of the benchmark of MixerFlow."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from records import Record, with_error

__all__ = ["write_page"]

KINDS = ("original", "structured", "full")


def write_page(records: Sequence[Record], data: str, steps: int, page: Path | None) -> None:
    """Print the table, and write the page and its figure if a place is given.

    Args:
        records: Runs, with keys "model|kind|seed".
        data: Name of the images.
        steps: Number of training steps.
        page: Markdown page, or None.
    """
    table = _table(records)
    print(table)
    if page is None:
        return
    figure = page.parent.parent / "figures" / f"{page.stem}.png"
    _draw(records, figure)
    seeds = 1 + max(int(record["key"].split("|")[2]) for record in records)
    text = _PAGE.replace("TABLE", table).replace("DATA", data).replace("SEEDS", str(seeds))
    text = text.replace("STEPS", str(steps)).replace("FIGURE", f"../figures/{figure.name}")
    text = text.replace("LOSSES", _losses(records)).replace("TORCH", torch.__version__)
    page.write_text(text.replace("MACHINE", platform.machine()))


def _of(records: Sequence[Record], model: str, kind: str, field: str = "bits") -> list[float]:
    wanted = [record for record in records if record["key"].startswith(f"{model}|{kind}|")]
    return [record[field] for record in sorted(wanted, key=lambda record: record["key"])]


def _models(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record["key"].split("|")[0] for record in records))


def _table(records: Sequence[Record]) -> str:
    lines = [
        "| model | parameters | step, times Glow's | original | structured | full |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    unit = _of(records, "Glow", "original", "seconds_per_step")
    for model in _models(records):
        cells = [_of(records, model, kind) for kind in KINDS]
        entries = " | ".join(with_error(bits, 3) if bits else "-" for bits in cells)
        seconds = _of(records, model, "original", "seconds_per_step")
        ratio = f"{sum(seconds) / sum(unit[: len(seconds)]):.2f}" if unit else "-"
        parameters = _of(records, model, "original", "parameters")
        size = f"{int(parameters[0]):,}" if parameters else "-"
        lines.append(f"| {model} | {size} | {ratio} | {entries} |")
    return "\n".join(lines)


def _losses(records: Sequence[Record]) -> str:
    """What each permutation costs, seed by seed, so that what seeds share cancels."""
    lines = ["| model | structured - original | full - original |", "| --- | ---: | ---: |"]
    for model in ("MixerFlow", "Glow"):
        original = _of(records, model, "original")
        cells = []
        for kind in KINDS[1:]:
            pairs = zip(_of(records, model, kind), original, strict=False)
            losses = [permuted - plain for permuted, plain in pairs]
            cells.append(with_error(losses, 3) if losses else "-")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _draw(records: Sequence[Record], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.6, 3.2), layout="constrained")
    models = _models(records)
    for row, model in enumerate(models):
        for kind, marker in zip(KINDS, ("o", "s", "^"), strict=True):
            bits = _of(records, model, kind)
            label = kind if row == 0 else None
            color = f"C{KINDS.index(kind)}"
            axes.plot(bits, [row] * len(bits), marker, color=color, alpha=0.7, label=label)
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    axes.set_xlabel("bits per dimension, every seed a mark")
    axes.legend(title="pixels")
    axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


_PAGE = """# MixerFlow beside Glow, with pixels in order and out of order

Produced by

    python benchmarks/flows/mixer.py DATA --data DIR --seeds SEEDS --steps STEPS \\
        --page docs/results/mixer.md

torch TORCH, one thread of a shared CPU (MACHINE). Images of 28 x 28 with 5 bits, dequantised
uniformly; STEPS steps of Adam with 64 images, warmed up to 0.002 and let down by a cosine, the
same for all models; bits per dimension on the first 2000 test images. Entries are means over
SEEDS seeds (of weights, batches and permutations) with the standard error over seeds.

TABLE

*structured*: the 4 x 4 patches change places, and the pixels within them do so in one way that is
the same in all patches. *full*: any order of the 784 pixels. The permutation is part of the data
and fixed during training and test. What it costs, in pairs of runs with the same seed:

LOSSES

![bits per dimension of every run](FIGURE)

* **The order of patches, and within them, does not matter to MixerFlow**, to 0.02 bits: its class
  of densities is all but closed under such permutations, and what is left is the order in which
  couplings take halves. Glow loses more than half a bit. With all pixels out of order both lose
  more than a bit, Glow more.
* **With pixels in order Glow is ahead after as many steps, and behind after as much time**: its
  steps take three times as long. It would go on improving too; neither has converged.
* **Shifts cost half a bit here.** They change which pixels meet in a row from layer to layer,
  which every layer behind them has to learn; *interior* also spends parameters on layers of its
  own.
* The MixerFlow has eight layers, coupling networks of two hidden layers of width 96, patches of
  4 x 4. Glow is the host's, two levels of six blocks, with
  the width that comes nearest in parameters. *interior* has narrower networks to make up for the
  layers of the interior.
* *step* is processor time for loss, gradients and update, as a multiple of Glow's in the same run.
* No shift is the default of `mixer_flow`, by the rows of this table.
* One dataset, small models and short runs: published images, sizes and budgets were not tried.
"""

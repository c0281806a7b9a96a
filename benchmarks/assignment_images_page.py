"""The page and the figure of the benchmark on binarised images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from flows.records import Record
from torch import Tensor

__all__ = ["write_page"]

SIDE, COLUMNS = 14, 20


def write_page(records: Sequence[Record], test: Tensor, steps: int, page: Path | None) -> None:
    """Print the table, and write it with its text and the figure of samples."""
    table = "\n".join([*_HEAD, *(_row(record) for record in records)])
    print(table)
    if page is None:
        return
    figure = page.parent.parent / "figures" / "assignment_images.png"
    _draw(records, test, figure)
    text = _TEXT.format(steps=steps, judged=len(test), table=table, **_facts(records))
    page.write_text(text)
    print(f"wrote {page} and {figure}")


_HEAD = (
    "| model | parameters | bits per dimension | effective sample size | rate | best step "
    "| seconds per step |",
    "|---|---:|---:|---:|---:|---:|---:|",
)


def _row(record: Record) -> str:
    cells = [record["model"], f"{record['parameters']:,}"]
    cells.append(f"{record['bits']:.4f} ± {record['error']:.4f}")
    share = record.get("effective_sample_size")
    cells.append("exact" if share is None else f"{share:.2f}")
    cells.append(f"{record['rate']:g}" if "rate" in record else "")
    cells.append(f"{record['best_step']:,}" if "best_step" in record else "")
    cells.append(f"{record['seconds_per_step']:.3f}" if "best_step" in record else "")
    return f"| {' | '.join(cells)} |"


def _facts(records: Sequence[Record]) -> Record:
    flows = [record for record in records if "seconds_per_draw" in record]
    draws = ", ".join(f"{r['model'].split(', ')[1]} {r['seconds_per_draw']:.3f}" for r in flows)
    errors = ", ".join(f"{r['model'].split(', ')[1]} {r['error_by_draws']:.4f}" for r in flows)
    return {"draws": draws, "errors": errors}


def _draw(records: Sequence[Record], test: Tensor, path: Path) -> None:
    shown = {"test images": test[: 2 * COLUMNS]}
    shown |= {r["model"]: torch.tensor(r["samples"])[: 2 * COLUMNS] for r in records}
    figure, axes = plt.subplots(
        len(shown), 1, figsize=(10, 1.35 * len(shown)), layout="constrained"
    )
    for axis, (name, images) in zip(axes, shown.items(), strict=True):
        padded = torch.nn.functional.pad(images.view(-1, SIDE, SIDE).float(), (1, 1, 1, 1))
        grid = padded.view(2, COLUMNS, SIDE + 2, SIDE + 2).permute(0, 2, 1, 3)
        axis.imshow(grid.reshape(2 * (SIDE + 2), -1).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)


_TEXT = """# Binarised images

`python benchmarks/assignment_images.py --data DIR --page docs/results/assignment_images.md`

MNIST averaged over 2 x 2 pixels and set to one above the middle: 14 x 14 pixels of two classes.
{steps:,} steps of 128 images for every model, one seed, Adam with a one-cycle rate of at most 1e-3
or 3e-3, whichever was better on 5,000 validation images; the weights that were best on these,
looked at every 500 steps. The flows
have default options and stop where `choose_horizon` says. MADE is the host's, in the order of
reading; of masked weights only those that are not masked count as parameters.

Bits per dimension of {judged} test images, with the standard error of their mean over images. For
the flows the probability is an importance-sampled one (16 draws, divergence by two probes, or in
closed form for `LeaveOneOutField`): its logarithm is too small in the mean, so the bits are rather
too many. The error of one image by the draws is, in bits per dimension: {errors}.

{table}

Seconds for one draw of a likelihood: {draws}.

![samples](../figures/assignment_images.png)

Convolutions over the grid need the fewest bits, by less than the error beside MADE, with a tenth
of its parameters and several times its time per step; most of their samples can be read, some are
pieces of two digits. The perceptron over all pixels has as many parameters as MADE and takes more
bits: its strokes break, and stray pixels stand beside them. The network that leaves variables out
has less noise in its likelihoods than the perceptron, and takes the most bits. MADE draws whole
strokes and now and then a stray pixel.

What falls short: one seed, one data set, {judged} test images, and no model had converged: the
best weights on validation images were the last ones of every training. The flows' bits are bounds,
loosest where the effective sample size is small.
"""

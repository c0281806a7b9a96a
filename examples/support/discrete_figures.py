"""Figures of the example of assignment flows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from einops import rearrange
from torch import Tensor

from .figures import image_grid

__all__ = ["draw_images", "draw_informations"]

COLUMNS = 10


def draw_images(
    samples: Tensor, by_class: Tensor, real: Tensor, size: int, path: Path, title: str
) -> None:
    """Draw squares of 100 images (100, size * size): samples, samples by class, real images."""
    blank = torch.zeros(COLUMNS, 1, size * size)
    squares = [rearrange(x, "(r c) d -> r c d", c=COLUMNS) for x in (samples, by_class, real)]
    rows = torch.cat([squares[0], blank, squares[1], blank, squares[2]], 1)
    images = rearrange(rows, "r c (h w) -> (r c) 1 h w", h=size).float()
    image_grid(images, rows.shape[1], path, title)


def draw_informations(
    data: Tensor, held_out: Tensor, samples: Tensor, names: Sequence[str], path: Path
) -> None:
    """Draw mutual informations (n, n) in nats, of training rows, held-out rows and samples."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.6), layout="constrained")
    above = tuple(torch.triu_indices(len(names), len(names), 1))
    # Square roots, so that weak dependences can be seen beside strong ones.
    largest = float(data[above].max()) ** 0.5
    for axis, matrix, title in ((axes[0], data, "training rows"), (axes[1], samples, "samples")):
        roots = matrix.clamp_min(0).sqrt().fill_diagonal_(torch.nan)
        shown = axis.imshow(roots.numpy(), vmin=0, vmax=largest, cmap="viridis")
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set_yticks(range(len(names)), names)
        axis.set_title(title)
    figure.colorbar(shown, ax=axes[:2], label="root of mutual information in nats", shrink=0.8)
    axis = axes[2]
    floor = 1e-4
    axis.loglog(*(x[above].clamp_min(floor) for x in (data, held_out)), ".", color="0.65", ms=5)
    axis.loglog(*(x[above].clamp_min(floor) for x in (data, samples)), "o", color="C3", ms=4)
    limits = [floor, 2 * largest**2]
    axis.plot(limits, limits, color="0.3", lw=0.8)
    axis.set_xlabel("mutual information of training rows in nats")
    axis.set_ylabel("mutual information in nats")
    axis.legend(["held-out rows", "samples"], loc="upper left")
    axis.set_title("all pairs of columns")
    figure.savefig(path, dpi=100)
    plt.close(figure)

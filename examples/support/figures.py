"""Figures of images: samples, reconstructions, latent traversals."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from einops import rearrange
from torch import Tensor

import normflows_injective as nfi


def image_grid(images: Tensor, columns: int, path: Path, title: str) -> None:
    """Draw images (N, 1, height, width) with values in [0, 1] as a grid, row by row."""
    padded = torch.nn.functional.pad(images.clamp(0, 1), (1, 1, 1, 1), value=0.5)
    grid = rearrange(padded, "(r c) 1 h w -> (r h) (c w)", c=columns)
    height, width = grid.shape
    figure = plt.figure(figsize=(10, 10 * height / width + 0.35), layout="constrained")
    axis = figure.subplots()
    axis.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=1)
    axis.set_title(title, fontsize=11)
    axis.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_image_figures(
    model: nfi.InjectiveNormalizingFlow,
    test: Tensor,
    image_shape: tuple[int, int, int],
    folder: Path,
    name: str,
    device: torch.device | str = "cpu",
) -> list[Path]:
    """Draw samples, reconstructions, latent traversals and the injectivity report.

    The model takes images scaled to [0, 1], flattened or not. Returns the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"{name}_{kind}.png" for kind in KINDS}

    def drawn(x: Tensor) -> Tensor:
        return x.detach().cpu().reshape(-1, *image_shape)

    with torch.no_grad():
        samples, _ = model.sample(100, log_prob=False)
        image_grid(drawn(samples), 20, paths["samples"], "Samples of the model")
        shown = test[:20].to(device)
        pairs = torch.cat([drawn(shown), drawn(model.project(shown))])
        title = "Test images (above) and their reconstructions (below)"
        image_grid(pairs, 20, paths["reconstructions"], title)
        steps = drawn(model.forward(traversals(model, test[:5].to(device), 20)))
        title = "From one test image to the next, along straight lines of the base variables"
        image_grid(steps, 20, paths["traversals"], title)
    report = nfi.diagnostics.injectivity_report(model, test[:300].to(device))
    report.plot().savefig(paths["report"], dpi=90)
    return list(paths.values())


KINDS = ("samples", "reconstructions", "traversals", "report")


def traversals(model: nfi.InjectiveNormalizingFlow, x: Tensor, steps: int) -> Tensor:
    """Base variables (N * steps, d) on straight lines between images (N, *), in a circle."""
    ends = model.inverse(x)
    weights = torch.linspace(0, 1, steps, device=x.device).unsqueeze(1)
    lines = [torch.lerp(a, b, weights) for a, b in zip(ends, ends.roll(-1, 0), strict=True)]
    return torch.cat(lines)

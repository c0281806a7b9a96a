"""Layer-wise construction of a coupling flow: when to stop.

    python -m benchmarks.flows.layerwise [--seeds 3] [--quick] [--page docs/results/layerwise.md]

A ring in two dimensions, from several numbers of samples. The trainer of this package, which stops
where held-out rows see no gain, beside a construction of fixed depth by bins, as it is published:
equal-count bins of the coordinate that is given, half steps, the best of ten rotations by the
training rows. Every run is a line of ``out/layerwise.jsonl`` and is not repeated. ``--quick``
builds two layers, into another file, to see that everything runs.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.shared.figures import beside, new_figure, save
from benchmarks.shared.records import Record, read, run_once
from benchmarks.shared.tables import report, table, with_error
from normflows_injective.diagnostics import LayerwiseTrainer
from normflows_injective.flows.volume_preserving import random_rotation

SIZES, DEPTH, EVALUATED = (2048, 8192, 32_768), 60, 50_000
METHODS = {
    "stopped": "held-out rule",
    "bins64": "60 layers, 64 bins",
    "bins16": "60 layers, 16 bins",
}
MEAN, SPREAD = 1.5, 0.1


def ring(count: int, generator: torch.Generator) -> Tensor:
    """Radius N(1.5, 0.1^2), uniform angle: points (count, 2)."""
    radius = MEAN + SPREAD * torch.randn(count, 1, generator=generator)
    angle = 2 * math.pi * torch.rand(count, 1, generator=generator)
    return radius * torch.cat([angle.cos(), angle.sin()], dim=1)


def log_prob(x: Tensor) -> Tensor:
    """Log-density of the ring; a negative radius has probability 1e-50."""
    radius = x.norm(dim=1)
    scores = -0.5 * ((radius - MEAN) / SPREAD).square() - math.log(SPREAD)
    return scores - 0.5 * math.log(2 * math.pi) - math.log(2 * math.pi) - radius.log()


def divergence(x: Tensor, z: Tensor, log_det: Tensor) -> float:
    """KL from the ring to a flow with standard normal base, on points x with latents z."""
    log_q = log_det - 0.5 * z.square().sum(1) - math.log(2 * math.pi)
    return float((log_prob(x) - log_q).double().mean())


def by_trainer(x: Tensor, fresh: Tensor, depth: int, generator: torch.Generator) -> Record:
    """The trainer of the package, with its own defaults."""
    trainer = LayerwiseTrainer(2, max_layers=depth, generator=generator)
    flows, history = trainer.fit(x)
    z, total = fresh, fresh.new_zeros(len(fresh))
    curve = [divergence(fresh, z, total)]
    with torch.no_grad():
        for position, flow in enumerate(reversed(flows)):
            z, log_det = flow.inverse(z)
            total = total + log_det
            if position % 2:
                curve.append(divergence(fresh, z, total))
    return {"curve": curve, "gains": history.gains.tolist()}


def by_bins(x: Tensor, fresh: Tensor, depth: int, bins: int, generator: torch.Generator) -> Record:
    """Half steps by moments of equal-count bins, the best of ten rotations on the rows of the fit.

    The moments go linearly from centre to centre of the bins, and are constant beyond.
    """
    z, total = fresh, fresh.new_zeros(len(fresh))
    curve = [divergence(fresh, z, total)]
    for _ in range(depth):
        best = None
        for _ in range(10):
            rotation = random_rotation(2, generator).float()
            b, a = (x @ rotation.T).unbind(1)
            order = b.argsort()
            groups = order.view(bins, -1)
            means, stds = a[groups].mean(1), a[groups].std(1)
            gain = 0.5 * (means.square() + stds.square() - 1 - 2 * stds.log()).mean()
            if best is None or gain > best[0]:
                best = (gain, rotation, b[groups].mean(1), means, stds)
        _, rotation, centres, means, stds = best
        x, _ = _half_step(x @ rotation.T, centres, means, stds)
        z, log_det = _half_step(z @ rotation.T, centres, means, stds)
        total = total + log_det
        curve.append(divergence(fresh, z, total))
    return {"curve": curve, "gains": []}


def _half_step(x: Tensor, centres: Tensor, means: Tensor, stds: Tensor) -> tuple[Tensor, Tensor]:
    b, a = x.unbind(1)
    index = torch.searchsorted(centres, b.contiguous()).clamp(1, len(centres) - 1)
    share = ((b - centres[index - 1]) / (centres[index] - centres[index - 1])).clamp(0, 1)
    mean = torch.lerp(means[index - 1], means[index], share)
    std = torch.lerp(stds[index - 1], stds[index], share)
    scale = 1 + 0.5 * (1 / std - 1)
    return torch.stack([b, scale * a - 0.5 * mean / std], dim=1), scale.log()


def measure(method: str, size: int, seed: int, depth: int) -> Record:
    """One construction, with its divergence after every layer."""
    generator = torch.Generator().manual_seed(1000 * seed + size)
    x = ring(size, generator)
    fresh = ring(EVALUATED, torch.Generator().manual_seed(999_999 - seed))
    start = time.perf_counter()
    if method == "stopped":
        construction = by_trainer(x, fresh, depth, generator)
    else:
        construction = by_bins(x, fresh, depth, int(method.removeprefix("bins")), generator)
    seconds = time.perf_counter() - start
    return {"method": method, "size": size, "seed": seed, "seconds": seconds, **construction}


def _chosen(records: list[Record], method: str, size: int) -> list[Record]:
    return [r for r in records if (r["method"], r["size"]) == (method, size)]


def divergences(records: list[Record]) -> str:
    """The table, with a row for each number of samples and method."""
    rows = []
    for size in SIZES:
        for method, title in METHODS.items():
            runs = _chosen(records, method, size)
            if not runs:
                continue
            curves = [run["curve"] for run in runs]
            depths = [len(curve) - 1 for curve in curves]
            least, most = min(depths), max(depths)
            after = [
                with_error([curve[k] for curve in curves], 3) if least >= k else "-"
                for k in (10, 20)
            ]
            rows.append(
                (
                    f"{size:,}",
                    f"{title} [{len(runs)}]",
                    f"{least} to {most}" if least < most else str(least),
                    *after,
                    f"**{with_error([curve[-1] for curve in curves], 3)}**",
                    with_error([min(curve) for curve in curves], 3),
                    f"{sum(run['seconds'] for run in runs) / len(runs):.0f}",
                )
            )
    head = ("samples", "construction [seeds]", "layers", "KL after 10", "after 20", "at the end")
    return table((*head, "least on the way", "seconds"), rows, 2)


def draw_figure(records: list[Record], path: Path) -> None:
    """Held-out divergence against the number of layers, one panel for each number of samples."""
    figure = new_figure(10, 3.6)
    axes = figure.subplots(1, len(SIZES), sharey=True)
    colours = {"stopped": "C0", "bins64": "C3", "bins16": "C1"}
    for axis, size in zip(axes, SIZES, strict=True):
        for method, colour in colours.items():
            for position, run in enumerate(_chosen(records, method, size)):
                label = METHODS[method] if position == 0 else None
                curve = run["curve"]
                axis.plot(curve, color=colour, alpha=0.8, lw=1.2, label=label)
                axis.plot(len(curve) - 1, curve[-1], "o", color=colour, markersize=4)
        axis.set(title=f"{size:,} samples", xlabel="layers", yscale="log", ylim=(0.08, 12))
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("KL on new points, nats")
    axes[-1].legend(fontsize=8)
    save(figure, path)


def main() -> None:
    """Do the missing runs, print the table, and write page and figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--page", type=Path, help="page whose table to write, and its figure")
    arguments = parser.parse_args()
    depth = 2 if arguments.quick else DEPTH
    path = Path("out") / f"layerwise{'_quick' if arguments.quick else ''}.jsonl"
    for seed in range(arguments.seeds):
        for size in SIZES:
            for method in METHODS:
                key = f"{method}-{size}-{seed}"
                record = run_once(
                    path, key, lambda m=method, n=size, s=seed: measure(m, n, s, depth)
                )
                print(key, f"{record['curve'][-1]:.3f}", len(record["curve"]) - 1, flush=True)
    records = list(read(path).values())
    report({"Divergences": divergences(records)}, arguments.page)
    if arguments.page is not None:
        draw_figure(records, beside(arguments.page))


if __name__ == "__main__":
    main()

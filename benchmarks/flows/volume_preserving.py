"""The floor under volume-preserving flows, and how far one more layer takes them through it.

    python -m benchmarks.flows.volume_preserving [--seeds 3] [--quick]
        [--page docs/results/volume_preserving.md]

Trains additive couplings (NICE), couplings of mean-free log-scales (GIN), both with one scale, the
same with a radial layer at the base, and affine couplings, and compares their divergence from the
target with the floor that no volume-preserving flow can beat. Every run is a line of
``out/volume_preserving.jsonl`` and is not repeated. ``--quick`` trains for a few steps, into
another file, to see that everything runs.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import normflows as nf
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.shared.figures import beside, new_figure, save
from benchmarks.shared.records import Record, read, run_once
from benchmarks.shared.tables import report, table, with_error
from normflows_injective.diagnostics import volume_preserving_floor_on_box
from normflows_injective.diagnostics.floors import VolumePreservingFloor, uniform_floor
from normflows_injective.flows.coupling import Affine, NetworkCoupling
from normflows_injective.flows.volume_preserving import (
    GINCoupling,
    GlobalScale,
    NICECoupling,
    RadialFlow1D,
    Rotation,
)

EVALUATED, GRID, HIDDEN = 200_000, 160, (64, 64)
OUT = Path("out")


class Plan(NamedTuple):
    """Size of the flows and length of their training."""

    couplings: int
    steps: int
    batch: int


class Target(NamedTuple):
    """A density that can be drawn from, and its floor in nats."""

    title: str
    dim: int
    sample: Callable[[int], Tensor]
    log_prob: Callable[[Tensor], Tensor]
    floor: float
    half_width: float
    plan: Plan


def _mixture_log_prob(x: Tensor) -> Tensor:
    means, variances = x.new_tensor([[-1.5, 0.0], [1.5, 0.0]]), x.new_tensor([0.3, 0.03])
    squares = (x.unsqueeze(1) - means).square().sum(2)
    scores = -0.5 * squares / variances - (2 * math.pi * variances).log()
    return scores.logsumexp(1) - math.log(2)


def _mixture_sample(count: int) -> Tensor:
    index = torch.randint(2, (count, 1))
    mean = torch.cat([3.0 * index - 1.5, torch.zeros(count, 1)], dim=1)
    return mean + torch.where(index == 0, 0.3**0.5, 0.03**0.5) * torch.randn(count, 2)


def _cube(dim: int, title: str) -> Target:
    # Of unit variance, so that flows start near it.
    half = 3**0.5
    return Target(
        title,
        dim,
        lambda count: (2 * torch.rand(count, dim) - 1) * half,
        lambda x: x.new_full((len(x),), -dim * math.log(2 * half)),
        uniform_floor(dim),
        1.3 * half,
        Plan(8, 1500, 384),
    )


def mixture_floor() -> VolumePreservingFloor:
    """The floor of the unequal mixture, by quadrature."""
    return volume_preserving_floor_on_box(_mixture_log_prob, [-5, -5], [5, 5], 1200)


TARGETS = {
    "square": _cube(2, "uniform on a square"),
    "mixture": Target(
        "unequal mixture",
        2,
        _mixture_sample,
        _mixture_log_prob,
        float(mixture_floor().floor),
        3.2,
        Plan(12, 2000, 512),
    ),
    "cube": _cube(4, "uniform on a 4-D cube"),
}


def _nice(dim: int, reverse: bool) -> nf.flows.Flow:
    return NICECoupling(dim, HIDDEN, reverse=reverse, activation=nn.SiLU)


def _gin(dim: int, reverse: bool) -> nf.flows.Flow:
    return GINCoupling(dim, HIDDEN, reverse=reverse, activation=nn.SiLU)


def _affine(dim: int, reverse: bool) -> nf.flows.Flow:
    return NetworkCoupling(dim, Affine(), HIDDEN, reverse=reverse, activation=nn.SiLU)


class Model(NamedTuple):
    """Couplings of one kind, with or without a scale and a radial layer before them."""

    title: str
    coupling: Callable[[int, bool], nf.flows.Flow]
    scaled: bool = True
    radial: bool = False

    def build(self, dim: int, couplings: int) -> list[nf.flows.Flow]:
        """Couplings in pairs, with a fixed random rotation after each pair.

        The coordinates of a cube are independent: along its axes the coupling gap is zero, and no
        coupling that starts as the identity gets away from there without a rotation.
        """
        flows: list[nf.flows.Flow] = [RadialFlow1D(dim)] if self.radial else []
        flows += [GlobalScale(dim)] if self.scaled else []
        for _ in range(couplings // 2):
            flows += [self.coupling(dim, False), self.coupling(dim, True), Rotation(dim)]
        return flows


MODELS = {
    "nice": Model("NICE + scale", _nice),
    "gin": Model("GIN + scale", _gin),
    "radial": Model("NICE + scale + radial", _nice, radial=True),
    "affine": Model("affine", _affine, scaled=False),
}
# In two dimensions GIN is NICE: a pair of rows would say the same.
CELLS = [(t, m) for t in ("mixture", "square") for m in ("nice", "radial", "affine")]
CELLS += [("cube", model) for model in ("nice", "gin", "affine")]


def train(target: Target, model: Model, steps: int) -> nn.Module:
    """Maximum likelihood on fresh batches, with one cycle of the learning rate."""
    base = nf.distributions.DiagGaussian(target.dim, trainable=False)
    flow: nn.Module = nf.NormalizingFlow(base, model.build(target.dim, target.plan.couplings))
    optimizer = torch.optim.Adam(flow.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        loss = flow.forward_kld(target.sample(target.plan.batch))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    return flow


def measure(key: str, target: str, name: str, seed: int, quick: bool) -> Record:
    """Train one model and judge it on new points."""
    steps, count = (5, 2000) if quick else (TARGETS[target].plan.steps, EVALUATED)
    torch.manual_seed(seed)
    start = time.perf_counter()
    model = train(TARGETS[target], MODELS[name], steps)
    seconds = time.perf_counter() - start
    torch.manual_seed(10_000 + seed)
    with torch.no_grad():
        points = TARGETS[target].sample(count).split(20_000)
        gaps = torch.cat([TARGETS[target].log_prob(x) - model.log_prob(x) for x in points])
        if TARGETS[target].dim == 2 and seed == 0 and not quick:
            density = model.log_prob(_grid(TARGETS[target])).exp()
            OUT.mkdir(exist_ok=True)
            np.save(OUT / f"volume_preserving_{key}.npy", density.view(GRID, GRID).numpy())
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "target": target,
        "model": name,
        "seed": seed,
        "divergence": float(gaps.double().mean()),
        "error": float(gaps.double().std()) / len(gaps) ** 0.5,
        "parameters": parameters,
        "seconds": seconds,
        "steps": steps,
    }


def _grid(target: Target) -> Tensor:
    axis = torch.linspace(-target.half_width, target.half_width, GRID)
    return torch.cartesian_prod(axis, axis)


def divergences(records: list[Record]) -> str:
    """The table, with a row for each target and model."""
    rows = []
    for target, name in CELLS:
        runs = [r for r in records if (r["target"], r["model"]) == (target, name)]
        if not runs:
            continue
        floor = TARGETS[target].floor
        bound = name in ("nice", "gin")
        values = [run["divergence"] for run in runs]
        above = with_error([value - floor for value in values], 4) if bound else "none applies"
        rows.append(
            (
                TARGETS[target].title,
                f"{MODELS[name].title} [{len(runs)}]",
                f"{runs[0]['parameters']:,}",
                with_error(values, 4),
                f"{floor:.4f}",
                above,
            )
        )
    head = ("target", "model [seeds]", "parameters", "KL to the target", "floor", "KL - floor")
    return table(head, rows, 2)


def draw_figure(records: list[Record], path: Path) -> None:
    """Divergences beside their floors, and the densities that were learned."""
    figure = new_figure(10, 7.6)
    grid = figure.add_gridspec(3, 4, height_ratios=[1.15, 1, 1])
    axis = figure.add_subplot(grid[0, :])
    for position, (target, name) in enumerate(CELLS):
        values = [r["divergence"] for r in records if (r["target"], r["model"]) == (target, name)]
        colour = "C0" if name in ("nice", "gin") else "C2" if "radial" in name else "C1"
        axis.plot([position] * len(values), values, "o", color=colour, alpha=0.8)
        floor = TARGETS[target].floor
        axis.plot([position - 0.4, position + 0.4], [floor, floor], "k--", lw=1)
    labels = [f"{MODELS[name].title}\n{target}" for target, name in CELLS]
    axis.set_xticks(range(len(labels)), [label.replace(" + ", "\n+ ") for label in labels])
    axis.tick_params(axis="x", labelsize=6.5)
    axis.set(ylabel="KL, nats", title="Divergence of every run; dashed: the floor", ylim=(0, None))
    axis.grid(axis="y", alpha=0.3)
    for row, target in enumerate(("square", "mixture"), start=1):
        columns = [("target", None), *((MODELS[m].title, m) for m in ("nice", "radial", "affine"))]
        half = TARGETS[target].half_width
        true = TARGETS[target].log_prob(_grid(TARGETS[target])).exp().view(GRID, GRID).numpy()
        if target == "square":
            inside = (_grid(TARGETS[target]).abs().max(1).values < 3**0.5).view(GRID, GRID)
            true = true * inside.numpy()
        for column, (title, name) in enumerate(columns):
            panel = figure.add_subplot(grid[row, column])
            file = OUT / f"volume_preserving_{target}-{name}-0.npy"
            if name is not None and not file.is_file():
                continue
            density = true if name is None else np.load(file)
            # The root shows tails; of one scale for all panels of a row.
            panel.imshow(
                density.T**0.5,
                origin="lower",
                extent=(-half, half, -half, half),
                vmin=0,
                vmax=1.2 * true.max() ** 0.5,
                cmap="viridis",
            )
            panel.set(xticks=[], yticks=[])
            panel.set_title(title, fontsize=9)
    save(figure, path)


def main() -> None:
    """Do the missing runs, print the table, and write page and figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--page", type=Path, help="page whose table to write, and its figure")
    arguments = parser.parse_args()
    path = OUT / f"volume_preserving{'_quick' if arguments.quick else ''}.jsonl"
    for seed in range(arguments.seeds):
        for target, name in CELLS:
            key = f"{target}-{name}-{seed}"
            record = run_once(
                path,
                key,
                lambda k=key, t=target, n=name, s=seed: measure(k, t, n, s, arguments.quick),
            )
            print(key, f"{record['divergence']:.4f} ± {record['error']:.4f}", flush=True)
    records = list(read(path).values())
    report({"Divergences": divergences(records)}, arguments.page)
    if arguments.page is not None:
        draw_figure(records, beside(arguments.page))


if __name__ == "__main__":
    main()

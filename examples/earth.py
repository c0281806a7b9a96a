"""Where the earth quakes, burns and floods: densities on the sphere S^2, with exact likelihoods.

    python examples/earth.py --data DIR [volcano quakes flood fire] [--seeds 5] [--distinct]
    python examples/earth.py --data DIR --quick

DIR holds ``earth.npz`` with arrays of latitudes and longitudes in degrees, (N, 2); it may also be
given as the variable NFI_DATA. Flows of ``nfi.flows.star_like_flow`` stand beside von Mises-Fisher
mixtures, kernel densities and the uniform law, on the same random splits 80 : 10 : 10. Whatever is
chosen is chosen on validation data. Prints a Markdown table of the test NLL in nats, against the
area of the sphere, and writes it with a figure and the scores of every seed to ``--out``.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from support.earth_data import SETS, Splits, read_events, split
from support.globe import draw_globes
from support.sphere_mixture import fit_kernels, fit_mixture
from torch import Tensor, nn
from tqdm import trange

import normflows_injective as nfi

UNIFORM_NLL = math.log(4 * math.pi)
CHECKS = 20


class Recipe(NamedTuple):
    """How flows, mixtures and kernels are fitted; fields of several values are chosen from."""

    steps: int = 600
    batch_size: int = 1024
    noises: tuple[float, ...] = (0.0,)
    num_layers: int = 8
    sizes: tuple[int, ...] = (1, 4, 16, 32, 64, 96, 128)
    bounds: tuple[float, ...] = (1e2, 3e2, 1e3, 3e3, 1e4, 3e4, 1e5)
    kernel_bounds: tuple[float, ...] = tuple(10**exponent for exponent in (2, 3, 3.5, 4, 5, 6, 7))
    restarts: int = 2


RECIPES = {
    # So few points are learned by heart in no time; noise tells the flow how wide they are.
    "volcano": Recipe(steps=800, batch_size=256, noises=(0.001, 0.01)),
    "quakes": Recipe(steps=1000, noises=(0.005,)),
    "flood": Recipe(noises=(0.005, 0.01)),
    "fire": Recipe(steps=1500),
}
QUICK = Recipe(40, 256, (0.03,), 2, (1, 8), (1e2, 1e3), (1e2, 1e3), 1)


class Scores(NamedTuple):
    """Test NLL of every law on one split in nats, and the choices by validation data."""

    set: str
    seed: int
    train_points: int
    test_points: int
    repeated: int
    mixture: float
    kernels: float
    flow: float
    flow_train: float
    flow_validation: float
    mixture_validation: float
    components: int
    bound: float
    uniform: float
    kernel_bound: float
    noise: float
    seconds: float


def nll(model: nfi.InjectiveNormalizingFlow, points: Tensor) -> float:
    """Mean exact NLL in nats."""
    model.eval()
    with torch.no_grad():
        return -float(model.log_prob(points.float()).double().mean())


def fit_flow(
    splits: Splits, recipe: Recipe, noise: float
) -> tuple[nfi.InjectiveNormalizingFlow, float]:
    """Train in normflows' own loop, and keep the weights of the least validation NLL.

    ``noise`` is the standard deviation, in radians, of the noise added to training points.
    """
    model = nfi.flows.star_like_flow(
        3, num_layers=recipe.num_layers, width=64, num_bins=16, num_frequencies=6
    )
    train = splits.train.float()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=recipe.steps, pct_start=0.1
    )
    best, best_weights = math.inf, {}
    progress = trange(recipe.steps, desc=f"noise {noise:g}", unit="step", mininterval=5)
    for step in progress:
        x = train[torch.randint(len(train), (recipe.batch_size,))]
        if noise > 0:
            x = nn.functional.normalize(x + noise * torch.randn_like(x), dim=1)
        model.train()
        loss = model.forward_kld(x)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if (step + 1) % max(1, recipe.steps // CHECKS) == 0:
            validation = nll(model, splits.validation)
            progress.set_postfix(validation=f"{validation:.2f}", refresh=False)
            if validation < best:
                best = validation
                best_weights = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(best_weights)
    return model, best


def run(
    name: str, splits: Splits, seed: int, recipe: Recipe
) -> tuple[Scores, nfi.InjectiveNormalizingFlow]:
    """Fit and score everything on one split."""
    print(f"{name}, seed {seed}", file=sys.stderr)
    torch.manual_seed(seed)
    mixture = fit_mixture(
        splits.train, splits.validation, recipe.sizes, recipe.bounds, recipe.restarts
    )
    kernels = fit_kernels(splits.train, splits.validation, recipe.kernel_bounds)
    start = time.perf_counter()
    fits = [(*fit_flow(splits, recipe, noise), noise) for noise in recipe.noises]
    seconds = time.perf_counter() - start
    model, validation, noise = min(fits, key=lambda fit: fit[1])
    scores = Scores(
        set=name,
        seed=seed,
        train_points=len(splits.train),
        test_points=len(splits.test),
        repeated=splits.num_repeated(),
        mixture=-float(mixture.mixture.log_prob(splits.test).mean()),
        kernels=-float(kernels.mixture.log_prob(splits.test).mean()),
        flow=nll(model, splits.test),
        flow_train=nll(model, splits.train),
        flow_validation=validation,
        mixture_validation=mixture.validation_nll,
        components=mixture.size,
        bound=mixture.bound,
        uniform=mixture.uniform,
        kernel_bound=kernels.bound,
        noise=noise,
        seconds=seconds,
    )
    print(scores, file=sys.stderr)
    return scores, model


def markdown_table(results: list[Scores]) -> str:
    """Mean and standard error over the seeds, one row for each set."""
    lines = [
        "| set | training points | test points, of them in training | uniform | mixture | kernels "
        "| flow | flow minus mixture |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(scores.set for scores in results):
        rows = [scores for scores in results if scores.set == name]
        repeated = sum(row.repeated for row in rows) / sum(row.test_points for row in rows)
        cells = [
            name,
            str(rows[0].train_points),
            f"{rows[0].test_points}, {repeated:.1%}",
            f"{UNIFORM_NLL:.3f}",
            *(
                _cell([getattr(row, law) for row in rows])
                for law in ("mixture", "kernels", "flow")
            ),
            _cell([row.flow - row.mixture for row in rows]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    error = f" ± {np.std(values, ddof=1) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{error}"


def write_results(results: list[Scores], folder: Path, stem: str) -> None:
    """Write the table as Markdown and the scores of every seed as CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.md").write_text(markdown_table(results) + "\n", encoding="utf-8")
    with (folder / f"{stem}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([Scores._fields, *results])


def main() -> None:
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="*", help=f"of {', '.join(SETS)}; default: all")
    parser.add_argument("--data", type=Path, default=os.environ.get("NFI_DATA"))
    parser.add_argument("--seeds", type=int, default=5, help="number of splits (default 5)")
    parser.add_argument("--distinct", action="store_true", help="keep each place once")
    parser.add_argument("--quick", action="store_true", help="one set, one seed, few steps")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of what is written")
    options = parser.parse_args()
    unknown = sorted(set(options.sets) - set(SETS))
    if unknown:
        parser.error(f"unknown sets {', '.join(unknown)}: expected some of {', '.join(SETS)}")
    names = options.sets or list(SETS)
    if options.quick:
        names, options.seeds = names[:1], 1
    points = {name: read_events(name, options.data, options.distinct) for name in names}

    # So small a network gains nothing from more threads.
    torch.set_num_threads(1)
    stem = "earth_distinct" if options.distinct else "earth"
    results: list[Scores] = []
    for seed in range(options.seeds):
        models = {}
        for name in names:
            splits = split(points[name], seed)
            recipe = QUICK if options.quick else RECIPES[name]
            scores, model = run(name, splits, seed, recipe)
            results.append(scores)
            models[name] = (model, splits.test.float())
            write_results(sorted(results, key=lambda row: SETS.index(row.set)), options.out, stem)
        if seed == 0:
            for name, (model, _) in models.items():
                model.save(options.out / f"{stem}_{name}.safetensors")
            draw_globes(models, options.out / f"{stem}.png")
    print(markdown_table(results))


if __name__ == "__main__":
    main()

"""How a training step, exact densities and samples grow with d, D and the batch.

    python -m benchmarks.steps.growth [--quick] [--page docs/results/growth.md]

Models of perceptrons with eight couplings before the injection, on one thread. Each table goes
through one size and keeps the others. Its last row is the power of the size that fits the upper
half of the times.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import normflows as nf
import torch

import normflows_injective as nfi
from benchmarks.shared.tables import publish, table, wrapped
from benchmarks.shared.timing import exponent, least_seconds

HIDDEN, WIDE = (512, 512), (2048, 2048)
ENOUGH, QUICK_ENOUGH = 0.5, 0.01


class Size(NamedTuple):
    """Latent dimensions, data dimensions, rows of a batch, and hidden units."""

    latent_dim: int = 16
    data_dim: int = 256
    batch: int = 128
    hidden: tuple[int, int] = HIDDEN


# The name of what grows, its values, and all sizes.
SWEEPS: dict[str, tuple[Sequence[int], Callable[[int], Size]]] = {
    "d": ((8, 32, 128, 512, 1024), lambda value: Size(value, 2048, 32, WIDE)),
    "D": ((64, 1000, 10_000, 100_000), lambda value: Size(data_dim=value)),
    "batch": ((16, 64, 256, 1024, 4096), lambda value: Size(batch=value)),
}
QUICK = {"d": 2, "D": 2, "batch": 2}


def calls_of(size: Size, seed: int) -> dict[str, Callable[[], object]]:
    """The calls that are timed; a step is one without the optimiser."""
    torch.manual_seed(seed)
    pair = nfi.nets.mlp_autoencoder(size.data_dim, size.latent_dim, size.hidden)
    shapes = (size.latent_dim,), (size.data_dim,)
    q0 = nf.distributions.DiagGaussian(size.latent_dim, trainable=False)
    block = nfi.flows.latent_block(size.latent_dim)
    model = nfi.InjectiveNormalizingFlow(q0, [*block, nfi.flows.FreeFormInjection(*pair, *shapes)])
    x = torch.randn(size.batch, size.data_dim)

    def step() -> None:
        model.zero_grad()
        model.forward_kld(x).backward()

    no_grad = torch.no_grad()
    return {
        "step": step,
        "autoencoder's forward": no_grad(lambda: model.project(x)),
        "`log_prob`": no_grad(lambda: model.log_prob(x)),
        "sample": no_grad(lambda: model.sample(size.batch, log_prob=False)),
        "sample with density": no_grad(lambda: model.sample(size.batch)),
    }


def sweep(name: str, options: argparse.Namespace) -> str:
    """The table of one size."""
    values, size_of = SWEEPS[name]
    values = values[: QUICK[name]] if options.quick else values
    seconds: dict[str, list[float]] = {}
    for value in values:
        for title, call in calls_of(size_of(value), options.seed).items():
            enough = QUICK_ENOUGH if options.quick else ENOUGH
            seconds.setdefault(title, []).append(least_seconds(call, 2, enough))
    rows = [
        [f"{value:,}", *(f"{1000 * times[i]:.3g}" for times in seconds.values())]
        for i, value in enumerate(values)
    ]
    half = len(values) // 2
    powers = [f"{exponent(values[half:], times[half:]):.2f}" for times in seconds.values()]
    return table([name, *(f"{title}, ms" for title in seconds)], [*rows, ["power", *powers]])


def page(options: argparse.Namespace) -> str:
    """The page of results."""
    command = "    python -m benchmarks.steps.growth --page docs/results/growth.md"
    text = (
        "Encoder and decoder are perceptrons, before the injection stand eight couplings, two of "
        "them splines. A step is the loss with one probe and its "
        "backward pass. Densities and samples are of a whole batch. The least processor time of "
        "several calls on one thread. *Power* is the slope of the upper half of the rows in "
        f"logarithms. torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}."
    )
    parts = ["# How the cost grows", command, wrapped(text)]
    for name in SWEEPS:
        others = SWEEPS[name][1](0)._asdict()
        hidden = " and ".join(map(str, others.pop("hidden")))
        kept = ", ".join(f"{key} {value:,}" for key, value in others.items() if value)
        kept += f", hidden units {hidden}"
        parts += [f"## With {name}", f"The others: {kept}.", sweep(name, options)]
    return "\n\n".join(parts).replace("latent_dim", "d").replace("data_dim", "D") + "\n"


def main() -> None:
    """Measure all sizes, print the page and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first two of each size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path, help="page to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    publish(page(options), options.page)


if __name__ == "__main__":
    main()

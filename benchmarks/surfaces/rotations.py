"""Densities of rotations that are known: how near ``rotation_flow`` comes to them.

    python -m benchmarks.surfaces.rotations [--quick] [--page docs/results/rotations.md]

The targets are those by which flows on SO(3) are usually judged, made of matrix Fisher modes of
equal weight, so that they can be drawn from exactly and their normaliser is known: a single peak,
four modes on the line of turns about an axis, also with sharper modes, and 24 modes at the
rotations of a cube. Each model is trained by ``nfi.training.fit`` on draws of the target for a
budget of processor seconds, and judged by the divergence KL(target || model) on new draws.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from pathlib import Path
from typing import NamedTuple

import normflows as nf
import torch
from torch import Tensor

import normflows_injective as nfi
from benchmarks.shared.tables import publish, table, wrapped
from normflows_injective.distributions import MatrixFisher, UniformRotation
from normflows_injective.flows.surfaces.quaternions import multiply, quaternion_from_matrix

TRAINED, JUDGED, UNIFORM = 40_000, 20_000, 400_000
SECONDS, QUICK_SECONDS, SEEDS = 60.0, 3.0, (0,)
BATCH, RATE = 256, 1e-2
SIZES = {"num_layers": 6, "num_orders": 4, "width": 64, "num_blocks": 1}


class Mixture:
    r"""Equal parts of matrix Fisher laws with one concentration, :math:`F = \kappa R_j`."""

    def __init__(self, centres: Tensor, concentration: float) -> None:
        self.centres = centres
        self.concentration = concentration
        self.law = MatrixFisher(concentration * torch.eye(3, dtype=torch.float64))

    @property
    def degrees(self) -> float:
        """The standard deviation of a mode about each axis, near enough for sharp modes."""
        return math.degrees(1 / math.sqrt(2 * self.concentration))

    def sample(self, count: int) -> Tensor:
        """Quaternions (count, 4) in float64."""
        index = torch.randint(len(self.centres), (count,))
        return multiply(self.centres[index], self.law.sample(count))

    def log_prob(self, q: Tensor) -> Tensor:
        """Log-density (B,) in nats against Haar measure."""
        turns = multiply(self.centres * self.centres.new_tensor([1, -1, -1, -1]), q[:, None, :])
        scores = self.law.log_prob(turns.flatten(0, 1)).view(len(q), -1)
        return torch.logsumexp(scores, dim=1) - math.log(len(self.centres))


def line() -> Tensor:
    """Four turns (4, 4) about the third axis, by multiples of a right angle."""
    half = torch.arange(4, dtype=torch.float64) * math.pi / 4
    zeros = torch.zeros_like(half)
    return torch.stack([half.cos(), zeros, zeros, half.sin()], dim=1)


def cube() -> Tensor:
    """The 24 rotations (24, 4) of a cube: permutations of the axes with signs."""
    matrices = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            matrix = torch.diag(torch.tensor(signs, dtype=torch.float64))[:, list(order)]
            if torch.linalg.det(matrix) > 0:
                matrices.append(matrix)
    return quaternion_from_matrix(torch.stack(matrices))


def targets() -> dict[str, Mixture]:
    """The targets by name."""
    centre = torch.nn.functional.normalize(torch.tensor([[0.2, 0.5, -0.4, 0.7]]).double())
    return {
        "peak": Mixture(centre, 12.5),
        "line of 4 modes": Mixture(line(), 5.0),
        "cube of 24 modes": Mixture(cube(), 3.0),
        "line, sharper modes": Mixture(line(), 12.5),
    }


class Row(NamedTuple):
    """What one training gave."""

    divergence: float
    error: float
    steps: int
    seconds: float
    asymmetry: float


def mass(target: Mixture) -> tuple[float, float]:
    """Mean density of uniform rotations, which must be one, with its standard error."""
    torch.manual_seed(7)
    parts = UniformRotation().double().sample(UNIFORM).split(20_000)
    density = torch.cat([target.log_prob(part).exp() for part in parts])
    return float(density.mean()), float(density.std()) / math.sqrt(UNIFORM)


def train(target: Mixture, seconds: float, seed: int) -> Row:
    """Train a model on draws of a target, and judge it on others."""
    torch.manual_seed(seed)
    model = nfi.flows.rotation_flow(**SIZES)
    started = time.perf_counter()
    # The same likelihood of the same layers: after a chart log-dets add, so that a model of
    # normflows needs the inverse alone, where forward_kld here also decodes.
    host = nf.NormalizingFlow(model.q0, list(model.flows))
    result = nfi.training.fit(
        host,
        target.sample(TRAINED).float(),
        seconds=seconds,
        batch_size=BATCH,
        learning_rate=RATE,
        seed=seed,
    )
    elapsed = time.perf_counter() - started
    q = target.sample(JUDGED)
    with torch.no_grad():
        log_q = model.log_prob(q.float())
        other = model.log_prob(-q.float())
    gaps = target.log_prob(q) - log_q
    error = float(gaps.std()) / math.sqrt(JUDGED)
    steps = sum(phase.steps for phase in result.phases)
    return Row(float(gaps.mean()), error, steps, elapsed, float((log_q - other).abs().max()))


def page(
    rows: dict[str, list[Row]], masses: dict[str, tuple[float, float]], seconds: float
) -> str:
    """The text of the page."""
    found = targets()
    cells = [
        [
            name,
            f"{found[name].degrees:.0f}",
            f"{masses[name][0]:.4f} ± {masses[name][1]:.4f}",
            str(seed),
            f"{row.divergence:.4f} ± {row.error:.4f}",
            str(row.steps),
            f"{row.seconds:.0f}",
            f"{row.asymmetry:g}",
        ]
        for name, runs in rows.items()
        for seed, row in enumerate(runs)
    ]
    head = (
        "target",
        "width, degrees",
        "mass, by uniform draws",
        "seed",
        "KL(target, model), nats",
        "steps",
        "seconds by the clock",
        "asymmetry",
    )
    sizes = ", ".join(f"{name}={value}" for name, value in SIZES.items())
    worst = max(
        row.divergence for name, runs in rows.items() for row in runs if "sharp" not in name
    )
    texts = [
        "# Known densities of rotations",
        "    python -m benchmarks.surfaces.rotations --page docs/results/rotations.md",
        wrapped(
            f"`rotation_flow({sizes})`, trained by `nfi.training.fit` with batches of {BATCH} of "
            f"{TRAINED:,} draws and a peak learning rate of {RATE:g} for {seconds:g} processor "
            "seconds on one thread, as an `nf.NormalizingFlow` of its layers, which has the same "
            "likelihood and computes it in one pass, torch "
            f"{torch.__version__}, float32. The machine had other work, so that the clock ran "
            "longer, and steps are few; they differ from run to run, as the budget is in seconds."
        ),
        wrapped(
            "Targets are equal mixtures of matrix Fisher laws with F = kappa R: one peak, four "
            "turns about an axis by multiples of 90 degrees, and the 24 rotations of a cube. "
            "*Width* is the standard deviation of a mode, 1 / sqrt(2 kappa), about each axis. "
            "Their normaliser is that of `MatrixFisher`, a quadrature with a relative error below "
            f"1e-12; *mass* checks it by the mean density of {UNIFORM:,} uniform rotations. The "
            f"divergence is a mean over {JUDGED:,} new draws with its standard error. "
            "*Asymmetry* is the largest difference of the log-densities of q and -q."
        ),
        table(head, cells, 1),
        wrapped(
            f"On targets with wide modes the divergence is {worst:.3f} nats at most. The line "
            "with sharper modes shows where the budget ends: sharp and many modes take more "
            "steps. Sizes, rate and widths of the modes were chosen after a few runs on the same "
            "targets with wider and sharper modes. No other method was run here, so the page "
            "compares none."
        ),
    ]
    return "\n\n".join(texts) + "\n"


def main() -> None:
    """Run all targets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three seconds and one seed each")
    parser.add_argument("--page", type=Path, help="page of results to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds = QUICK_SECONDS if options.quick else SECONDS
    seeds = SEEDS[:1] if options.quick else SEEDS
    rows: dict[str, list[Row]] = {}
    masses = {name: mass(target) for name, target in targets().items()}
    for name, target in targets().items():
        rows[name] = []
        for seed in seeds:
            rows[name].append(train(target, seconds, seed))
            print(f"{name}, seed {seed}: {rows[name][-1]}", flush=True)
    publish(page(rows, masses, seconds), options.page)


if __name__ == "__main__":
    main()

"""How often the estimated coupling gap lies within two of its standard errors of the truth.

    python -m benchmarks.flows.gap_coverage [--seeds 10] [--samples 20000] [--quick]
        [--page docs/results/gap_coverage.md]

Every run is a line of a file under out/ and is not repeated: a stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.shared.records import Record, run_once
from benchmarks.shared.tables import report, table, with_error
from normflows_injective.diagnostics import CouplingGap, coupling_gap

MEAN = torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64)
MIXING = torch.eye(4, dtype=torch.float64) + 0.4 * torch.randn(
    4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64
)
RADIUS, DEGREES = 1.3, 5


def _normal(count: int, dim: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, dim, generator=generator, dtype=torch.float64)


def gaussian(count: int, generator: torch.Generator) -> Tensor:
    """Neither centred nor white, in four dimensions."""
    return _normal(count, 4, generator) @ MIXING.T + MEAN


def gaussian_gap(rotation: Tensor) -> float:
    """By conditional means and variances of two coordinates given the other two."""
    covariance, centre = rotation @ MIXING @ MIXING.T @ rotation.T, rotation @ MEAN
    cross, own = covariance[2:, :2], covariance[:2, :2]
    explained = (cross @ torch.linalg.inv(own) @ cross.T).diagonal()
    variance = covariance.diagonal()[2:] - explained
    return float(0.5 * (centre[2:].square() + explained + variance - 1 - variance.log()).sum())


def circle(count: int, generator: torch.Generator) -> Tensor:
    """Uniform on a circle."""
    angle = 2 * math.pi * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    return RADIUS * torch.cat([angle.cos(), angle.sin()], dim=1)


def student(dim: int, scale: float, count: int, generator: torch.Generator) -> Tensor:
    """Spherical Student-t."""
    chi = _normal(count, DEGREES, generator).square().sum(1, keepdim=True)
    return scale * _normal(count, dim, generator) / (chi / DEGREES).sqrt()


def student_gap(dim: int, scale: float) -> float:
    r"""By quadrature over the squared length of the k coordinates b that are given.

    The variance given b is scale^2 (nu + |b|^2) / (nu + k - 2), and |b|^2 / nu over 1 + |b|^2 / nu
    has a beta law, which is averaged over its quantiles.
    """
    from scipy.stats import beta

    num_given, num_free = dim // 2, dim - dim // 2
    shares = beta(num_given / 2, DEGREES / 2).ppf((torch.arange(200_000) + 0.5).numpy() / 200_000)
    lengths = DEGREES * torch.as_tensor(shares / (1 - shares))
    variance = scale**2 * (DEGREES + lengths) / (DEGREES + num_given - 2)
    mean = scale**2 * DEGREES / (DEGREES - 2)
    return float(0.5 * num_free * (mean - 1 - variance.log().mean()))


def gaussian_moments(b: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Conditional mean and variance of two coordinates given two others."""
    covariance, centre = rotation @ MIXING @ MIXING.T @ rotation.T, rotation @ MEAN
    weight = covariance[2:, :2] @ torch.linalg.inv(covariance[:2, :2])
    mean = centre[2:] + (b - centre[:2]) @ weight.T
    return mean, (covariance[2:, 2:] - weight @ covariance[:2, 2:]).diagonal().expand_as(mean)


def student_moments(dim: int, scale: float, b: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """Mean zero, and a variance that grows with the coordinates that are given."""
    num_given = dim // 2
    lengths = (b / scale).square().sum(1, keepdim=True)
    variance = scale**2 * (DEGREES + lengths) / (DEGREES + num_given - 2)
    variance = variance.expand(-1, dim - num_given)
    return torch.zeros_like(variance), variance


def circle_moments(b: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """Two points of opposite sign."""
    return torch.zeros_like(b), RADIUS**2 - b.square()


def normal_moments(b: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """Mean zero and variance one, which a perfect model leaves."""
    return torch.zeros_like(b), torch.ones_like(b)


Draw = Callable[[int, torch.Generator], Tensor]
WHITE = math.sqrt((DEGREES - 2) / DEGREES)


class Target(NamedTuple):
    """A law, its gap given the rotation, and its conditional moments given b and the rotation."""

    draw: Draw
    gap: Callable[[Tensor], float]
    moments: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


TARGETS: dict[str, Target] = {
    "Gaussian, D = 4": Target(gaussian, gaussian_gap, gaussian_moments),
    "circle of radius 1.3": Target(
        circle,
        lambda _: RADIUS**2 / 4 - 0.5 - math.log(RADIUS) + math.log(2),
        circle_moments,
    ),
    "Student-t, 5 degrees, D = 2": Target(
        functools.partial(student, 2, 1.0),
        lambda _: student_gap(2, 1.0),
        functools.partial(student_moments, 2, 1.0),
    ),
    "the same, unit variance, D = 6": Target(
        functools.partial(student, 6, WHITE),
        lambda _: student_gap(6, WHITE),
        functools.partial(student_moments, 6, WHITE),
    ),
    "standard normal, D = 6": Target(
        lambda count, source: _normal(count, 6, source), lambda _: 0.0, normal_moments
    ),
}


def known(z: Tensor, rotation: Tensor, target: Target) -> float:
    """The gain on the same samples of a block that knows the true moments."""
    num_given = z.shape[1] // 2
    b, a = (z @ rotation.T).split((num_given, z.shape[1] - num_given), dim=1)
    mean, variance = target.moments(b, rotation)
    gains = 0.5 * (a.square() - (a - mean).square() / variance - variance.log())
    return float(gains.sum(1).mean())


def measure(name: str, count: int, seed: int) -> Record:
    """The gap at one random rotation, and the true one."""
    target = TARGETS[name]
    z = target.draw(count, torch.Generator().manual_seed(2000 + seed))
    start = time.process_time()
    result: CouplingGap = coupling_gap(z, 1, generator=torch.Generator().manual_seed(seed))
    return {
        "gap": float(result.gap),
        "error": float(result.standard_error),
        "whitening": float(result.whitening),
        "true": target.gap(result.rotations[0]),
        "known": known(z, result.rotations[0], target),
        "seconds": time.process_time() - start,
    }


def coverage(runs: dict[str, list[Record]]) -> str:
    """The table, with a row for each target."""
    rows = []
    for name, records in runs.items():
        off = [record["gap"] - record["true"] for record in records]
        luck = [record["known"] - record["true"] for record in records]
        lost = [record["gap"] - record["known"] for record in records]
        errors = [record["error"] for record in records]
        true = sum(record["true"] for record in records) / len(records)
        rows.append(
            (
                name,
                f"{true:.4f}",
                with_error(off, 4),
                f"{sum(errors) / len(errors):.4f}",
                _inside(off, errors),
                with_error(luck, 4),
                _inside(luck, errors),
                with_error(lost, 4),
            )
        )
    head = ("latents", "true gap", "estimate - true", "stated error", "within two")
    own = ("by true moments - true", "within two", "estimate - by true moments")
    return table((*head, *own), rows)


def _inside(off: list[float], errors: list[float]) -> str:
    inside = sum(abs(o) <= 2 * error for o, error in zip(off, errors, strict=True))
    return f"{inside} of {len(off)}"


def main() -> None:
    """Measure, print the table and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--quick", action="store_true", help="500 samples of one seed, to try it")
    parser.add_argument("--page", type=Path, help="page whose table to write")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.samples = 1, 500
    file = Path("out") / f"gap_coverage_{arguments.samples}.jsonl"
    runs = {
        name: [
            run_once(
                file,
                f"{name}|{seed}",
                functools.partial(measure, name, arguments.samples, seed),
            )
            for seed in range(arguments.seeds)
        ]
        for name in TARGETS
    }
    report({"Coverage of the coupling gap": coverage(runs)}, arguments.page)


if __name__ == "__main__":
    main()

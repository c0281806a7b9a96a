"""Cost and error of the estimated log-volume, beside the exact one.

    python -m benchmarks.exact.lanczos [--samples 32] [--page docs/results/lanczos.md]

Linear maps from d to 2d dimensions in float32, with logarithmically spaced singular values from 1
to 1/condition and random singular vectors: a hard spectrum for the quadrature, because its small
values are neither few nor gathered. The truth is the sum of the logarithms of the singular values
in float64.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.shared.tables import publish, table
from normflows_injective.volume import log_volume

DIMENSIONS = (16, 64, 256, 1024)
CONDITIONS = (1e1, 1e2, 1e3, 1e4)
PROBES = (4, 8, 16)
# The exact value is taken for fewer samples there, for the time and the memory.
FEW_SAMPLES = {1024: 8}

T = TypeVar("T")


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest storage that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., T], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> T:
        """Run an operation and look at its result."""
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def matrix_of_condition(dimension: int, condition: float) -> Tensor:
    """A float32 matrix (2d, d) with logarithmically spaced singular values."""
    generator = torch.Generator().manual_seed(0)
    draw, turn = (
        torch.randn(n, dimension, generator=generator, dtype=torch.float64)
        for n in (2 * dimension, dimension)
    )
    spectrum = torch.logspace(0, -1, dimension, base=condition, dtype=torch.float64)
    left, right = torch.linalg.qr(draw).Q, torch.linalg.qr(turn).Q
    return (left @ spectrum.diag() @ right).float()


def timed(call: Callable[[], T], repeats: int) -> tuple[T, float]:
    """The result, and the least wall-clock seconds of several calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        out = call()
        seconds.append(time.perf_counter() - start)
    return out, min(seconds)


def root_mean_square(errors: Tensor) -> float:
    """Root of the mean square."""
    return errors.double().square().mean().sqrt().item()


def two_digits(number: float) -> str:
    """A number to two significant digits, without an exponent where it is large."""
    return f"{float(f'{number:.2g}'):g}"


def accuracy_row(dimension: int, condition: float, samples: int, repeats: int) -> list[str]:
    """One row of the table of errors."""
    matrix = matrix_of_condition(dimension, condition)
    truth = torch.linalg.svdvals(matrix.double()).log().sum()
    z = torch.zeros(FEW_SAMPLES.get(dimension, samples), dimension)

    def decode(s: Tensor) -> Tensor:
        return s @ matrix.mT

    with torch.no_grad():
        exact, exact_seconds = timed(lambda: log_volume(decode, z), repeats)
    cells = [f"{truth.item():.1f}", f"{root_mean_square(exact.double() - truth):.0e}"]
    for num_probes in PROBES:
        torch.manual_seed(0)
        (volume, error), seconds = timed(
            lambda k=num_probes: log_volume(decode, z, method="lanczos", num_probes=k), repeats
        )
        off, stated = root_mean_square(volume.double() - truth), root_mean_square(error)
        cells.append(" / ".join(map(two_digits, (off, stated, seconds / exact_seconds))))
    print(dimension, condition, *cells, flush=True)
    return [f"{dimension}, {condition:.0e}", *cells]


def memory_row(dimension: int) -> list[str]:
    """One row of the table of memory, for one sample of a map that holds no matrix itself."""
    z = torch.zeros(1, dimension)

    def decode(s: Tensor) -> Tensor:
        return torch.cat([s + 0.3 * s.roll(1, 1).sin(), 0.5 * s.cos()], dim=1)

    calls = (
        lambda: log_volume(decode, z),
        lambda: log_volume(decode, z, method="lanczos"),
        lambda: log_volume(decode, z, 1, method="lanczos"),
    )
    cells = []
    for call in calls:
        with LargestTensor() as largest, torch.no_grad():
            call()
        cells.append(f"{largest.bytes / 2**10:.0f}")
    return [str(dimension), *cells]


def main() -> None:
    """Measure, print the page and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dims", nargs="+", type=int, default=DIMENSIONS)
    parser.add_argument("--page", type=Path, help="page to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    accuracy = table(
        ["d, condition number", "log-volume", "exact: error"]
        + [f"{num_probes} probes" for num_probes in PROBES],
        [
            accuracy_row(dimension, condition, options.samples, options.repeats)
            for dimension in options.dims
            for condition in CONDITIONS
        ],
    )
    memory = table(
        ["d", "exact", "8 probes together", "8 probes, `chunk_size=1`"],
        [memory_row(dimension) for dimension in options.dims],
    )
    text = f"""# Log-volumes by stochastic Lanczos quadrature

Linear maps from d to 2d dimensions in float32 with logarithmically spaced singular values, 64
steps (d, if that is less), {options.samples} samples ({FEW_SAMPLES[1024]} at d = 1024), torch \
{torch.__version__}, by
`python -m benchmarks.exact.lanczos --page docs/results/lanczos.md`.

Per number of probes: root mean square error in nats / root mean square of the stated standard
error / time over that of the exact value, on one thread, the least of {options.repeats} runs \
each. The stated
error covers the scatter of the probes and what the steps leave out; with d probes and d steps only
rounding is left, which it does not cover. Times scatter where the machine has other work.

{accuracy}

The largest single tensor in KiB, for one sample of a nonlinear map of the same dimensions:

{memory}
"""
    publish(text, options.page)


if __name__ == "__main__":
    main()

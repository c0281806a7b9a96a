"""The cost of a training step, in units of a plain autoencoder's.

    python -m benchmarks.steps.cost [--json step_cost.json] [--page docs/results/step_cost.md]

A step is the loss and its backward pass, without an optimiser. Compared are the plain autoencoder,
the algorithm of free-form injective flows as it was published, written from its description, and
this package's ``forward_kld``, eager and compiled. Before anything is measured, the last two must
give the same gradients. A long run can be cut by --models; --merge puts the page together:

    python -m benchmarks.steps.cost --models toy tabular --json a.json
    python -m benchmarks.steps.cost --models conv --json b.json
    python -m benchmarks.steps.cost --merge a.json b.json --page docs/results/step_cost.md
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

from benchmarks.shared.figures import beside
from benchmarks.shared.tables import publish
from benchmarks.shared.timing import in_turn

from .cells import (
    AUTOENCODER,
    AUTOENCODER_COMPILED,
    BFLOAT16,
    FLOOR,
    PACKAGE,
    PACKAGE_COMPILED,
    PUBLISHED,
    Cell,
    Measured,
    merged,
    read,
    summary,
    write,
)
from .counts import bytes_for_backward, multiply_adds
from .models import (
    MODELS,
    Loss,
    Pair,
    autoencoder_loss,
    gradient_difference,
    package_loss,
    published_loss,
)
from .report import draw_figure, page

WARM_UP = 3
TOLERANCE = 1e-6

Step = Callable[[], None]


def losses_of(pair: Pair, num_probes: int, compiled: bool) -> dict[str, Loss]:
    """All variants for one number of probes."""
    plain = autoencoder_loss(pair)
    losses = {
        AUTOENCODER: plain,
        PUBLISHED: published_loss(pair, num_probes),
        PACKAGE: package_loss(pair, num_probes),
    }
    if compiled:
        losses[AUTOENCODER_COMPILED] = torch.compile(plain, fullgraph=True)
        losses[PACKAGE_COMPILED] = package_loss(pair, num_probes, compiled=True)
    return losses


def under_autocast(loss: Loss) -> Loss:
    """A loss in bfloat16 where torch deems it safe."""

    def cast(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return loss(x)

    return cast


def seconds_of(step: Step, device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds of one step, by the clock on the CPU and by events on a GPU."""
    if device.type == "cpu":
        start = clock()
        step()
        return clock() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def peak_bytes_of(step: Step, forget: Step) -> int:
    """Bytes on the GPU that a step needs at most, beyond those in use before it."""
    forget()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def warmed_up(steps: dict[str, Step], device: torch.device) -> dict[str, float]:
    """Take some steps of each, and return the seconds of the first ones of those that compile."""
    seconds = {}
    with fresh_cache():
        if any("compiled" in key for key in steps):
            # The compiler's own first steps, like a look at the processor, count for nobody.
            torch.compile(torch.sin)(torch.zeros(2, device=device))
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            if "compiled" in key:
                seconds[key] = time.perf_counter() - start
            for _ in range(WARM_UP):
                step()
    return seconds


def measure(name: str, num_probes: int, difference: float, options: argparse.Namespace) -> Cell:
    """All figures of one model with one number of probes."""
    # Earlier cells would otherwise count as recompilations of the same functions.
    torch.compiler.reset()
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    pair = MODELS[name].build().to(device)
    parameters = list(pair.parameters())
    x = torch.randn(MODELS[name].batch, *pair.data_shape, device=device)
    losses = losses_of(pair, num_probes, options.compile)
    if options.autocast:
        losses |= {key + BFLOAT16: under_autocast(loss) for key, loss in losses.items()}

    def forget() -> None:
        for parameter in parameters:
            parameter.grad = None

    def step_of(loss: Loss) -> Step:
        return lambda: loss(x).backward()

    steps = {key: step_of(loss) for key, loss in losses.items()}
    compile_seconds = warmed_up(steps, device)
    # Processor time is blind to what other processes do, but sums over threads.
    clock = time.process_time if options.threads == 1 else time.perf_counter

    def timed(step: Step) -> float:
        forget()
        return seconds_of(step, device, clock)

    seconds = in_turn(steps, options.rounds, options.seed, timed)
    eager = [key for key in steps if "compiled" not in key and BFLOAT16 not in key]
    counted = {key: multiply_adds(steps[key]) for key in eager}
    counted[FLOOR] = floor_of(pair, x, num_probes, counted[AUTOENCODER])
    on_gpu = steps if device.type == "cuda" else {}
    peaks = {key: peak_bytes_of(step, forget) for key, step in on_gpu.items()}
    kept = {key: bytes_for_backward(lambda f=f: f(x), parameters) for key, f in losses.items()}
    return Cell(name, num_probes, difference, seconds, compile_seconds, kept, peaks, counted)


def floor_of(pair: Pair, x: Tensor, num_probes: int, autoencoder: int) -> int:
    """Multiply-adds that the formula of the surrogate asks for.

    A probe takes the decoder forward once. In the encoder it takes what the autoencoder takes
    there: one product with every weight for the value, two for its derivatives, and one less at
    the first layer, because nobody asks for the gradient of the data. (One less at the last layer
    as well, because the probe is constant; that is small here, and left out.)
    """
    with torch.no_grad():
        z = pair.encoder(x)
        decoder = multiply_adds(lambda: pair.decoder(z))
    in_encoder = autoencoder - 3 * decoder
    return autoencoder + num_probes * (in_encoder + decoder)


def facts_of(options: argparse.Namespace) -> dict[str, Any]:
    """The conditions that the figures depend on, besides the models."""
    capability = torch.backends.cpu.get_cpu_capability()
    facts = {
        "torch": torch.__version__,
        "threads": options.threads,
        "device": f"CPU, {capability}",
    }
    if torch.device(options.device).type == "cuda":
        facts["device"] = torch.cuda.get_device_name(options.device)
        facts["float32 products of matrices"] = torch.get_float32_matmul_precision()
        facts["TF32 in convolutions"] = torch.backends.cudnn.allow_tf32
    return facts


def checked_cases(options: argparse.Namespace) -> list[tuple[str, int, float]]:
    """Model, number of probes and difference of the gradients, for everything to be measured.

    Raises:
        SystemExit: If the package's gradient is not that of the published algorithm.
    """
    cases = []
    for name in options.models:
        latent_dim = MODELS[name].build().latent_dim
        for num_probes in [k for k in options.probes if k <= latent_dim]:
            difference = gradient_difference(MODELS[name], num_probes, options.seed)
            if not difference <= TOLERANCE:
                raise SystemExit(
                    f"The gradients of {name} with {num_probes} probes differ by {difference:.1e} "
                    f"of the volume's gradient, more than {TOLERANCE}: nothing was measured."
                )
            cases.append((name, num_probes, difference))
    return cases


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--probes", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the raw figures")
    parser.add_argument("--merge", nargs="+", type=Path, help="measure nothing, read such files")
    parser.add_argument("--page", type=Path, help="page to write, and its figure")
    return parser.parse_args()


def main() -> None:
    """Measure, or read earlier measurements, and write page, figure and raw figures."""
    options = parsed()
    if options.merge:
        measured = merged([read(path) for path in options.merge])
    else:
        torch.set_num_threads(options.threads)
        cells = []
        for case in checked_cases(options):
            cells.append(measure(*case, options))
            print(summary(cells[-1]), flush=True)
        measured = Measured(facts_of(options), cells)
    if options.json is not None:
        write(measured, options.json)
    publish(page(measured), options.page)
    if options.page is not None:
        draw_figure(measured, beside(options.page))


if __name__ == "__main__":
    main()

"""The cost of the exact log-density, without and with its gradient, in units of a decode.

    python -m benchmarks.exact.cost [--quick] [--page docs/results/exact_cost.md]

Beside this package's `log_prob` stands the code that one would write by hand: Jacobian-vector
products of the batch with all basis vectors by `torch.func`, in forward mode, and the determinant
of the Gram matrix. Values of the two have to agree in float64 before anything is measured. Whether
their gradients agree is measured too, because the derivative of a tangent is wrong for some
functions. A second table goes through the numbers of latent dimensions of one kind of decoder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import normflows as nf
import torch
from torch import Tensor, nn

import normflows_injective as nfi
from benchmarks.shared.tables import publish, table, wrapped
from benchmarks.shared.timing import in_turn
from benchmarks.steps.models import MODELS, Pair

DECODE, OURS, BY_HAND = "decode", "`log_prob`", "by hand"
WITH_GRADIENT = " with gradient"
ROUTES = (OURS, BY_HAND, OURS + WITH_GRADIENT, BY_HAND + WITH_GRADIENT)
QUICK = ("toy", "tabular", "conv")
CHECKED, TOLERANCE = 4, 1e-8
# Decoders of the second table, and the condition number of a Jacobian at which it looks as well.
WIDTHS, DATA_DIM, ROWS = (512, 1024), 1024, 64
LATENTS, QUICK_LATENTS = (8, 16, 32, 64, 128, 256, 512), (8, 16)
PRODUCTS = "products"
CONDITION = 1e5
WARM_UP = 2

LogProb = Callable[[Tensor], Tensor]


class Cell(NamedTuple):
    """The measurements of one model.

    Attributes:
        model: Key of the model.
        difference: Of the gradients of the two log-densities in float64, relative.
        seconds: Of every round, by route.
    """

    model: str
    difference: float
    seconds: dict[str, list[float]]

    def ratios(self, route: str, unit: str = DECODE) -> list[float]:
        """Times of a unit, by default the decode, of the same round."""
        pairs = zip(self.seconds[route], self.seconds[unit], strict=True)
        return [one / other for one, other in pairs]


def package_log_prob(pair: Pair) -> LogProb:
    """This package: QR of the Jacobian."""
    base = nf.distributions.DiagGaussian(pair.latent_dim, trainable=False)
    injection = nfi.flows.FreeFormInjection(
        pair.encoder, pair.decoder, (pair.latent_dim,), pair.data_shape
    )
    like = next(pair.parameters())
    return nfi.InjectiveNormalizingFlow(base.to(like), [injection]).log_prob


def log_prob_by_hand(pair: Pair) -> LogProb:
    """Forward-mode Jacobian of the batch and determinant of its Gram matrix."""
    base = nf.distributions.DiagGaussian(pair.latent_dim, trainable=False)
    base.to(next(pair.parameters()))

    def log_prob(x: Tensor) -> Tensor:
        z = pair.encoder(x)
        return base.log_prob(z) - log_volume_by_hand(pair.decoder, z)

    return log_prob


def log_volume_by_hand(decoder: nn.Module, z: Tensor) -> Tensor:
    """Half the log-determinant of the Gram matrix of a forward-mode Jacobian."""
    push = lambda tangent: torch.func.jvp(decoder, (z,), (tangent,))[1]  # noqa: E731
    basis = torch.eye(z.shape[1], dtype=z.dtype).unsqueeze(1).expand(-1, *z.shape)
    columns = torch.func.vmap(push)(basis).flatten(2).permute(1, 2, 0)
    return torch.linalg.slogdet(columns.mT @ columns)[1] / 2


def gradient_difference(name: str, seed: int) -> float:
    """How far the gradient by hand is from the package's, in float64.

    Raises:
        SystemExit: If the values differ, so that it makes no sense to compare times.
    """
    torch.manual_seed(seed)
    pair = MODELS[name].build().to(torch.float64)
    x = torch.randn(CHECKED, *pair.data_shape, dtype=torch.float64)
    ours, by_hand = (make(pair)(x) for make in (package_log_prob, log_prob_by_hand))
    worst = float((ours - by_hand).detach().abs().max())
    if not worst <= TOLERANCE:
        raise SystemExit(
            f"The log-densities of {name} differ by {worst:.1e}: nothing was measured."
        )
    parameters = list(pair.parameters())
    first, second = (
        torch.cat(
            [
                part.flatten()
                for part in torch.autograd.grad(value.sum(), parameters, materialize_grads=True)
            ]
        )
        for value in (ours, by_hand)
    )
    return float((first - second).norm() / first.norm())


def measure(name: str, options: argparse.Namespace) -> Cell:
    """All figures of one model."""
    difference = gradient_difference(name, options.seed)
    torch.manual_seed(options.seed)
    pair = MODELS[name].build()
    parameters = list(pair.parameters())
    x = torch.randn(options.batch, *pair.data_shape)
    with torch.no_grad():
        z = pair.encoder(x)

    def value_of(log_prob: LogProb, at: Tensor) -> Callable[[], object]:
        return torch.no_grad()(lambda: log_prob(at))

    def gradient_of(log_prob: LogProb) -> Callable[[], object]:
        return lambda: torch.autograd.grad(log_prob(x).sum(), parameters, materialize_grads=True)

    ours, by_hand = package_log_prob(pair), log_prob_by_hand(pair)
    calls = {
        DECODE: value_of(pair.decoder, z),
        OURS: value_of(ours, x),
        BY_HAND: value_of(by_hand, x),
        OURS + WITH_GRADIENT: gradient_of(ours),
        BY_HAND + WITH_GRADIENT: gradient_of(by_hand),
    }
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    return Cell(name, difference, in_turn(calls, options.rounds, options.seed))


def ratios(cells: list[Cell]) -> str:
    """A table of medians and quartiles of the ratios."""
    rows = []
    for cell in cells:
        pair = MODELS[cell.model].build()
        row = [MODELS[cell.model].title, str(pair.latent_dim)]
        row.append(f"{1000 * median(cell.seconds[DECODE]):.3g}")
        for route in ROUTES:
            row.append(_spread(cell.ratios(route), digits=1))
        rows.append([*row, f"{cell.difference:.0e}"])
    return table(["model", "d", "decode, ms", *ROUTES, "difference of gradients"], rows)


def wide_pair(latent_dim: int) -> Pair:
    """Perceptrons between d and 1024 dimensions."""
    decoder = nfi.nets.SmoothMLP(latent_dim, DATA_DIM, WIDTHS)
    encoder = nfi.nets.SmoothMLP(DATA_DIM, latent_dim, WIDTHS[::-1])
    return Pair(encoder, decoder, (DATA_DIM,), latent_dim)


def measure_dimension(latent_dim: int, options: argparse.Namespace) -> list[str]:
    """A row of the second table."""
    torch.manual_seed(options.seed)
    pair = wide_pair(latent_dim)
    x, latents = torch.randn(ROWS, DATA_DIM), torch.randn(ROWS * latent_dim, latent_dim)
    ours, by_hand = package_log_prob(pair), log_prob_by_hand(pair)
    calls: dict[str, Callable[[], object]] = {
        OURS: lambda: ours(x),
        BY_HAND: lambda: by_hand(x),
        PRODUCTS: lambda: pair.decoder(latents),
    }
    with torch.no_grad():
        for call in calls.values():
            call()
        seconds = in_turn(calls, options.rounds, options.seed)
        errors = errors_of_volumes(pair.decoder, latents[:CHECKED].clone())
    cell = Cell(str(latent_dim), 0.0, seconds)
    row = [str(latent_dim)]
    row += [f"{ROWS / median(seconds[route]):,.0f}" for route in (OURS, BY_HAND)]
    row += [_spread(cell.ratios(BY_HAND, OURS)), _spread(cell.ratios(OURS, PRODUCTS))]
    return row + [f"{error:.0e}" for error in errors]


def errors_of_volumes(decoder: nn.Module, z: Tensor) -> list[float]:
    """The largest errors of log-volumes in float32, of latents that matter less and less."""
    first = next(module for module in decoder.modules() if isinstance(module, nn.Linear))
    # In other directions than the axes: scales of columns do a Gram matrix no harm.
    turn = torch.linalg.qr(torch.randn(z.shape[1], z.shape[1])).Q
    scales = torch.logspace(0, -1, z.shape[1], base=CONDITION)
    first.weight.copy_(first.weight @ (turn * scales) @ turn.T)
    found = nfi.volume.log_volume(decoder, z), log_volume_by_hand(decoder, z)
    matrix = nfi.volume.jacobian(decoder.double(), z.double()).jacobian
    truth = torch.linalg.svdvals(matrix).log().sum(1)
    return [float((volume - truth).abs().max()) for volume in found]


def _spread(ratios: list[float], digits: int = 2) -> str:
    """The median, and in brackets the quartiles."""
    first, middle, third = (
        f"{value:.{digits}f}" for value in quantiles(ratios, n=4, method="inclusive")
    )
    return f"{middle} ({first} to {third})"


def page(cells: list[Cell], growth: list[list[str]], options: argparse.Namespace) -> str:
    """The page of results."""
    text = (
        "Processor time of the exact `log_prob` of models without a latent flow, in times of one "
        "decode of the same batch, without gradients and with those of all parameters. *By hand* "
        "is the Jacobian by `vmap` over `torch.func.jvp` with the determinant of the Gram matrix, "
        "and its gradient goes backward through the tangents. Both values agree to "
        f"{TOLERANCE:.0e} in float64; the last column says how far the gradients are apart, "
        "relative to their norm. Without gradients this package takes the Gram matrix in float64, "
        "measures the error of its Cholesky factor, and takes QR where that is too large. "
        "Gradients are by reverse mode alone, whose derivatives are right for more functions. "
        f"Conditions: torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one "
        f"thread, float32, batches of {options.batch}, {options.rounds} rounds in random order in "
        "one process: the median of the ratios within a round, and in brackets their quartiles."
    )
    command = "    python -m benchmarks.exact.cost --page docs/results/exact_cost.md"
    by_dimension = (
        f"Decoders of {WIDTHS} hidden units to {DATA_DIM} dimensions, batches of {ROWS}, without "
        "gradients. *Products* are the least that an exact density takes: one pass of the "
        f"decoder over {ROWS} d latents. The last two columns are of the same decoders with their "
        f"latents scaled by factors from 1 to {1 / CONDITION:.0e} along turned axes: the largest "
        f"error of {CHECKED} log-volumes in float32, in nats, beside singular values in float64."
    )
    title = ["d", "`log_prob`, rows/s", "by hand, rows/s", "time by hand / `log_prob`"]
    title += ["`log_prob` / products", "error, `log_volume`", "error, by hand"]
    parts = (
        "# What the exact log-density costs",
        command,
        wrapped(text),
        ratios(cells),
        "## By the number of latent dimensions",
        wrapped(by_dimension),
        table(title, growth),
    )
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Measure every model, print the page and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=None)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--quick", action="store_true", help="three models, few samples and rounds"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path, help="page to write")
    options = parser.parse_args()
    if options.quick:
        options.batch, options.rounds = 8, 5
    torch.set_num_threads(1)
    names = options.models or (QUICK if options.quick else list(MODELS))
    growth = [
        measure_dimension(latent_dim, options)
        for latent_dim in (QUICK_LATENTS if options.quick else LATENTS)
    ]
    text = page([measure(name, options) for name in names], growth, options)
    publish(text, options.page)


if __name__ == "__main__":
    main()

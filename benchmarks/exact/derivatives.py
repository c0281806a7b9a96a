"""Which derivatives of torch's functions are right, and those of the package's log-volumes.

    PYTHONPATH=tests python -m benchmarks.exact.derivatives [--page docs/results/derivatives.md]

The functions are those of `tests/support/differentiable_functions.py`, each inside a decoder of
mixed latents in float64. Torch gives products with the decoder's Jacobian, in forward and in
reverse mode, and their first and second derivatives by a weight; the package gives `log_volume`,
with its first and second derivatives. Central differences of the function judge the Jacobian, and
central differences of each result judge its derivative.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from support.dense import numerical_jacobian
from support.derivative_oracles import (
    OF_SLOPES,
    OF_VALUES,
    Decoder,
    Differences,
    draw,
    slope_along,
    value_and_slope,
)
from support.differentiable_functions import FUNCTIONS
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.shared.tables import publish, table, wrapped
from normflows_injective.errors import UnsupportedLayerError
from normflows_injective.volume import log_volume

TOLERANCES = (1e-6, 1e-5, 1e-4)  # of a value, its first and its second derivative
RIGHT, WRONG, RAISES, REFUSED = "right", "wrong", "raises", "refused by name"
SKIPPED = "-"
ROADS = ("forward product", "reverse product", "`log_volume`")
COLUMNS = [name for road in ROADS for name in (road, "its derivative", "its second")]

OfWeight = Callable[[Tensor], Tensor]
Road = Callable[[Decoder, Tensor], Tensor]


class Route(NamedTuple):
    """A number per sample as a function of the weight, and its true value."""

    value_of: OfWeight
    expected: Tensor


class Row(NamedTuple):
    """The verdicts on one function by three roads, each up to the first that is not right."""

    name: str
    forward: tuple[str, ...]
    reverse: tuple[str, ...]
    package: tuple[str, ...]

    def cells(self) -> list[str]:
        """Three verdicts of each road."""
        roads = (self.forward, self.reverse, self.package)
        return [cell for road in roads for cell in (*road, *[SKIPPED] * (3 - len(road)))]

    def right_everywhere(self) -> bool:
        """Whether every verdict is that it is right."""
        return all(cell == RIGHT for cell in self.cells())


def direction_in(events: Tensor) -> Tensor:
    """A vector without symmetries that a function might cancel, for every sample of (B, n)."""
    return (1 + torch.arange(events.shape[1], dtype=events.dtype).cos() / 2).expand_as(events)


def forward_product(decode: Decoder, z: Tensor) -> Tensor:
    r"""The number $u^\top J v$ (B,) of every sample, by torch's forward mode."""
    pushed = torch.func.jvp(decode, (z,), (direction_in(z),))[1]
    return (pushed * direction_in(pushed)).sum(1)


def reverse_product(decode: Decoder, z: Tensor) -> Tensor:
    """The number (B,) of `forward_product` by torch's reverse mode."""
    with torch.enable_grad():
        leaf = z.clone().requires_grad_()
        value = decode(leaf)
        (pulled,) = torch.autograd.grad(value, leaf, direction_in(value), create_graph=True)
        return (pulled * direction_in(z)).sum(1)


def verdicts(route: Route, weight: Tensor, direction: Tensor) -> Iterator[str]:
    """Whether the value of a route, its first and its second derivative are right, until not."""
    of_value, of_slope, of_curvature = TOLERANCES
    with torch.no_grad():
        yield verdict(route.value_of(weight), route.expected, of_value)
    differences = Differences(value_and_slope(route.value_of, direction), weight, direction)
    leaf = weight.clone().requires_grad_()
    slope = slope_along(route.value_of(leaf), leaf, direction, create_graph=True)
    value = slope.detach()
    yield verdict(value, differences.expected(value, OF_VALUES, of_slope), of_slope)
    curvature = slope_along(slope, leaf, direction, create_graph=False)
    expected = differences.expected(curvature, OF_SLOPES, of_curvature)
    yield verdict(curvature, expected, of_curvature)


def verdict(value: Tensor, expected: Tensor, tolerance: float) -> str:
    """Whether two tensors agree."""
    close = torch.allclose(value, expected, rtol=tolerance, atol=tolerance)
    return RIGHT if close else WRONG


def judged(remaining: Iterable[str]) -> tuple[str, ...]:
    """Verdicts up to the first that is not right."""
    results = []
    try:
        for result in remaining:
            results.append(result)
            if result == WRONG:
                return tuple(results)
    except UnsupportedLayerError:
        results.append(REFUSED)
    except (RuntimeError, ValueError):
        results.append(RAISES)
    return tuple(results)


def row_of(name: str) -> Row:
    """All verdicts on one function."""
    z, weight, direction = draw()

    def verdicts_on(road: Road, expected: Tensor) -> tuple[str, ...]:
        route = Route(lambda w: road(Decoder(FUNCTIONS[name], w), z), expected)
        return judged(verdicts(route, weight, direction))

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
        dense = numerical_jacobian(Decoder(FUNCTIONS[name], weight), z)
        columns = direction_in(dense[:, :, 0]).unsqueeze(2) * dense
        product = (columns.sum(1) * direction_in(z)).sum(1)
        forward = verdicts_on(forward_product, product)
        reverse = verdicts_on(reverse_product, product)
    expected = torch.linalg.svdvals(dense).log().sum(1)
    return Row(name, forward, reverse, verdicts_on(log_volume, expected))


def page(rows: list[Row]) -> str:
    """The page of results."""
    listed = [row for row in rows if not row.right_everywhere()]
    cells = [[f"`{row.name}`", *row.cells()] for row in listed]
    if len(listed) < len(rows):
        cells = [[f"{len(rows) - len(listed)} others", *[RIGHT] * len(COLUMNS)], *cells]
    value, first, second = (f"{tolerance:.0e}" for tolerance in TOLERANCES)
    sections = [
        "# Derivatives of torch's functions",
        f"    {_COMMAND}",
        wrapped(
            f"Each of {len(rows)} functions of torch {torch.__version__} stands in a decoder "
            "$g(z) = (f(z W), z)$ from 2 dimensions, in float64 on the CPU. Torch alone gives the "
            "product $u^\\top g'(z) v$, in forward mode and in reverse mode, and its first and "
            "second derivative by $W$: a log-volume, its gradient and the derivative of that need "
            "them. The package gives `log_volume` and its derivatives. They are *right* if they "
            "equal an independent result: the product and the singular values of the function's "
            "central differences, and for a derivative the central difference of the result one "
            "column to the left. The bounds, relative and absolute, are "
            f"{value} for values, {first} for first and {second} for second derivatives. Each "
            "of the three roads of a row ends at its first entry that is not *right*. *Raises* is "
            "an error of torch, *refused by name* the package's `UnsupportedLayerError`."
        ),
        wrapped(_summary(rows)),
        table(["function", *COLUMNS], cells, 1 + len(COLUMNS)),
    ]
    return "\n\n".join(sections) + "\n"


_COMMAND = (
    "PYTHONPATH=tests python -m benchmarks.exact.derivatives --page docs/results/derivatives.md"
)


def _summary(rows: list[Row]) -> str:
    wrong = [
        sum(WRONG in road for road in roads)
        for roads in zip(*((row.forward, row.reverse, row.package) for row in rows), strict=True)
    ]
    orders = Counter(_order(row.package) for row in rows)
    return (
        f"Torch gives a wrong derivative without a word for {wrong[0]} functions in forward mode "
        f"and for {wrong[1]} in reverse mode; the package gives one for {wrong[2]}. The package's "
        f"log-volumes have two right derivatives for {orders[3]} functions, one for {orders[2]}, "
        f"and none for {orders[1]}. They do not exist for {orders[0]}."
    )


def _order(verdicts: tuple[str, ...]) -> int:
    """How many verdicts are right before one is not."""
    return next((at for at, one in enumerate(verdicts) if one != RIGHT), len(verdicts))


def main() -> None:
    """Judge every function, print the page and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--functions", nargs="+", choices=list(FUNCTIONS), default=list(FUNCTIONS))
    parser.add_argument("--page", type=Path, help="page to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on functions that it means to drop
        rows = [row_of(name) for name in options.functions]
    publish(page(rows), options.page)
    print(f"{time.process_time() - start:.0f} seconds of processor time")


if __name__ == "__main__":
    main()

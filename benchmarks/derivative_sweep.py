"""Which derivatives of torch's functions are right, and what the package makes of them.

    PYTHONPATH=tests python benchmarks/derivative_sweep.py [--out docs/results/derivatives.md]

The functions are those of `tests/support/differentiable_functions.py`, each inside a decoder of
mixed latents in float64. The sweep looks at torch's products with the decoder's Jacobian, in
forward and in reverse mode, and at their first and second derivatives by a weight; then at the
package's `log_volume` with its first and second derivatives. The judge of a derivative is the
central difference of the function that it differentiates.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from derivative_page import RAISES, REFUSED, RIGHT, WRONG, Row, page
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

from normflows_injective.errors import UnsupportedLayerError
from normflows_injective.volume import log_volume

TOLERANCES = (1e-6, 1e-5, 1e-4)  # of a value, its first and its second derivative

OfWeight = Callable[[Tensor], Tensor]
Road = Callable[[Decoder, Tensor], Tensor]


class Route(NamedTuple):
    """A way to a number per sample, as a function of the weight, and what it should give."""

    value_of: OfWeight
    expected: Tensor


def direction_in(events: Tensor) -> Tensor:
    """A vector without symmetries that a function might cancel, for every sample of (B, n)."""
    return (1 + torch.arange(events.shape[1], dtype=events.dtype).cos() / 2).expand_as(events)


def forward_product(decode: Decoder, z: Tensor) -> Tensor:
    r"""The number $u^\top J v$ (B,) of every sample, by torch's forward mode."""
    pushed = torch.func.jvp(decode, (z,), (direction_in(z),))[1]
    return (pushed * direction_in(pushed)).sum(1)


def reverse_product(decode: Decoder, z: Tensor) -> Tensor:
    """The same number by torch's reverse mode."""
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
    found = slope.detach()
    yield verdict(found, differences.expected(found, OF_VALUES, of_slope), of_slope)
    curvature = slope_along(slope, leaf, direction, create_graph=False)
    expected = differences.expected(curvature, OF_SLOPES, of_curvature)
    yield verdict(curvature, expected, of_curvature)


def verdict(found: Tensor, expected: Tensor, tolerance: float) -> str:
    """Whether two tensors agree."""
    close = torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
    return RIGHT if close else WRONG


def judged(found: Iterable[str]) -> tuple[str, ...]:
    """Verdicts up to the first that is not right."""
    results = []
    try:
        for result in found:
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


def main() -> None:
    """Judge every function, and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--functions", nargs="+", choices=list(FUNCTIONS), default=list(FUNCTIONS))
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on functions that it means to drop
        rows = [row_of(name) for name in options.functions]
    text = page(rows, TOLERANCES)
    print(text)
    print(f"{time.process_time() - start:.0f} seconds of processor time")
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()

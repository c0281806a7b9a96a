"""Decoders around one function of torch, and central differences of what is computed of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from support.rowwise import WIDTH
from support.seeds import seeded_generator

__all__ = [
    "BATCH",
    "LATENT",
    "OF_SLOPES",
    "OF_VALUES",
    "Decoder",
    "Differences",
    "Draw",
    "draw",
    "slope_along",
    "value_and_slope",
]

BATCH, LATENT, STEP = 3, 2, 1e-5
# Which of the differences of :func:`value_and_slope` are meant.
OF_VALUES, OF_SLOPES = torch.eye(2, dtype=torch.float64)


class Decoder:
    """A function of mixed latents, with the latents beside it."""

    def __init__(self, function: Callable[[Tensor], Tensor], weight: Tensor) -> None:
        self.function, self.weight = function, weight

    def __call__(self, z: Tensor) -> Tensor:
        return torch.cat([self.function(z @ self.weight).flatten(1), z], 1)


class Draw(NamedTuple):
    """Latents (BATCH, LATENT), a weight of the decoder, and a direction to move the weight in."""

    z: Tensor
    weight: Tensor
    direction: Tensor


def draw() -> Draw:
    """The draw that every function is looked at with."""
    options = {"generator": seeded_generator(0), "dtype": torch.float64}
    return Draw(
        torch.randn(BATCH, LATENT, **options),
        torch.randn(LATENT, WIDTH, **options),
        torch.randn(LATENT, WIDTH, **options),
    )


class Differences:
    """Central differences of what is computed of the weight, along a direction."""

    def __init__(
        self, values_of: Callable[[Tensor], Tensor], weight: Tensor, direction: Tensor
    ) -> None:
        self.values_of, self.weight, self.direction = values_of, weight, direction

    @cached_property
    def coarse(self) -> Tensor:
        """Of second order."""
        return self._of_step(STEP)

    @cached_property
    def fine(self) -> Tensor:
        """Of fourth order."""
        return (4 * self._of_step(STEP / 2) - self.coarse) / 3

    def _of_step(self, step: float) -> Tensor:
        above, below = (
            self.values_of(self.weight + sign * step * self.direction) for sign in (1, -1)
        )
        return (above - below) / (2 * step)

    def expected(self, found: Tensor, factors: Tensor, rtol: float) -> Tensor:
        """The sum of the differences times factors, fine only if what was found is not coarse."""
        coarse = (self.coarse * factors).sum()
        if torch.allclose(found, coarse, rtol, rtol):
            return coarse
        return (self.fine * factors).sum()


def value_and_slope(
    value_of: Callable[[Tensor], Tensor], direction: Tensor
) -> Callable[[Tensor], Tensor]:
    """The sum of a value at a weight, and autograd's derivative of it along a direction."""

    def both(weight: Tensor) -> Tensor:
        leaf = weight.clone().requires_grad_()
        value = value_of(leaf)
        slope = slope_along(value, leaf, direction, create_graph=False)
        return torch.stack([value.sum().detach(), slope])

    return both


def slope_along(value: Tensor, leaf: Tensor, direction: Tensor, create_graph: bool) -> Tensor:
    """Autograd's derivative of the sum of a value along a direction of the weight."""
    if not value.requires_grad:
        return value.new_zeros(())
    (gradient,) = torch.autograd.grad(
        value.sum(), leaf, create_graph=create_graph, materialize_grads=True
    )
    return (gradient * direction).sum()

"""How labels are read off weights at the end: the nearest corner, or a draw."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ...checks import lookup
from .simplices import Simplices

__all__ = ["Mixture", "Reading", "Rounding", "reading_of"]

# Of draws for the mixture, about this share starts from corners drawn blindly, however seldom
# these are read as the labels. It bounds what one draw near such a corner can weigh.
_STRAYING = 0.05


class Reading(ABC):
    """A law of labels given logits, independent between variables."""

    @abstractmethod
    def draw(self, simplices: Simplices, v: Tensor) -> Tensor:
        """Labels (B, n) from logits (B, n, c)."""

    @abstractmethod
    def log_prob(self, simplices: Simplices, v: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities (B, n) of labels (B, n) given logits (B, n, c)."""

    @abstractmethod
    def propose(
        self, simplices: Simplices, labels: Tensor, corners: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Corners near which logits are likely to be read as given labels (B, n).

        Args:
            simplices: Where they are.
            labels: Classes (B, n).
            corners: Logits (B, n, c) of the corners of these.

        Returns:
            Classes (B, n) that are drawn, and log-probabilities (B, n, c) of all.
        """


@final
class Rounding(Reading):
    """The class of the largest weight, with certainty."""

    def draw(self, simplices: Simplices, v: Tensor) -> Tensor:
        """The nearest corners."""
        return simplices.round(v)

    def log_prob(self, simplices: Simplices, v: Tensor, labels: Tensor) -> Tensor:
        """Zero in the cell of the labels, minus infinity elsewhere."""
        inside = simplices.round(v) == labels
        return torch.zeros_like(v[..., 0]).masked_fill(~inside, -torch.inf)

    def propose(
        self, simplices: Simplices, labels: Tensor, corners: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The corners of the labels, which are the nearest ones in all of their cells."""
        return labels, one_hot(labels, simplices.max_classes).to(corners).log()


@final
class Mixture(Reading):
    """Independent draws from the weights, so that the model mixes factorising laws."""

    def draw(self, simplices: Simplices, v: Tensor) -> Tensor:
        """A class from every row of weights."""
        return _draw(simplices.weights(v))

    def log_prob(self, simplices: Simplices, v: Tensor, labels: Tensor) -> Tensor:
        """Logarithms of the weights of the labels."""
        return simplices.log_weights(v).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    def propose(
        self, simplices: Simplices, labels: Tensor, corners: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Corners as often as they are read as the labels, and all of them once in a while."""
        stray = _STRAYING / simplices.num_variables
        weights = (1 - stray) * simplices.weights(corners)
        weights = weights + stray * simplices.weights(torch.zeros_like(corners))
        return _draw(weights), weights.log()


_READINGS: dict[str, type[Rounding] | type[Mixture]] = {"rounding": Rounding, "mixture": Mixture}


def reading_of(name: str) -> Reading:
    """The reading of a name.

    Raises:
        OptionError: If it is not ``"rounding"`` or ``"mixture"``.

    Examples:
        >>> type(reading_of("mixture")).__name__
        'Mixture'
    """
    return lookup(name, _READINGS, "reading")()


def _draw(weights: Tensor) -> Tensor:
    """A class from every row of weights (B, n, c)."""
    return torch.multinomial(weights.flatten(0, 1), 1).view(weights.shape[:-1])

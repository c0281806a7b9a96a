"""How labels are read off weights at the end: the nearest corner, or a draw."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from ...errors import OptionError
from .simplices import Simplices

__all__ = ["Mixture", "Reading", "Rounding", "reading_of"]


class Reading(ABC):
    """A law of labels given logits, independent between variables."""

    @abstractmethod
    def draw(self, simplices: Simplices, v: Tensor) -> Tensor:
        """Labels (B, n) from logits (B, n, c)."""

    @abstractmethod
    def log_prob(self, simplices: Simplices, v: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities (B, n) of labels (B, n) given logits (B, n, c)."""


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


@final
class Mixture(Reading):
    """Independent draws from the weights, so that the model mixes factorising laws."""

    def draw(self, simplices: Simplices, v: Tensor) -> Tensor:
        """A class from every row of weights."""
        weights = simplices.weights(v)
        return torch.multinomial(weights.flatten(0, 1), 1).view(weights.shape[:-1])

    def log_prob(self, simplices: Simplices, v: Tensor, labels: Tensor) -> Tensor:
        """Logarithms of the weights of the labels."""
        return simplices.log_weights(v).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


_READINGS: dict[str, type[Rounding] | type[Mixture]] = {"rounding": Rounding, "mixture": Mixture}


def reading_of(name: str) -> Reading:
    """The reading of a name.

    Raises:
        OptionError: If it is not ``"rounding"`` or ``"mixture"``.

    Examples:
        >>> type(reading_of("mixture")).__name__
        'Mixture'
    """
    if name not in _READINGS:
        raise OptionError(f"reading must be one of {', '.join(_READINGS)}, got {name!r}.")
    return _READINGS[name]()

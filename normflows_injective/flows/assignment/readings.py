"""How labels are read off weights at the end: the nearest corner, or a draw."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ...checks import lookup
from .simplices import Simplices

# About this share of the mixture's draws starts from corners drawn blindly, however seldom these
# are read as the labels. It bounds the weight of one draw near such a corner.
_STRAYING = 0.05


class Reading(ABC):
    """A law of labels given logits, independent between variables."""

    @abstractmethod
    def draw(self, simplices: Simplices, v: Tensor) -> Tensor:
        """Draw labels (B, n) from logits (B, n, c)."""

    @abstractmethod
    def log_prob(self, simplices: Simplices, v: Tensor, labels: Tensor) -> Tensor:
        """Return log-probabilities (B, n) of labels (B, n) given logits (B, n, c)."""

    @abstractmethod
    def propose(
        self, simplices: Simplices, labels: Tensor, corners: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw corners (B, n) near which logits are likely to be read as given labels (B, n).

        Return their classes, and log-probabilities (B, n, c) of all classes, given the logits
        (B, n, c) of the labels' corners.
        """


@final
class Rounding(Reading):
    """The class of the largest weight, with certainty."""

    def draw(self, simplices: Simplices, v: Tensor) -> Tensor:
        """Return the nearest corners."""
        return simplices.round(v)

    def log_prob(self, simplices: Simplices, v: Tensor, labels: Tensor) -> Tensor:
        """Return zero in the cell of the labels, and minus infinity elsewhere."""
        inside = simplices.round(v) == labels
        return torch.zeros_like(v[..., 0]).masked_fill(~inside, -torch.inf)

    def propose(
        self, simplices: Simplices, labels: Tensor, corners: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the corners of the labels, which are the nearest in all of their cells."""
        return labels, one_hot(labels, simplices.max_classes).to(corners).log()


@final
class Mixture(Reading):
    """Independent draws from the weights, so that the model mixes factorising laws."""

    def draw(self, simplices: Simplices, v: Tensor) -> Tensor:
        """Draw a class from every row of weights."""
        return _draw(simplices.weights(v))

    def log_prob(self, simplices: Simplices, v: Tensor, labels: Tensor) -> Tensor:
        """Return the logarithms of the weights of the labels."""
        return simplices.log_weights(v).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    def propose(
        self, simplices: Simplices, labels: Tensor, corners: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw corners as often as they are read as the labels, and any corner now and then."""
        stray, blind = _STRAYING / simplices.num_variables, torch.zeros_like(corners)
        weights = (1 - stray) * simplices.weights(corners) + stray * simplices.weights(blind)
        return _draw(weights), weights.log()


_READINGS: dict[str, type[Rounding] | type[Mixture]] = {"rounding": Rounding, "mixture": Mixture}


def reading_of(name: str) -> Reading:
    """Return the reading of a name, or raise OptionError."""
    return lookup(name, _READINGS, "reading")()


def _draw(weights: Tensor) -> Tensor:
    """Draw a class from every row of weights (B, n, c)."""
    return torch.multinomial(weights.flatten(0, 1), 1).view(weights.shape[:-1])

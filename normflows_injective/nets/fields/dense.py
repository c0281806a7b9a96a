"""A perceptron over all variables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ..mlp import SmoothMLP
from .conditions import FieldNetwork


@final
class DenseField(FieldNetwork):
    """Multilayer perceptron over all variables and classes, for up to a few hundred variables.

    Args:
        num_variables: Number of variables n.
        num_classes: Largest number of classes c of a variable.
        hidden: Widths of the hidden layers.
        context_dim: Number of context features C; 0 for none.
        missing: Whether there is one more feature, which is one where a variable is missing.

    Raises:
        OptionError: If a number is not positive.
        ShapeError: If the features have another shape.
        ContextError: If a context is missing, superfluous or too wide.

    Examples:
        >>> DenseField(4, 3, hidden=(16,))(torch.zeros(5, 4, 3), torch.zeros(5)).shape
        torch.Size([5, 4, 3])
    """

    def __init__(
        self,
        num_variables: int,
        num_classes: int,
        hidden: Sequence[int] = (256, 256),
        context_dim: int = 0,
        missing: bool = False,
    ) -> None:
        super().__init__(num_variables, num_classes, context_dim, missing)
        width = num_variables * self.num_features + self.num_conditions
        self.hidden = tuple(hidden)
        self.layers = SmoothMLP(width, num_variables * num_classes, hidden)

    def forward(self, features: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Features (B, n, c) at times (B,), with an optional context (B, C), to (B, n, c)."""
        conditions = self.conditions(features, t, context)
        out: Tensor = self.layers(torch.cat([features.flatten(1), conditions], 1))
        return out.view(-1, self.num_variables, self.num_classes)

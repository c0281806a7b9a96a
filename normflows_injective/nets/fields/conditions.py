"""What a field is told beside its features: the time, and perhaps a context."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...checks import check_count, check_event_shape, check_same_rows
from ...errors import ShapeError
from ...host.context import expect_context
from ..joining import ContextNetwork

__all__ = ["NUM_TIME_FEATURES", "FieldNetwork", "time_features"]

_FREQUENCIES = 3
NUM_TIME_FEATURES = 2 + 2 * _FREQUENCIES


def time_features(t: Tensor) -> Tensor:
    r"""Bounded or slowly growing functions of times :math:`t \ge 0`, (B, 8).

    .. math:: \tau = \frac{t}{1 + t}, \quad \tfrac12 \log(1 + t), \quad
              \cos \pi k \tau, \ \sin \pi k \tau, \quad k = 1, 2, 3

    Args:
        t: Times of shape (B,), of a finite horizon or of an infinite one.

    Examples:
        >>> time_features(torch.zeros(1))
        tensor([[0., 0., 1., 1., 1., 0., 0., 0.]])
    """
    share = t / (1 + t)
    angles = share.unsqueeze(1) * math.pi * torch.arange(1, _FREQUENCIES + 1, device=t.device)
    return torch.cat(
        [share.unsqueeze(1), 0.5 * t.log1p().unsqueeze(1), angles.cos(), angles.sin()], 1
    )


class FieldNetwork(ContextNetwork):
    """A network of features (B, n, c), times (B,) and an optional context (B, C).

    Args:
        num_variables: Number of variables n.
        num_classes: Largest number of classes c of a variable.
        context_dim: Number of context features C; 0 for none.
        missing: Whether there is one more feature, which says that a variable is missing.

    Raises:
        OptionError: If a number is not positive.
        ShapeError: In :meth:`conditions`, if features or times have another shape.
        ContextError: In :meth:`conditions`, if a context is missing, superfluous or too wide.
    """

    def __init__(
        self, num_variables: int, num_classes: int, context_dim: int, missing: bool
    ) -> None:
        check_count(num_variables, "num_variables")
        check_count(num_classes, "num_classes, the largest of all variables,")
        super().__init__((num_variables, num_classes + missing), context_dim)
        self.num_variables, self.num_classes = num_variables, num_classes
        self.missing, self.num_features = missing, num_classes + missing
        self.num_conditions = NUM_TIME_FEATURES + context_dim

    def conditions(self, features: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """Functions of the time and the context side by side, (B, 8 + C)."""
        if tuple(features.shape[1:]) != self.input_shape:
            raise ShapeError(
                f"{type(self).__name__} was built for features of shape (B, {self.num_variables}, "
                f"{self.num_features}), got {tuple(features.shape)}. Give it the num_variables "
                "and num_classes of the model, and missing=True if the model has it."
            )
        check_event_shape(t, (), "t")
        check_same_rows(features=features, t=t)
        expect_context(context, features.shape[0], self.context_dim, type(self).__name__)
        times = time_features(t)
        return times if context is None else torch.cat([times, context.to(times.dtype)], 1)

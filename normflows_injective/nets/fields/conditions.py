"""The time and the context of the network of a field, beside its features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...checks import check_event_shape, check_same_rows
from ...errors import ShapeError
from ...host.context import expect_context
from ..joining import ContextNetwork

_FREQUENCIES = 3
_NUM_TIME_FEATURES = 2 + 2 * _FREQUENCIES


def time_features(t: Tensor) -> Tensor:
    r"""Return bounded or slowly growing functions (B, 8) of times (B,), :math:`t \ge 0`.

    .. math:: \tau = \frac{t}{1 + t}, \quad \tfrac12 \log(1 + t), \quad
              \cos \pi k \tau, \ \sin \pi k \tau, \quad k = 1, 2, 3
    """
    share = t / (1 + t)
    angles = share.unsqueeze(1) * math.pi * torch.arange(1, _FREQUENCIES + 1, device=t.device)
    return torch.cat(
        [share.unsqueeze(1), 0.5 * t.log1p().unsqueeze(1), angles.cos(), angles.sin()], 1
    )


class FieldNetwork(ContextNetwork):
    """The base of networks ``net(features, t, context)`` for fields, with all checks of arguments.

    A subclass maps features (B, n, c) at times (B,) to outputs (B, n, c). It builds on
    ``num_features``, the width of a variable's features, and ``num_conditions``, the width of
    :meth:`conditions`. Features are padded where a variable has fewer than c classes.

    Args:
        num_variables: Number of variables n.
        num_classes: Largest number of classes c of a variable.
        context_dim: Number of context features C; 0 for none.
        missing: Whether there is one more feature, which is one where a variable is missing.

    Raises:
        OptionError: If a number is not positive.
        ShapeError: In :meth:`conditions`, if features or times have another shape.
        ContextError: In :meth:`conditions`, if a context is missing, superfluous or too wide.

    Examples:
        >>> class LinearField(FieldNetwork):
        ...     def __init__(self, num_variables, num_classes):
        ...         super().__init__(num_variables, num_classes)
        ...         width = self.num_features + self.num_conditions
        ...         self.layer = torch.nn.Linear(width, num_classes)
        ...     def forward(self, features, t, context=None):
        ...         conditions = self.conditions(features, t, context).unsqueeze(1)
        ...         conditions = conditions.expand(-1, self.num_variables, -1)
        ...         return self.layer(torch.cat([features, conditions], 2))
        >>> LinearField(4, 3)(torch.zeros(5, 4, 3), torch.zeros(5)).shape
        torch.Size([5, 4, 3])
    """

    def __init__(
        self, num_variables: int, num_classes: int, context_dim: int = 0, missing: bool = False
    ) -> None:
        super().__init__((num_variables, num_classes + missing), context_dim)
        self.num_variables, self.num_classes = num_variables, num_classes
        self.missing, self.num_features = missing, num_classes + missing
        self.num_conditions = _NUM_TIME_FEATURES + context_dim

    def conditions(self, features: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """Return functions of the time (B, 8), and the context (B, C) if there is one, joined."""
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

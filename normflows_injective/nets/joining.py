"""The context of the networks of this package, concatenated to their input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import checks_arguments_of, is_readable
from ..errors import ShapeError
from ..host.context import expect_context


@checks_arguments_of
class ContextNetwork(nn.Module):
    """A network that concatenates an optional context to its input."""

    def __init_subclass__(cls) -> None:
        """Attach the check of arguments to the methods of a subclass."""
        super().__init_subclass__()
        checks_arguments_of(cls)

    def __init__(self, input_shape: tuple[int, ...], context_dim: int) -> None:
        super().__init__()
        self.input_shape = input_shape
        self.context_dim = context_dim

    @property
    def takes_context(self) -> bool:
        """Whether the network was built with context features."""
        return self.context_dim > 0

    @property
    def needs_context(self) -> bool:
        """Whether the network cannot be called without a context."""
        return self.context_dim > 0

    def join(self, features: Tensor, context: Tensor | None) -> Tensor:
        """Concatenate a context (B, C) to features (B, F, *), broadcast over further axes."""
        self._check_axes(features)
        expect_context(context, features.shape[0], self.context_dim, type(self).__name__)
        if context is None:
            return features
        context = context.to(features.dtype)
        context = context.view(*context.shape, *[1] * (features.dim() - 2))
        return torch.cat([features, context.expand(-1, -1, *features.shape[2:])], dim=1)

    def _check_axes(self, features: Tensor) -> None:
        """Raise ShapeError if axes are missing or too many, which linear layers would overlook."""
        # A vmap over single rows hides the axis of the batch.
        if features.dim() != 1 + len(self.input_shape) and is_readable(features):
            expected = ", ".join(["B", *map(str, self.input_shape)])
            raise ShapeError(
                f"{type(self).__name__} takes a batch of shape ({expected}), got one of shape "
                f"{tuple(features.shape)}. Give one row for every sample."
            )

"""How the networks of this package take a context: concatenated to their input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ContextError

__all__ = ["ContextNetwork"]


class ContextNetwork(nn.Module):
    """A network that concatenates an optional context to its input.

    Args:
        input_shape: Event shape of the input.
        context_dim: Number of context features; 0 for none.

    Raises:
        ContextError: In :meth:`join`, if a context is missing, superfluous or too wide.
    """

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
        if context is None and not self.takes_context:
            return features
        expected = (len(features), self.context_dim)
        if context is None or not self.takes_context or tuple(context.shape) != expected:
            came = "none" if context is None else f"one of shape {tuple(context.shape)}"
            wanted = f"a context of shape {expected}" if self.takes_context else "no context"
            raise ContextError(
                f"{type(self).__name__} with context_dim={self.context_dim} takes {wanted}, got "
                f"{came}. One-hot encode labels, and give one row per sample."
            )
        context = context.to(features.dtype)
        context = context.view(*context.shape, *[1] * (features.dim() - 2))
        return torch.cat([features, context.expand(-1, -1, *features.shape[2:])], dim=1)

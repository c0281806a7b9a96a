"""Event shapes: the layer that changes them, and the check that an injection raises the size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

from torch import Tensor

from ..errors import NotInjectiveError, ShapeError
from .layer import Layer


@final
class Reshape(Layer):
    """Change the event shape, keeping every number: the flatten layer that normflows lacks.

    Args:
        latent_shape: Event shape on the latent side.
        data_shape: Event shape on the data side, of the same size.

    Raises:
        ShapeError: If the sizes differ.

    Examples:
        >>> import torch
        >>> x, log_det = Reshape((4,), (1, 2, 2))(torch.zeros(3, 4))
        >>> x.shape, log_det
        (torch.Size([3, 1, 2, 2]), tensor([0., 0., 0.]))
    """

    takes_context = False

    def __init__(self, latent_shape: Sequence[int], data_shape: Sequence[int]) -> None:
        super().__init__()
        if math.prod(latent_shape) != math.prod(data_shape):
            raise ShapeError(
                f"Reshape needs shapes of the same size, got {tuple(latent_shape)} with "
                f"{math.prod(latent_shape)} elements and {tuple(data_shape)} with "
                f"{math.prod(data_shape)}."
            )
        self.latent_shape, self.data_shape = tuple(latent_shape), tuple(data_shape)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reshape latents (B, *latent_shape) to (B, *data_shape), with log_det zero."""
        return z.reshape(z.shape[0], *self.data_shape), z.new_zeros(z.shape[0])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reshape data (B, *data_shape) to (B, *latent_shape), with log_det zero."""
        return x.reshape(x.shape[0], *self.latent_shape), x.new_zeros(x.shape[0])


def check_raises_dimension(
    latent_shape: Sequence[int], data_shape: Sequence[int], name: str, advice: str = ""
) -> None:
    """Raise unless the data have more dimensions than the latents; the advice ends the message."""
    latent, data = math.prod(latent_shape), math.prod(data_shape)
    if latent >= data:
        raise NotInjectiveError(
            f"{name} must raise the dimension, got latent shape {tuple(latent_shape)} with "
            f"{latent} dimensions and data shape {tuple(data_shape)} with {data}. Use fewer "
            f"latent dimensions; for equal ones use nf.NormalizingFlow.{advice}"
        )

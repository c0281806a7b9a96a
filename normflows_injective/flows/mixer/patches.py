"""Images as tables of patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from einops import rearrange
from torch import Tensor

from ...checks import check_shape
from ...errors import OptionError, ShapeError
from ..layer import Layer


def patch_counts(image_shape: Sequence[int], patch_size: int) -> tuple[int, int]:
    r"""Numbers of patches, :math:`HW/p^2`, and of values in each, :math:`p^2` times channels."""
    try:
        channels, height, width = check_shape(image_shape, "image_shape", 3)
    except OptionError as error:
        raise ShapeError(
            "image_shape must be (channels, height, width), for instance (1, 28, 28), got "
            f"{image_shape}."
        ) from error
    if height % patch_size or width % patch_size:
        raise ShapeError(
            f"patch_size={patch_size} must divide height and width, got images of "
            f"{height}x{width}. Pad or crop the images, or take another size."
        )
    return (height // patch_size) * (width // patch_size), channels * patch_size**2


@final
class Patchify(Layer):
    r"""Tables of patches to images, a permutation of log-det zero.

    .. math:: T_{k} = (x_{c,\, hp + i,\, wp + j})_{c, i, j}, \qquad k = (h, w)

    Any layer of tables (B, S, C) may stand between two of them.

    Args:
        image_shape: Channels, height :math:`H` and width :math:`W`.
        patch_size: :math:`p`.

    Raises:
        ShapeError: If the image does not divide into such patches.

    References:
        English, Kirchler, Lippert, MixerFlow, arXiv 2310.16777.

    Examples:
        >>> import torch
        >>> patchify = Patchify((1, 2, 4), 2)
        >>> patchify.inverse(torch.arange(8.0).view(1, 1, 2, 4))[0]
        tensor([[[0., 1., 4., 5.],
                 [2., 3., 6., 7.]]])
    """

    takes_context = False

    def __init__(self, image_shape: Sequence[int], patch_size: int) -> None:
        super().__init__()
        self.latent_shape = patch_counts(image_shape, patch_size)
        self.image_shape = self.data_shape = tuple(image_shape)
        self.patch_size = patch_size
        channels, height, width = image_shape
        self._sizes = {"c": channels, "h": height // patch_size, "w": width // patch_size}
        self._sizes |= {"p": patch_size, "q": patch_size}

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tables (B, S, C) to images (B, channels, H, W), with log-det zero."""
        x: Tensor = rearrange(z, "b (h w) (c p q) -> b c (h p) (w q)", **self._sizes)
        return x, z.new_zeros(z.shape[0])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, channels, H, W) to tables (B, S, C), with log-det zero."""
        z: Tensor = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", **self._sizes)
        return z, x.new_zeros(x.shape[0])

"""Convolutional encoder and decoder with group normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import final

from torch import Tensor, nn

from ..checks import check_counts, check_shape
from ..errors import OptionError
from .joining import ContextNetwork


@final
class ConvEncoder(ContextNetwork):
    """Strided convolutions from an image to a latent vector.

    Every stage halves the image (kernel 4, stride 2, padding 1) and applies group normalisation
    and SiLU; a linear layer follows. Group normalisation keeps samples apart, which batch
    normalisation does not.

    Args:
        image_shape: Event shape (channels, height, width).
        latent_dim: Width of the output.
        channels: Channels of the stages, one for every halving.
        context_dim: Number of context features C, broadcast as channels of the input; 0 for none.

    Raises:
        OptionError: If the image is too small for this number of halvings.
        ContextError: When called, if a context is missing, superfluous or of another width.

    Examples:
        >>> import torch
        >>> ConvEncoder((1, 28, 28), 16, channels=(8, 16))(torch.ones(2, 1, 28, 28)).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        latent_dim: int,
        channels: Sequence[int] = (32, 64, 128, 256),
        context_dim: int = 0,
    ) -> None:
        image_shape, channels = _checked(image_shape, channels)
        super().__init__(image_shape, context_dim)
        self.image_shape, self.latent_dim, self.channels = image_shape, latent_dim, channels
        sizes = _halvings(image_shape, len(channels))
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise([image_shape[0] + context_dim, *channels]):
            layers += [nn.Conv2d(fan_in, fan_out, 4, 2, 1), _group_norm(fan_out), nn.SiLU()]
        self.stages = nn.Sequential(*layers, nn.Flatten())
        self.output = nn.Linear(channels[-1] * math.prod(sizes[-1]), latent_dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map images (B, channels, height, width), with an optional context (B, C), to (B, d)."""
        z: Tensor = self.output(self.stages(self.join(x, context)))
        return z


@final
class ConvDecoder(ContextNetwork):
    """Transposed convolutions from a latent vector to an image, the mirror of `ConvEncoder`.

    Args:
        image_shape: Event shape (channels, height, width) of the output.
        latent_dim: Width of the input.
        channels: Channels of the stages as given to the encoder, data side first.
        context_dim: Number of context features C concatenated to the latent; 0 for none.

    Raises:
        OptionError: If the image is too small for this number of halvings.
        ContextError: When called, if a context is missing, superfluous or of another width.

    Examples:
        >>> import torch
        >>> ConvDecoder((1, 28, 28), 16, channels=(8, 16))(torch.ones(2, 16)).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        latent_dim: int,
        channels: Sequence[int] = (32, 64, 128, 256),
        context_dim: int = 0,
    ) -> None:
        image_shape, channels = _checked(image_shape, channels)
        super().__init__((latent_dim,), context_dim)
        self.image_shape, self.latent_dim, self.channels = image_shape, latent_dim, channels
        sizes = _halvings(image_shape, len(channels))[::-1]
        widths = [*reversed(channels), image_shape[0]]
        layers: list[nn.Module] = [nn.Unflatten(1, (widths[0], *sizes[0]))]
        for (fan_in, fan_out), (half, full) in zip(pairwise(widths), pairwise(sizes), strict=True):
            # An odd size lost its last row when it was halved; output_padding puts it back.
            padding = (full[0] - 2 * half[0], full[1] - 2 * half[1])
            up = nn.ConvTranspose2d(fan_in, fan_out, 4, 2, 1, padding)
            layers += [_group_norm(fan_in), nn.SiLU(), up]
        self.input = nn.Linear(latent_dim + context_dim, widths[0] * math.prod(sizes[0]))
        self.stages = nn.Sequential(*layers)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Map latents (B, d), with an optional context (B, C), to (B, channels, height, width)."""
        x: Tensor = self.stages(self.input(self.join(z, context)))
        return x


def _checked(
    image_shape: Sequence[int], channels: Sequence[int]
) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    """Return shape and channels as plain numbers, or raise unless the shape has three axes."""
    shape = check_shape(
        image_shape,
        "image_shape",
        3,
        "(channels, height, width)",
        "Images of one channel have the shape (1, height, width), with the channels in front.",
    )
    depth, height, width = shape
    return (depth, height, width), check_counts(channels, "channels", example="(32, 64)")


def _halvings(image_shape: tuple[int, int, int], stages: int) -> list[tuple[int, int]]:
    sizes = [(image_shape[1], image_shape[2])]
    for _ in range(stages):
        height, width = sizes[-1]
        if min(height, width) < 2:
            raise OptionError(
                f"An image of {image_shape[1]}x{image_shape[2]} can be halved {len(sizes) - 1} "
                f"times, got {stages} entries in channels. Use fewer, and give image_shape as "
                "(channels, height, width)."
            )
        sizes.append((height // 2, width // 2))
    return sizes


def _group_norm(channels: int) -> nn.GroupNorm:
    # At least 16 channels a group: a group of one value, as few channels give on an image reduced
    # to one pixel, would be normalised to a constant.
    return nn.GroupNorm(math.gcd(8, max(1, channels // 16)), channels)

"""Builders of matching encoder-decoder pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from ..checks import checks_arguments
from .conv import ConvDecoder, ConvEncoder
from .mlp import ResidualMLP, SmoothMLP


class Autoencoder(NamedTuple):
    """An encoder of data (B, D) or images to latents (B, d), and a decoder back.

    Examples:
        >>> pair = mlp_autoencoder(data_dim=5, latent_dim=2, hidden=(8,))
        >>> pair.decoder.out_features
        5
    """

    encoder: nn.Module
    decoder: nn.Module


@checks_arguments
def mlp_autoencoder(
    data_dim: int, latent_dim: int, hidden: Sequence[int] = (256, 256), context_dim: int = 0
) -> Autoencoder:
    """Pair of smooth perceptrons, the decoder with the encoder's hidden widths reversed.

    Args:
        data_dim: Number of data dimensions D.
        latent_dim: Number of latent dimensions d.
        hidden: Hidden widths of the encoder.
        context_dim: Number of context features; 0 for none.

    Returns:
        :class:`Autoencoder` ``(encoder, decoder)``.

    Examples:
        >>> encoder, decoder = mlp_autoencoder(data_dim=64, latent_dim=16)
    """
    return Autoencoder(
        SmoothMLP(data_dim, latent_dim, hidden, context_dim),
        SmoothMLP(latent_dim, data_dim, tuple(reversed(hidden)), context_dim),
    )


@checks_arguments
def residual_autoencoder(
    data_dim: int,
    latent_dim: int,
    width: int = 256,
    num_blocks: int = 4,
    context_dim: int = 0,
) -> Autoencoder:
    """Pair of residual perceptrons.

    Args:
        data_dim: Number of data dimensions D.
        latent_dim: Number of latent dimensions d.
        width: Width of the blocks.
        num_blocks: Number of blocks in each network.
        context_dim: Number of context features; 0 for none.

    Returns:
        :class:`Autoencoder` ``(encoder, decoder)``.

    Examples:
        >>> encoder, decoder = residual_autoencoder(data_dim=43, latent_dim=21, num_blocks=2)
    """
    return Autoencoder(
        ResidualMLP(data_dim, latent_dim, width, num_blocks, context_dim),
        ResidualMLP(latent_dim, data_dim, width, num_blocks, context_dim),
    )


@checks_arguments
def conv_autoencoder(
    image_shape: tuple[int, int, int],
    latent_dim: int,
    channels: Sequence[int] = (32, 64, 128, 256),
    context_dim: int = 0,
) -> Autoencoder:
    """Convolutional pair between images and latent vectors.

    Args:
        image_shape: Event shape (channels, height, width).
        latent_dim: Number of latent dimensions d.
        channels: Channels of the encoder's stages, each of which halves the image.
        context_dim: Number of context features; 0 for none.

    Returns:
        :class:`Autoencoder` ``(encoder, decoder)``.

    Raises:
        OptionError: If the image is too small for this number of stages.

    Examples:
        >>> encoder, decoder = conv_autoencoder((1, 28, 28), 16, channels=(16, 32))
    """
    return Autoencoder(
        ConvEncoder(image_shape, latent_dim, channels, context_dim),
        ConvDecoder(image_shape, latent_dim, channels, context_dim),
    )

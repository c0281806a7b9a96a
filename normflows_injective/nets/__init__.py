"""Smooth networks to build encoders and decoders."""

from .conv import ConvDecoder, ConvEncoder
from .mlp import ResidualMLP, SmoothMLP
from .pairs import conv_autoencoder, mlp_autoencoder, residual_autoencoder

__all__ = [
    "ConvDecoder",
    "ConvEncoder",
    "ResidualMLP",
    "SmoothMLP",
    "conv_autoencoder",
    "mlp_autoencoder",
    "residual_autoencoder",
]

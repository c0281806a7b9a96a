"""Smooth networks to build encoders and decoders."""

from . import fields
from .conv import ConvDecoder, ConvEncoder
from .mlp import ResidualMLP, SmoothMLP
from .pairs import Autoencoder, conv_autoencoder, mlp_autoencoder, residual_autoencoder
from .principal import LinearPlusMLP, principal_autoencoder

__all__ = [
    "Autoencoder",
    "ConvDecoder",
    "ConvEncoder",
    "LinearPlusMLP",
    "ResidualMLP",
    "SmoothMLP",
    "conv_autoencoder",
    "fields",
    "mlp_autoencoder",
    "principal_autoencoder",
    "residual_autoencoder",
]


def __dir__() -> list[str]:
    return sorted(__all__)

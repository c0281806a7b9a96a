"""Networks that start as the principal components of data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from ..checks import check_count, checks_arguments
from ..errors import ShapeError
from .joining import ContextNetwork
from .mlp import SmoothMLP, start_at_zero
from .pairs import Autoencoder

# Rows from which the components are computed, and the least scale of one, in that of the first.
_MAX_ROWS = 10_000
_LEAST_SCALE = 1e-3


@final
class LinearPlusMLP(ContextNetwork):
    r"""A linear map plus a smooth perceptron, whose last layer starts at zero.

    .. math:: y = W x + b + \mathrm{MLP}(x, c)

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        hidden: Widths of the hidden layers.
        context_dim: Number of context features C, which go to the perceptron; 0 for none.

    Raises:
        OptionError: If ``in_features`` is not positive.
        ContextError: When called, if a context is missing, superfluous or of another width.

    References:
        Its use with principal components: :func:`principal_autoencoder`.

    Examples:
        >>> network, x = LinearPlusMLP(5, 2, hidden=(8,)), torch.randn(4, 5)
        >>> bool(torch.equal(network(x), network.linear(x)))
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: Sequence[int] = (256, 256),
        context_dim: int = 0,
    ) -> None:
        check_count(in_features, "in_features")
        super().__init__((in_features,), context_dim)
        self.in_features, self.out_features = in_features, out_features
        self.hidden = tuple(hidden)
        self.linear = nn.Linear(in_features, out_features)
        self.network = SmoothMLP(in_features, out_features, hidden, context_dim)
        start_at_zero(self.network.layers[-1])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map (B, in_features), with an optional context (B, C), to (B, out_features)."""
        bent: Tensor = self.network(x, context)
        return self.linear(x) + bent


@checks_arguments
@torch.no_grad()
def principal_autoencoder(
    x: Tensor, latent_dim: int, hidden: Sequence[int] = (256, 256), context_dim: int = 0
) -> Autoencoder:
    r"""Pair of networks that starts as the principal components of data, at unit scale.

    With the mean :math:`m`, the first :math:`d` components :math:`V` and their scales :math:`s`,

    .. math:: f(x) = \mathrm{diag}(s)^{-1} V^\top (x - m) + \mathrm{MLP}(x), \qquad
              g(z) = m + V\, \mathrm{diag}(s)\, z + \mathrm{MLP}(z)

    so training starts from the best linear reconstruction, and weights that are chosen by held-out
    rows are never worse there.

    Args:
        x: Data of shape :math:`(N, D)` in the units in which errors are measured.
        latent_dim: Number of latent dimensions :math:`d`, at most :math:`D`.
        hidden: Hidden widths of the encoder, reversed in the decoder.
        context_dim: Number of context features; 0 for none.

    Returns:
        :class:`Autoencoder` ``(encoder, decoder)``.

    Raises:
        ShapeError: If x has no two rows, or fewer columns than latents.

    References:
        Derived in place; Pearson, On lines and planes of closest fit, 1901.

    Examples:
        >>> x = torch.randn(50, 2) @ torch.randn(2, 6)
        >>> encoder, decoder = principal_autoencoder(x, 2, hidden=(8,))
        >>> bool(torch.allclose(decoder(encoder(x)), x, atol=1e-4))
        True
    """
    if x.dim() != 2 or x.shape[0] < 2 or x.shape[1] < latent_dim:
        raise ShapeError(
            f"x must have two rows at least and {latent_dim} columns or more, shape (N, D), got "
            f"{tuple(x.shape)}. Give the training rows, or take fewer latent dimensions."
        )
    rows = x[:: -(-len(x) // _MAX_ROWS)].double()
    mean = rows.mean(0)
    # With fewer rows than latents, directions in which the rows do not differ fill up.
    _, scales, directions = torch.linalg.svd(
        (rows - mean) / len(rows) ** 0.5, full_matrices=len(rows) < latent_dim
    )
    directions = directions[:latent_dim]
    scales = nn.functional.pad(scales, (0, latent_dim))[:latent_dim, None]
    first = float(scales[0]) if float(scales[0]) > 0 else 1.0
    scales = scales.clamp(min=_LEAST_SCALE * first)
    encoder = LinearPlusMLP(x.shape[1], latent_dim, hidden, context_dim)
    decoder = LinearPlusMLP(latent_dim, x.shape[1], tuple(reversed(hidden)), context_dim)
    encoder.linear.weight.copy_(directions / scales)
    encoder.linear.bias.copy_(-(directions / scales) @ mean)
    decoder.linear.weight.copy_((directions * scales).T)
    decoder.linear.bias.copy_(mean)
    return Autoencoder(encoder, decoder)

"""The parts of a training loss, per sample."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..errors import ShapeError

__all__ = ["LossTerms", "SurrogateTerms", "check_log_prob"]


class SurrogateTerms(NamedTuple):
    r"""What one pass of the training term gives, per sample.

    Attributes:
        z: Latents :math:`f(x)`, shape :math:`(B, *)`.
        reconstruction: :math:`g(f(x))`, shape :math:`(B, *)`.
        volume: Surrogate of the log-volume, shape :math:`(B,)`; its value means nothing, its
            gradient is added to the loss.
        reconstruction_error: :math:`\lVert x - g(f(x)) \rVert^2`, shape :math:`(B,)`.
        latent_cycle_error: :math:`\lVert z' - f(g(z')) \rVert^2` at prior samples :math:`z'`,
            shape :math:`(B,)`; zero where it was not asked for.
    """

    z: Tensor
    reconstruction: Tensor
    volume: Tensor
    reconstruction_error: Tensor
    latent_cycle_error: Tensor


class LossTerms(NamedTuple):
    r"""The parts of the training loss per sample, each of shape (B,).

    Attributes:
        log_prob_latent: Log-density of the encoded data under the latent block, in nats.
        surrogate: Surrogate of the log-volume; only its gradient means something.
        reconstruction_error: :math:`\lVert x - \hat x \rVert^2`, summed over dimensions.
        loss: The weighted sum whose mean ``forward_kld`` returns.

    Examples:
        >>> import torch
        >>> terms = LossTerms(*torch.ones(4, 3))  # as loss_terms gives them, for three samples
        >>> {name: round(float(term.mean()), 2) for name, term in terms._asdict().items()}
        {'log_prob_latent': 1.0, 'surrogate': 1.0, 'reconstruction_error': 1.0, 'loss': 1.0}
    """

    log_prob_latent: Tensor
    surrogate: Tensor
    reconstruction_error: Tensor
    loss: Tensor


def check_log_prob(log_prob: Tensor, terms: SurrogateTerms) -> None:
    """Raise unless log-densities have one value for every sample of the terms.

    Args:
        log_prob: Log-densities (B,) of the encoded data.
        terms: The terms that they are added to.

    Raises:
        ShapeError: If they have another shape, which would be broadcast.

    Examples:
        >>> import torch
        >>> check_log_prob(torch.zeros(3), SurrogateTerms(*torch.ones(5, 3)))
    """
    if log_prob.shape != terms.volume.shape:
        raise ShapeError(
            f"log_prob must have one value per sample, shape {tuple(terms.volume.shape)}, got "
            f"{tuple(log_prob.shape)}."
        )

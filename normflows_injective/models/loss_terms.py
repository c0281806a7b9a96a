"""The parts of a training loss, per sample."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import is_readable
from ..errors import DtypeError, NonFiniteError, OptionError, ShapeError


class SurrogateTerms(NamedTuple):
    r"""The terms that one pass of the training term gives, per sample.

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
        volume: The log-volume, in nats, or its surrogate, of which only the gradient means
            something. Also called ``surrogate``.
        reconstruction_error: :math:`\lVert x - \hat x \rVert^2`, summed over dimensions.
        loss: The weighted sum whose mean ``forward_kld`` returns.

    Examples:
        >>> import torch
        >>> terms = LossTerms(*torch.ones(4, 3))  # as loss_terms gives them, for three samples
        >>> {name: round(float(term.mean()), 2) for name, term in terms._asdict().items()}
        {'log_prob_latent': 1.0, 'volume': 1.0, 'reconstruction_error': 1.0, 'loss': 1.0}
    """

    log_prob_latent: Tensor
    volume: Tensor
    reconstruction_error: Tensor
    loss: Tensor

    @property
    def surrogate(self) -> Tensor:
        """The term ``volume``, by its former name."""
        return self.volume


def check_log_prob(log_prob: Tensor, terms: SurrogateTerms) -> None:
    """Raise unless log-densities have one value for every sample of the terms."""
    if log_prob.shape != terms.volume.shape:
        raise ShapeError(
            f"log_prob must have one value per sample, shape {tuple(terms.volume.shape)}, got "
            f"{tuple(log_prob.shape)}."
        )


def mean_loss(losses: Tensor, weights: Tensor | None) -> Tensor:
    r"""Mean of losses (B,), with weights :math:`\sum_i w_i \ell_i / \sum_i w_i`."""
    if weights is None:
        return losses.mean()
    weights = _checked(weights, losses)
    return (weights * losses).sum() / weights.sum()


def _checked(weights: Tensor, losses: Tensor) -> Tensor:
    if not isinstance(weights, Tensor) or weights.is_complex():
        kind = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise DtypeError(
            f"weights must be a tensor of real numbers, got {kind}. Convert them with "
            "torch.as_tensor."
        )
    if weights.shape != losses.shape:
        raise ShapeError(
            f"weights must have one value per sample, shape {tuple(losses.shape)}, got "
            f"{tuple(weights.shape)}."
        )
    weights = weights.to(losses.dtype)
    if not is_readable(weights):
        return weights
    seen = weights.detach()
    # One comparison that NaN fails as well, so that good weights are read once.
    total = torch.where(seen >= 0, seen, -torch.inf).sum()
    if 0 < float(total) < torch.inf:
        return weights
    finite = torch.isfinite(weights)
    if not bool(finite.all()):
        raise NonFiniteError(
            f"weights has {int((~finite).sum())} of {weights.numel()} values NaN or infinite. "
            "Drop these samples before the step; no parameter was changed."
        )
    if bool((weights < 0).any()):
        raise OptionError(
            f"weights must not be negative, got {float(weights.min()):.3g}. A loss with negative "
            "weights has no lower bound."
        )
    raise OptionError(
        f"weights must have a sum above zero, finite in {weights.dtype}, got "
        f"{float(weights.sum()):.3g}. Give at least one sample some weight, or scale them."
    )

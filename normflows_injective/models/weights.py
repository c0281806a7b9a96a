"""Weights of single samples in a training loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import is_readable
from ..errors import DtypeError, NonFiniteError, OptionError, ShapeError

__all__ = ["mean_loss"]


def mean_loss(losses: Tensor, weights: Tensor | None) -> Tensor:
    r"""Mean of losses, weighted if there are weights, :math:`\sum_i w_i \ell_i / \sum_i w_i`.

    Args:
        losses: One loss per sample, shape :math:`(B,)`.
        weights: :math:`w \ge 0`, shape :math:`(B,)`, or None for equal ones. Only their ratios
            count.

    Returns:
        The mean, 0-dimensional, in the dtype of the losses.

    Raises:
        DtypeError: If the weights are no tensor of numbers.
        ShapeError: If there is not one weight per sample.
        NonFiniteError: If a weight is NaN or infinite.
        OptionError: If a weight is negative, or all of them are zero.

    Examples:
        >>> mean_loss(torch.tensor([1.0, 5.0]), torch.tensor([3, 1]))
        tensor(2.)
    """
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

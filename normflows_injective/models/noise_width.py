r"""Is the noise around a learned manifold narrow enough for training?

In a direction of the manifold in which the data have variance :math:`\lambda`, with slopes a of
the decoder and f of the encoder, and :math:`\beta = 1 / 2\sigma^2`, the expected loss is

.. math:: \ell = \tfrac12 f^2 \lambda + \log a + \beta\lambda (1 - af)^2,

which has a useful stationary point :math:`af = \tfrac12 (1 + \sqrt{1 - 2 / \beta\lambda})` if and
only if :math:`\beta\lambda \ge 2`, that is :math:`\sigma \le \sqrt\lambda / 2`. Beyond it
:math:`a \to 0` wins, and the direction is lost.

The encoder surrogate knows no such limit. It puts the gradient :math:`-a` of the volume on f, and
nothing but the reconstruction moves a, so that :math:`af = 1` and :math:`a^2 = \lambda` whatever
:math:`\beta` is.
"""

from __future__ import annotations

import warnings
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..errors import CollapseWarning, ShapeError
from ..modules.precision import as_factored

SAFE, LIMIT = 0.25, 0.5
_CHECKED: WeakSet[nn.Module] = WeakSet()


def enough_rows(num_rows: int, latent_dim: int) -> bool:
    """Whether there are enough rows to tell the spread in d directions."""
    return num_rows >= max(10, 4 * latent_dim)


@torch.no_grad()
def smallest_deviation(x: Tensor, latent_dim: int) -> float:
    """Standard deviation of data (B, *) along their principal direction number d.

    It is that of the narrowest direction of a flat manifold; for a curved one it is a scale, to be
    compared with the noise to a factor.
    """
    rows = as_factored(x.detach().flatten(1))
    if not enough_rows(len(rows), latent_dim):
        raise ShapeError(
            f"The spread of a {latent_dim}-dimensional manifold needs at least "
            f"{max(10, 4 * latent_dim)} data points, got {len(rows)}."
        )
    values = torch.linalg.svdvals(rows - rows.mean(0))
    return float(values[latent_dim - 1]) / (len(rows) - 1) ** 0.5


def collapse_ratio(sigma: Tensor, x: Tensor, latent_dim: int) -> float:
    """Noise scale over the smallest standard deviation of data (B, *) along the manifold."""
    deviation = smallest_deviation(x, latent_dim)
    return float(sigma.detach()) / deviation if deviation > 0 else torch.inf


def warn_of_collapse(ratio: float, latent_dim: int) -> None:
    """Warn if the noise is wider than a quarter of the spread of the data."""
    if ratio <= SAFE:
        return
    known = (
        "above the limit 0.5, where that direction is lost for certain"
        if ratio > LIMIT
        else "where training from a random start tends to lose that direction"
    )
    warnings.warn(
        f"noise_scale is {ratio:.2g} times the standard deviation of the data along principal "
        f"direction {latent_dim}, {known}. Start with a smaller scale, at most a quarter of it, "
        "train with volume='surrogate', which has no such limit, or train a variational "
        "autoencoder and score it here.",
        CollapseWarning,
        stacklevel=2,
    )


def warn_once_of_collapse(model: nn.Module, sigma: Tensor, x: Tensor, latent_dim: int) -> None:
    """Compare noise and spread once, on the first batch (B, *) that is large enough."""
    if model in _CHECKED or not enough_rows(len(x), latent_dim):
        return
    _CHECKED.add(model)
    warn_of_collapse(collapse_ratio(sigma, x, latent_dim), latent_dim)

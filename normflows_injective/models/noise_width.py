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

__all__ = [
    "collapse_ratio",
    "enough_rows",
    "smallest_deviation",
    "warn_of_collapse",
    "warn_once_of_collapse",
]

SAFE, LIMIT = 0.25, 0.5
_CHECKED: WeakSet[nn.Module] = WeakSet()


def enough_rows(num_rows: int, latent_dim: int) -> bool:
    """Whether so many rows tell about the spread in so many directions."""
    return num_rows >= max(10, 4 * latent_dim)


@torch.no_grad()
def smallest_deviation(x: Tensor, latent_dim: int) -> float:
    """Standard deviation of data along their principal direction number d.

    Args:
        x: Data (B, *), at least 4 d of them.
        latent_dim: Dimension d of the manifold.

    Returns:
        The standard deviation. It is that of the narrowest direction of a flat manifold; of a
        curved one it is a scale, to be compared with the noise to a factor.

    Raises:
        ShapeError: If there are too few rows.

    Examples:
        >>> line = torch.linspace(-1, 1, 1001).unsqueeze(1)
        >>> round(smallest_deviation(torch.cat([line, line], 1), 1), 2)  # sqrt(2) / sqrt(3)
        0.82
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
    """Noise scale over the smallest standard deviation of data along the manifold.

    Args:
        sigma: Noise scale, shape ().
        x: Data (B, *).
        latent_dim: Dimension d of the manifold.

    Returns:
        The ratio, infinite if the data have no spread in so many directions.

    Raises:
        ShapeError: If there are too few data.

    Examples:
        >>> x = 2 * torch.eye(3)[torch.arange(12) % 3]
        >>> round(collapse_ratio(torch.tensor(0.1), x, 2), 3)
        0.083
    """
    deviation = smallest_deviation(x, latent_dim)
    return float(sigma.detach()) / deviation if deviation > 0 else torch.inf


def warn_of_collapse(ratio: float, latent_dim: int) -> None:
    """Warn if the noise is too wide.

    Args:
        ratio: What :func:`collapse_ratio` gives.
        latent_dim: Dimension d of the manifold, for the message.

    Warns:
        CollapseWarning: If the ratio is above 1/4.
    """
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
    """Compare them when a model is first trained, on the first batch that is large enough.

    Args:
        model: Model that is trained; distributions of it are built anew at every step.
        sigma: Noise scale, shape ().
        x: Data (B, *).
        latent_dim: Dimension d of the manifold.

    Warns:
        CollapseWarning: As :func:`warn_of_collapse`.
    """
    if model in _CHECKED or not enough_rows(len(x), latent_dim):
        return
    _CHECKED.add(model)
    warn_of_collapse(collapse_ratio(sigma, x, latent_dim), latent_dim)

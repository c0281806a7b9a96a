"""Normal laws of the unconstrained latents, at which guides can start."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...checks import check_finite, describe
from ...errors import OptionError, ShapeError

# Of latents, beyond which matrices of D columns take too long: variances alone are kept.
LARGEST_COVARIANCE = 256
_ADVICE = (
    "Give a mean (D,) and a covariance (D, D), or variances (D,), of the unconstrained latents."
)


class NormalFit(NamedTuple):
    """A normal law of the unconstrained latents.

    Attributes:
        mean: Mean (D,).
        covariance: Covariance (D, D), or variances (D,) alone.
        elbo: Its evidence bound in nats, NaN if it was not measured.
        error: The standard error of the bound.
        source: Where it comes from, in words.
    """

    mean: Tensor
    covariance: Tensor
    elbo: float = float("nan")
    error: float = float("nan")
    source: str = "given"

    @property
    def variances(self) -> Tensor:
        """Variances (D,)."""
        return self.covariance if self.covariance.dim() == 1 else self.covariance.diagonal()

    @property
    def root(self) -> Tensor:
        """The Cholesky factor (D, D) of the covariance, or deviations (D,)."""
        if self.covariance.dim() == 1:
            return self.covariance.sqrt()
        return torch.linalg.cholesky(self.covariance)


def as_normal_fit(pair: Any, like: Tensor) -> NormalFit:
    """A mean and a covariance or variances as a fit of latents like those given (D,)."""
    if not (isinstance(pair, tuple | list) and len(pair) == 2):
        raise OptionError(
            "warm_start must be 'pathfinder', another guide, or a mean and a covariance, got "
            f"{describe(pair)}. {_ADVICE}"
        )
    dim = len(like)
    mean, covariance = (torch.as_tensor(part).detach().to(like) for part in pair)
    if mean.shape != (dim,) or covariance.shape not in ((dim,), (dim, dim)):
        raise ShapeError(
            f"warm_start must hold a mean ({dim},) and a covariance ({dim}, {dim}), got "
            f"{tuple(mean.shape)} and {tuple(covariance.shape)}. {_ADVICE}"
        )
    check_finite(mean, "the mean of warm_start")
    check_finite(covariance, "the covariance of warm_start")
    fit = NormalFit(mean.clone(), covariance.clone())
    is_law = bool((fit.variances > 0).all())
    if covariance.dim() == 2:
        is_law &= int(torch.linalg.cholesky_ex(covariance).info) == 0
    if not is_law:
        raise OptionError(f"The covariance of warm_start is not positive definite. {_ADVICE}")
    return fit

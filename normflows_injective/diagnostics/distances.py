"""Distances between samples and data."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_batch, checks_arguments
from ..errors import ShapeError
from ..modules.precision import as_factored


@checks_arguments
def frechet_distance(samples: Tensor, reference: Tensor) -> Tensor:
    r"""Squared 2-Wasserstein distance between the Gaussian fits of two sets.

    .. math:: \lVert \mu_1 - \mu_2 \rVert^2 + \operatorname{tr} C_1 + \operatorname{tr} C_2
              - 2 \operatorname{tr} (C_1 C_2)^{1/2}

    It is the "FID-like" score of the tabular experiments. It sees two moments only: a Gaussian
    fitted by PCA scores well, so report it beside a classifier two-sample test and the
    reconstruction error.

    Args:
        samples: Shape :math:`(N, D)`.
        reference: Shape :math:`(M, D)`.

    Returns:
        The distance, a 0-dimensional float64 tensor, in squared units of the data.

    Raises:
        ShapeError: If the sets are not matrices of the same width.

    References:
        Metric of rectangular flows, arXiv 2106.01413; covariances divided by N.

    Examples:
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> frechet_distance(x, x + 3)
        tensor(9., dtype=torch.float64)
    """
    for name, batch in (("samples", samples), ("reference", reference)):
        check_batch(batch, name)
    if samples.dim() != 2 or samples.shape[1:] != reference.shape[1:]:
        raise ShapeError(
            "samples and reference must be matrices of the same width, got "
            f"{tuple(samples.shape)} and {tuple(reference.shape)}. Flatten images first."
        )
    (mean_1, cov_1), (mean_2, cov_2) = _moments(samples), _moments(reference)
    # tr (C1 C2)^(1/2) is the nuclear norm of S1 S2 for symmetric roots C = S S.
    cross = torch.linalg.svdvals(_root(cov_1) @ _root(cov_2)).sum()
    return (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    x = as_factored(x)
    centred = x - x.mean(0)
    return x.mean(0), centred.mT @ centred / len(x)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT

"""One number by which the checkpoints of a training can be compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..host.bases import base_log_prob
from ..modules.diverged import names_diverged
from ..volume.reconstruction import squared_error
from .parts import MAX_ROWS, chunks, stack_of


@names_diverged
def validation_score(model: Any, x: Tensor, context: Tensor | None = None) -> Tensor:
    r"""Exact negative log-likelihood plus weighted reconstruction error, to choose checkpoints by.

    .. math:: \frac1B \sum_b -\log p(\hat x_b) + \beta \lVert x_b - \hat x_b \rVert^2

    in standardised coordinates where ``Standardise`` stands last. Up to a constant it is the
    negative log-likelihood of a Gaussian tube of precision :math:`2 \beta` around the manifold.
    The tube spreads the density on the manifold over the :math:`D - d` directions normal to it,

    .. math:: -\log p_{\text{tube}}(x) = -\log p(\hat x) + \beta \lVert x - \hat x \rVert^2
              + \tfrac{D - d}{2} \log \tfrac{\pi}{\beta},

    for distances that are small against the radii of curvature. The last term is left out: it is
    the same for all checkpoints of one :math:`\beta`. So scores are comparable within a training,
    not between values of :math:`\beta`, latent dimensions or units.

    :math:`\beta` is the final weight of the training term, whatever the step: after a warm-up,
    and for a callable without one, at the present step. Neither the mode of the model nor the
    warm-up matters, no gradient is kept, and rows go through in chunks of bounded memory.

    Args:
        model: The model.
        x: Data of shape :math:`(B, *)`, held out.
        context: One row per sample.

    Returns:
        Score, 0-dimensional, in nats. Lower is better.

    Raises:
        OptionError: If a training term of your own lacks ``final_beta``.

    References:
        Derived here; the tube of :math:`\beta` is that of probabilistic principal components.
    """
    stack = stack_of(model._check(x, "x", "data", context))
    beta = model.likelihood.final_beta()
    inner = stack.inner
    total = x.new_zeros((), dtype=torch.float64)
    with torch.no_grad():
        for few, given in chunks(x, context, MAX_ROWS):
            rows = stack.standardise(few)
            z, projection, log_volume = inner.project_with_log_volume(rows, given)
            nll = log_volume - base_log_prob(model.q0, z, given)
            error = squared_error(rows, projection)
            total += (nll.double() + beta * error.double()).sum()
    return (total / x.shape[0]).to(x.dtype)

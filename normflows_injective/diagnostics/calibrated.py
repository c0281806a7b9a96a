r"""Distances from the manifold judged by reference rows: a tube's density, and a p-value.

**The tube.** Rows near a manifold are :math:`x = \hat x + n`, with :math:`n` in the normal space,
of dimension :math:`D - d`. In these coordinates :math:`dx = \det(I - \sum_k n_k S_k)\, d\hat x\,
dn`, where :math:`d\hat x` is the manifold's own measure and :math:`S_k` are its shape operators;
the determinant is one up to terms of the order of :math:`\lvert n \rvert` over the radii of
curvature. A normal law of :math:`n` with variance :math:`\sigma^2` in every direction therefore
spreads the density on the manifold to one in the whole space,

.. math:: \log p_{\text{tube}}(x) = \log p(\hat x) - \frac{D - d}{2} \log 2 \pi \sigma^2
          - \frac{\lVert x - \hat x \rVert^2}{2 \sigma^2},

where :math:`\hat x` is the nearest point. Its likelihood is greatest at :math:`\sigma^2 =
\overline{\lVert x - \hat x \rVert^2} / (D - d)`.

**The p-value** is the rank of a row's error among those of the reference, itself counted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..modules.precision import as_factored

# Of a reconstruction that is exact, in units of the roundoff of every entry.
_ROUNDING = 16.0


def tube_variance(errors: Tensor, rows: Tensor, codimension: int) -> float:
    r"""Variance :math:`\sigma^2` of a tube from the errors (n,) of standardised rows (n, *).

    It is NaN where the errors are those of rounding, whose tube would have no width, and where
    the surface fills its space, as angles do, so that there is no tube.
    """
    mean = float(errors.double().mean())
    roundoff = _ROUNDING * torch.finfo(rows.dtype).eps
    least = roundoff**2 * float(rows.double().square().sum()) / len(rows)
    return mean / codimension if codimension and mean > least else math.nan


def tube_score(log_prob: Tensor, errors: Tensor, variance: float, codimension: int) -> Tensor:
    r"""Log-densities (B,) of a tube, of those of projections (B,) and squared distances (B,)."""
    normaliser = codimension / 2 * math.log(2 * math.pi * variance)
    score = log_prob.double() - normaliser - errors.double() / (2 * variance)
    return score.to(errors.dtype)


def rank_p_value(values: Tensor, reference: Tensor) -> Tensor:
    r"""Rank p-values :math:`(1 + \#\{i : r_i \ge v\}) / (1 + n)`, (B,), of large values (B,)."""
    count = len(reference)
    num_less = torch.searchsorted(reference.sort().values, values.contiguous())
    return as_factored(1 + count - num_less) / (1 + count)

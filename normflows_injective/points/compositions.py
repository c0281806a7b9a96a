"""Compositions, positive parts of sum one, from data with zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_positive, check_probability, checks_arguments, is_readable, numbers_of
from ..errors import OptionError, ShapeError
from .refusals import Numbers, check_same_shape, refuse_where


@checks_arguments
def compositions_without_zeros(parts: Numbers, limits: Numbers, fraction: float = 0.65) -> Tensor:
    r"""Divide parts by their sum and replace zeros below a detection limit, by multiplication.

    .. math:: r_k = \begin{cases} \delta_k & x_k = 0 \\
                    x_k (1 - \sum_{j: x_j = 0} \delta_j) & x_k > 0 \end{cases}, \qquad
              \delta_k = f \ell_k

    with :math:`x` of sum one. **Kept:** ratios of parts that are not zero, and rows without a
    zero. **Invented:** log-ratios with a replaced part, which all have the one value :math:`\log
    \delta_k`. If the true shares were uniform below the limit, it is too large by :math:`1 + \log
    f` nats on average (0.57 at the default, none at :math:`f = 1/e`), and their spread, one nat,
    is lost. A flow puts a peak on replaced values, since they are ties; read densities of rows
    without zeros, or draw the replacements at random below the limit.

    The zeros must be shares too small to be measured, not parts that cannot be there.

    Args:
        parts: Parts of shape (*, K), :math:`K \ge 2`, zero or positive, of any sum.
        limits: :math:`\ell_k > 0`, the least share, of a sum of one, that could have been
            measured: a number, or one for each part, of shape (K,).
        fraction: :math:`f` between 0 and 1; 0.65 distorts covariances least, by the authors.

    Returns:
        Compositions :math:`r` of shape (*, K), positive, of sum one.

    Raises:
        ShapeError: If there are fewer than two parts, or limits of another length.
        OffManifoldError: If a part is negative, or all of a row are zero.
        OptionError: If a limit is not positive, or the replaced parts would fill a row.
        NonFiniteError: If a value is NaN or infinite.

    References:
        Martín-Fernández, Barceló-Vidal and Pawlowsky-Glahn, Mathematical Geology 35, 2003.

    Examples:
        >>> compositions_without_zeros([[6.0, 4.0, 0.0]], limits=0.02, fraction=0.5)
        tensor([[0.5940, 0.3960, 0.0100]])
    """
    shares, _ = _shares(parts, "parts")
    check_probability(fraction, "fraction")
    bounds = numbers_of(limits, "limits").to(shares)
    if bounds.dim():
        check_same_shape(bounds.shape, shares.shape[-1:], "limits")
    if is_readable(bounds) and bool((bounds <= 0).any()):
        raise OptionError(
            f"limits must be positive shares, got {float(bounds.min()):g}. Give the least share "
            "that could have been measured, for instance 0.001."
        )
    return _replaced(shares, (fraction * bounds).expand_as(shares))


@checks_arguments
def compositions_from_counts(counts: Numbers, concentration: float = 0.5) -> Tensor:
    r"""Turn counts into compositions, and zeros into the expectations of a Dirichlet prior.

    .. math:: r_k = \begin{cases} \delta & n_k = 0 \\
                    \dfrac{n_k}{N} (1 - \sum_{j: n_j = 0} \delta) & n_k > 0 \end{cases}, \qquad
              \delta = \frac{\alpha}{N + K \alpha}, \qquad N = \sum_k n_k

    where :math:`\delta` is the posterior mean of a part without counts under the prior
    :math:`\mathrm{Dirichlet}(\alpha, \dots, \alpha)`. **Kept:** ratios of parts that were
    counted, which are those of the counts, and rows without a zero. **Invented:** log-ratios with
    a replaced part, which tell the total and the prior. With :math:`\alpha = 1/2`, three parts
    and :math:`N = 1000` the mean log-ratio of a part of expected count :math:`\lambda` is off by
    +1.68 nats at :math:`\lambda = 0.1`, -0.03 at 1 and -0.19 at 2; with :math:`\alpha = 1` by
    +2.30, +0.22 and -0.09. A flow sees rows of equal totals as ties.

    The zeros must come from small totals, not from parts that cannot be there.

    Args:
        counts: :math:`n` of shape (*, K), :math:`K \ge 2`, whole numbers of at least zero.
        concentration: :math:`\alpha > 0`, in counts: 1/2 is the prior of Jeffreys, 1 that of
            Bayes and Laplace, :math:`1 / K` that of Perks.

    Returns:
        Compositions :math:`r` of shape (*, K), positive, of sum one.

    Raises:
        ShapeError: If there are fewer than two parts.
        OffManifoldError: If a count is negative, or all of a row are zero.
        OptionError: If a count is not whole, or the concentration not positive.
        NonFiniteError: If a value is NaN or infinite.

    References:
        Martín-Fernández, Hron, Templ, Filzmoser and Palarea-Albaladejo, Statistical Modelling 15,
        2015.

    Examples:
        >>> compositions_from_counts([[6, 3, 0]])
        tensor([[0.6349, 0.3175, 0.0476]])
    """
    alpha = check_positive(concentration, "concentration")
    values = numbers_of(counts, "counts")
    shares, totals = _shares(values, "counts")
    if is_readable(values) and bool((values != values.round()).any()):
        raise OptionError(
            "counts must be whole numbers. Shares are taken by compositions_without_zeros."
        )
    return _replaced(shares, (alpha / (totals + shares.shape[-1] * alpha)).expand_as(shares))


def _shares(values: Numbers, name: str) -> tuple[Tensor, Tensor]:
    """Parts (*, K) divided by their sums, and the sums (*, 1)."""
    parts = numbers_of(values, name)
    if parts.dim() == 0 or parts.shape[-1] < 2:
        raise ShapeError(
            f"{name} must have shape (*, K) with at least two parts, got {tuple(parts.shape)}."
        )
    least = parts.detach().amin(-1)
    refuse_where(least < 0, f"{name} must not be negative", least, "Drop these rows.")
    # Divided by the largest first, since the sum may overflow.
    largest = parts.detach().amax(-1, keepdim=True)
    refuse_where(
        largest[..., 0] == 0,
        f"the sum of {name} must be positive",
        largest[..., 0],
        "A row of zeros is no composition: drop it.",
    )
    scaled = parts / largest
    sums = scaled.sum(-1, keepdim=True)
    return scaled / sums, sums * largest


def _replaced(shares: Tensor, replacements: Tensor) -> Tensor:
    """Shares (*, K) with replacements (*, K) for zeros, and the rest scaled down to sum one."""
    is_zero = shares == 0
    added = torch.where(is_zero, replacements, 0)
    left = 1 - added.sum(-1, keepdim=True)
    if is_readable(left) and bool((left <= 0).any()):
        raise OptionError(
            f"The replaced parts would fill a row, and leave {float(left.min()):.3g} of it. Give "
            "smaller limits."
        )
    return torch.where(is_zero, added, shares * left)

"""Rational-quadratic splines of an interval, with the identity outside."""

from __future__ import annotations

import math

import torch
from normflows.utils import splines
from torch import Tensor, nn

__all__ = ["UNIT_DERIVATIVE", "bounded_spline"]

# softplus of this, with the host's floor added, is a derivative of one.
UNIT_DERIVATIVE = math.log(math.expm1(1 - splines.DEFAULT_MIN_DERIVATIVE))


def bounded_spline(
    z: Tensor, rows: Tensor, derivatives: Tensor, bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    r"""Monotone spline of :math:`[-b, b]` for every element, the identity beyond.

    It is the host's, which in float32 loses most digits of its inverse where the slopes of
    neighbouring bins differ much, and then fails. In a bin of slope :math:`s`, with derivatives
    :math:`d_0, d_1` at its ends, the relative height :math:`t` of the relative place
    :math:`\theta` solves a quadratic equation whose discriminant is a sum of squares,

    .. math:: q^2 + 4 t (1 - t) s^2, \qquad q = (1 - t) d_0 - t d_1, \qquad
              \theta = \frac{2 s t}{2 s t + q + \sqrt{q^2 + 4 t (1 - t) s^2}}

    so that nothing cancels but in :math:`q + \sqrt\cdot` for negative :math:`q`, which is
    :math:`4 t (1 - t) s^2 / (\sqrt\cdot - q)`.

    Args:
        z: Elements of any shape :math:`(*)`.
        rows: Unnormalised widths and heights of the bins, :math:`(*, 2K)` or more; what stands
            behind them is not read.
        derivatives: Unnormalised derivatives at the knots, :math:`(*, K + 1)`.
        bound: :math:`b`.
        inverse: Whether the inverse of the spline is taken.

    Returns:
        The images and the logarithms of the derivatives, both :math:`(*)`.

    References:
        Durkan et al., Neural spline flows, arXiv 1906.04032.

    Examples:
        >>> z = torch.tensor([0.5, -7.0])
        >>> knots = torch.full((2, 3), UNIT_DERIVATIVE)
        >>> image, log_derivative = bounded_spline(z, torch.zeros(2, 4), knots, 3.0, False)
        >>> bool(torch.allclose(image, z)), bool(log_derivative.abs().max() < 1e-6)
        (True, True)
    """
    num_bins = derivatives.shape[-1] - 1
    # All elements go through and those outside are replaced: without boolean indices, which
    # neither vmap nor the JIT can follow.
    inside = z.abs() <= bound
    value = torch.where(inside, z, torch.zeros_like(z))
    across = _knots(rows[..., :num_bins], splines.DEFAULT_MIN_BIN_WIDTH, bound)
    along = _knots(rows[..., num_bins : 2 * num_bins], splines.DEFAULT_MIN_BIN_HEIGHT, bound)
    slopes = splines.DEFAULT_MIN_DERIVATIVE + nn.functional.softplus(derivatives)
    reached = value.unsqueeze(-1) >= (along if inverse else across)[..., 1:-1]
    index = reached.sum(-1, keepdim=True)

    def at(values: Tensor) -> Tensor:
        return values.gather(-1, index).squeeze(-1)

    left, bottom = at(across[..., :-1]), at(along[..., :-1])
    width, height = at(across.diff()), at(along.diff())
    slope, first, last = height / width, at(slopes[..., :-1]), at(slopes[..., 1:])
    if inverse:
        below = (value - bottom) / height
        above = 1 - below
        weighed = above * first - below * last
        product = 4 * below * above * slope.square()
        is_positive = weighed >= 0
        # With a gradient at zero, which abs() has not.
        larger = torch.where(is_positive, weighed, -weighed)
        larger = larger + (weighed.square() + product).sqrt()
        remainder = torch.where(is_positive, larger, product / larger)
        total = 2 * slope * below + remainder
        before, behind = 2 * slope * below / total, remainder / total
        moved = left + width * before
    else:
        before = (value - left) / width
        behind = 1 - before
    mixed = before * behind
    denominator = slope * (before.square() + behind.square()) + (first + last) * mixed
    if not inverse:
        moved = bottom + height * (slope * before.square() + first * mixed) / denominator
    numerator = last * before.square() + 2 * slope * mixed + first * behind.square()
    log_derivative = 2 * slope.log() + numerator.log() - 2 * denominator.log()
    log_derivative = -log_derivative if inverse else log_derivative
    zero = torch.zeros_like(log_derivative)
    return torch.where(inside, moved, z), torch.where(inside, log_derivative, zero)


def _knots(unnormalised: Tensor, least: float, bound: float) -> Tensor:
    """Ends of bins (*, K + 1) that divide the interval, none narrower than a share of it."""
    num_bins = unnormalised.shape[-1]
    shares = least + (1 - least * num_bins) * unnormalised.softmax(-1)
    inner = bound * (2 * shares[..., :-1].cumsum(-1) - 1)
    ends = torch.full_like(shares[..., :1], bound)
    return torch.cat([-ends, inner, ends], dim=-1)

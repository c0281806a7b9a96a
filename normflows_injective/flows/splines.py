"""Rational-quadratic splines: one bin, and whole splines of an interval."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from normflows.utils import splines
from torch import Tensor, nn

# softplus of this, with the floor that normflows adds, is a derivative of one.
UNIT_DERIVATIVE = math.log(math.expm1(1 - splines.DEFAULT_MIN_DERIVATIVE))


class Bin(NamedTuple):
    r"""The bin of every element: its corner, its sizes, and the derivatives at its two ends.

    With :math:`\theta` the relative place in the bin, :math:`s` its mean slope and
    :math:`d_0, d_1` the derivatives, the relative height is

    .. math:: t = \frac{s \theta^2 + d_0 \theta (1 - \theta)}
              {s (\theta^2 + (1 - \theta)^2) + (d_0 + d_1) \theta (1 - \theta)}
    """

    left: Tensor
    width: Tensor
    bottom: Tensor
    height: Tensor
    slope: Tensor
    first: Tensor
    last: Tensor

    def image(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Images of values in the bin, and the logarithms of the derivatives there."""
        before = (value - self.left) / self.width
        after = 1 - before
        mixed = before * after
        denominator, log_derivative = self._at(before, after, mixed)
        rise = self.slope * before.square() + self.first * mixed
        return self.bottom + self.height * rise / denominator, log_derivative

    def preimage(self, image: Tensor) -> tuple[Tensor, Tensor]:
        r"""Values with given images, and the logarithms of the derivatives of the inverse.

        The place solves a quadratic equation whose discriminant is a sum of squares,

        .. math:: \theta = \frac{2 s t}{2 s t + q + \sqrt{q^2 + 4 t (1 - t) s^2}}, \qquad
                  q = (1 - t) d_0 - t d_1

        so that nothing cancels but in :math:`q + \sqrt\cdot` for negative :math:`q`, which is
        :math:`4 t (1 - t) s^2 / (\sqrt\cdot - q)`.
        """
        below = (image - self.bottom) / self.height
        above = 1 - below
        weighted = above * self.first - below * self.last
        product = 4 * below * above * self.slope.square()
        is_positive = weighted >= 0
        # With a gradient at zero, which abs() has not.
        larger = torch.where(is_positive, weighted, -weighted)
        larger = larger + (weighted.square() + product).sqrt()
        remainder = torch.where(is_positive, larger, product / larger)
        rise = 2 * self.slope * below
        total = rise + remainder
        before, after = rise / total, remainder / total
        log_derivative = self._at(before, after, before * after)[1]
        return self.left + self.width * before, -log_derivative

    def _at(self, before: Tensor, after: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """The denominator of the relative height, and the logarithm of the derivative."""
        denominator = self.slope * (before.square() + after.square())
        denominator = denominator + (self.first + self.last) * mixed
        numerator = (
            self.last * before.square() + 2 * self.slope * mixed + self.first * after.square()
        )
        return denominator, 2 * self.slope.log() + numerator.log() - 2 * denominator.log()


def bounded_spline(
    z: Tensor, rows: Tensor, at_ends: Tensor, bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    r"""Monotone spline of :math:`[-b, b]` for every element (\*), the identity beyond.

    ``rows`` (\*, 3K - 1) are the unnormalised widths and heights of the bins and the derivatives
    at the inner knots; ``at_ends`` (\*) are those at both ends. A derivative of zero is a slope of
    one. The spline of normflows loses most digits of its inverse in float32 where slopes of
    neighbouring bins differ much, and then fails.
    """
    num_bins = (rows.shape[-1] + 1) // 3
    # With bins along the first axis sums and exponentials run over elements side by side, which
    # takes a tenth of the time that the eight numbers of a last axis take.
    rows = rows.movedim(-1, 0).contiguous()
    # All elements go through and those outside are replaced: without boolean indices, which
    # neither vmap nor the JIT can follow.
    inside = z.abs() <= bound
    value = torch.where(inside, z, 0.0)
    across, up = _inner_knots(rows[: 2 * num_bins].unflatten(0, (2, num_bins)), bound)
    index = (value >= (up if inverse else across)).sum(0)
    end, at_end = torch.full_like(z, bound).unsqueeze(0), _slopes(at_ends).unsqueeze(0)
    slopes = _slopes(rows[2 * num_bins :])
    # Both ends of the bin, with all that is known of them, in one step.
    table = torch.cat([-end, across, end, -end, up, end, at_end, slopes, at_end])
    ends = torch.stack([index, index + 1]).expand(3, 2, *index.shape)
    (left, right), (bottom, top), (first, last) = table.unflatten(0, (3, -1)).gather(1, ends)
    width, height = right - left, top - bottom
    own = Bin(left, width, bottom, height, height / width, first, last)
    image, log_derivative = own.preimage(value) if inverse else own.image(value)
    return torch.where(inside, image, z), torch.where(inside, log_derivative, 0.0)


def _inner_knots(unnormalised: Tensor, bound: float) -> Tensor:
    r"""Knots (2, K - 1, *) between the bins of both intervals, from sizes (2, K, *).

    .. math:: 2 b \sum_{j \le k} \big(\epsilon + (1 - K \epsilon) p_j\big) - b, \qquad
              p = \operatorname{softmax}

    No bin is narrower than the share :math:`\epsilon` that normflows has for widths and heights.
    """
    least, num_bins = splines.DEFAULT_MIN_BIN_WIDTH, unnormalised.shape[1]
    sums = unnormalised.softmax(1)[:, :-1].cumsum(1)
    numbers = torch.arange(1, num_bins, dtype=sums.dtype, device=sums.device)
    starts = (2 * bound * least * numbers - bound).view(-1, *[1] * (sums.dim() - 2))
    return torch.add(starts, sums, alpha=2 * bound * (1 - least * num_bins))


def _slopes(unnormalised: Tensor) -> Tensor:
    """Positive derivatives, one where a number is zero."""
    return splines.DEFAULT_MIN_DERIVATIVE + nn.functional.softplus(unnormalised + UNIT_DERIVATIVE)

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
    z: Tensor, rows: Tensor, derivatives: Tensor, bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    r"""Monotone spline of :math:`[-b, b]` for every element (\*), the identity beyond.

    ``rows`` (\*, 2K or more) starts with the unnormalised widths and heights of the bins, and
    ``derivatives`` (\*, K + 1) are those at the knots, unnormalised too. The spline of normflows
    loses most digits of its inverse in float32 where slopes of neighbouring bins differ much, and
    then fails.
    """
    num_bins = derivatives.shape[-1] - 1
    # With bins along the first axis sums and exponentials run over elements side by side, which
    # takes a tenth of the time that the eight numbers of a last axis take.
    rows, derivatives = (each.movedim(-1, 0).contiguous() for each in (rows, derivatives))
    # All elements go through and those outside are replaced: without boolean indices, which
    # neither vmap nor the JIT can follow.
    inside = z.abs() <= bound
    value = torch.where(inside, z, torch.zeros_like(z))
    knots = _knots(rows[: 2 * num_bins].unflatten(0, (2, num_bins)), bound)
    slopes = splines.DEFAULT_MIN_DERIVATIVE + nn.functional.softplus(derivatives)
    index = (value >= knots[1 if inverse else 0, 1:-1]).sum(0)
    # Both ends of the bin, with all that is known of them, in one step.
    table = torch.cat([knots, slopes.unsqueeze(0)])
    ends = torch.stack([index, index + 1]).expand(3, 2, *index.shape)
    (left, right), (bottom, top), (first, last) = table.gather(1, ends)
    width, height = right - left, top - bottom
    own = Bin(left, width, bottom, height, height / width, first, last)
    image, log_derivative = own.preimage(value) if inverse else own.image(value)
    zero = torch.zeros_like(log_derivative)
    return torch.where(inside, image, z), torch.where(inside, log_derivative, zero)


def _knots(unnormalised: Tensor, bound: float) -> Tensor:
    """Ends of bins (2, K + 1, *) that divide both intervals, none narrower than a share of them.

    normflows has the same least share for widths and heights.
    """
    least = splines.DEFAULT_MIN_BIN_WIDTH
    shares = least + (1 - least * unnormalised.shape[1]) * unnormalised.softmax(1)
    inner = bound * (2 * shares[:, :-1].cumsum(1) - 1)
    ends = torch.full_like(shares[:, :1], bound)
    return torch.cat([-ends, inner, ends], dim=1)

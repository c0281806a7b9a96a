r"""The transform of Yeo and Johnson, its inverse, and its exponent by maximum likelihood.

With :math:`m = \lambda` on the right of zero and :math:`m = 2 - \lambda` on the left it is odd,

.. math:: T(u) = \pm\frac{(1 + |u|)^m - 1}{m}, \qquad \log T'(u) = (m - 1) \log(1 + |u|),

and :math:`\pm\log(1 + |u|)` at :math:`m = 0`. Written with the logarithm
:math:`l = \log(1 + |u|)` it is :math:`\operatorname{expm1}(m l) / m`, which keeps its digits for
small :math:`m` and small :math:`u`. For :math:`0 \le \lambda \le 2` both exponents are at least
zero, and the transform is a bijection of :math:`\mathbb R` onto :math:`\mathbb R`; for others one
half of its range is bounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_VALUES = 10_000
_GOLDEN = 0.5 * (5**0.5 - 1)


def yeo_johnson(u: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    r"""The transform :math:`T(u)` and :math:`\log T'(u)`, elementwise."""
    is_right = u >= 0
    # Not abs(), whose derivative at zero is zero.
    size = torch.where(is_right, u, -u)
    exponent = torch.where(is_right, power, 2 - power)
    log_size = torch.log1p(size)
    is_log, safe = _without_zero(exponent)
    image = torch.where(is_log, log_size, torch.expm1(safe * log_size) / safe)
    return torch.where(is_right, image, -image), (exponent - 1) * log_size


def yeo_johnson_inverse(y: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    r"""The inverse :math:`u = T^{-1}(y)` and :math:`-\log T'(u)`, elementwise."""
    is_right = y >= 0
    size = torch.where(is_right, y, -y)
    exponent = torch.where(is_right, power, 2 - power)
    is_log, safe = _without_zero(exponent)
    log_size = torch.where(is_log, size, torch.log1p(safe * size) / safe)
    u = torch.expm1(log_size)
    return torch.where(is_right, u, -u), (1 - exponent) * log_size


def _without_zero(exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Where exponents are zero to all digits, and exponents with one in these places."""
    # At the root of the smallest number the next term of the series, m l / 2, is below rounding,
    # and neither m nor 1 / m overflows in second derivatives.
    is_zero = exponent.abs() < torch.finfo(exponent.dtype).tiny ** 0.5
    return is_zero, torch.where(is_zero, torch.ones_like(exponent), exponent)


def likeliest_power(ordered: Tensor) -> float:
    r"""The exponent in [0, 2] that maximises the normal likelihood of values (N,) in order.

    The profile, without constants, is :math:`-\tfrac12 \log \operatorname{var} T(u) + (\lambda -
    1)\, \overline{\operatorname{sign}(u) \log(1 + |u|)}`. Of more than 10,000 values as many
    quantiles are taken, whose exponent differs from that of all by less than its own error.
    """
    if len(ordered) > _MOST_VALUES:
        shares = (torch.arange(_MOST_VALUES, device=ordered.device) + 0.5) / _MOST_VALUES
        ordered = ordered[(shares.double() * len(ordered)).long()]
    signed_log = (ordered.sign() * torch.log1p(ordered.abs())).mean()

    def profile(power: float) -> float:
        powers = ordered.new_tensor(power)
        image, _ = yeo_johnson(ordered, powers)
        return float(-0.5 * image.var(correction=0).log() + (powers - 1) * signed_log)

    # The grid makes sure of the hill, the golden section climbs it.
    grid = [index / 10 for index in range(21)]
    best = max(grid, key=profile)
    low, high = max(0.0, best - 0.1), min(2.0, best + 0.1)
    inner = [high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)]
    heights = [profile(power) for power in inner]
    for _ in range(40):
        if heights[0] >= heights[1]:
            high = inner[1]
            inner = [high - _GOLDEN * (high - low), inner[0]]
            heights = [profile(inner[0]), heights[0]]
        else:
            low = inner[0]
            inner = [inner[1], low + _GOLDEN * (high - low)]
            heights = [heights[1], profile(inner[1])]
    # The ends of the range are values like others.
    return max((low, 0.5 * (low + high), high), key=profile)

r"""Coordinates of the simplex :math:`\{x > 0, \sum_k x_k = 1\}`, as pure functions.

Stick-breaking cuts from a stick of length one: with fractions :math:`v_i`, :math:`i < K`,

.. math:: x_i = v_i \prod_{j<i} (1 - v_j), \qquad x_K = \prod_j (1 - v_j), \qquad
          \Big|\frac{dx_{1:K-1}}{dv}\Big| = \prod_i (1 - v_i)^{e_i - 1}, \quad e_i = K - i.

Products are sums of logarithms here, :math:`1 - v_i` is never formed by a difference, and every
logarithm of a tail comes from that tail. Volumes are those of the first :math:`K - 1` parts. The
functions consist of operations that torch differentiates any number of times in both modes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid, pad
from torch.special import erfcx, log_ndtr, ndtri

from ...checks import check_finite, is_readable
from ...errors import OffManifoldError

_LOG_TWO_PI = math.log(2 * math.pi)
# Below these the left tail is 1e-9, whose square no dtype sees beside one.
_FAR_LEFT, _SMALL = -6.0, 1e-9
# exp of this is a normal number in float32 still.
_LEAST_EXPONENT = -80.0


class SimplexCoordinates(NamedTuple):
    """One kind of coordinates, as two functions and a volume."""

    # Coordinates (B, K - 1) to logarithms (B, K) of parts that sum to one.
    to_log_parts: Callable[[Tensor], Tensor]
    # Parts (B, K) that sum to one to coordinates (B, K - 1).
    from_parts: Callable[[Tensor], Tensor]
    # Coordinates and log x to log |dx_{1:K-1} / dz|, (B,) in nats.
    log_volume: Callable[[Tensor, Tensor], Tensor]


def _exponents(z: Tensor) -> Tensor:
    """The numbers e_i = K - i of parts after each of the first K - 1, for z (B, K - 1)."""
    return torch.arange(z.shape[1], 0, -1, dtype=z.dtype, device=z.device)


def _log_parts(log_sticks: Tensor, log_rests: Tensor) -> Tensor:
    """Logarithms of parts (B, K), from those of v_i and of 1 - v_i."""
    return pad(log_sticks, (0, 1)) + pad(log_rests.cumsum(1), (1, 0))


def _tails(x: Tensor) -> Tensor:
    """Sums of each part and all after it, (*, K)."""
    return x.flip(-1).cumsum(-1).flip(-1)


def _log_rests(x: Tensor) -> Tensor:
    """Logarithms of 1 - v_i, (B, K - 1), without cancellation for short and for long sticks."""
    tails = _tails(x)
    sticks, rests = x[:, :-1] / tails[:, :-1], tails[:, 1:] / tails[:, :-1]
    short = sticks < 0.5
    return torch.where(short, (-sticks.masked_fill(~short, 0.5)).log1p(), rests.log())


# Sticks of a given law under independent tails: (1 - v_i)^{e_i} = 1 - w_i, w uniform in (0, 1),
# so that (e_i)(1 - v_i)^{e_i - 1} dv_i = dw_i and |dx/dw| = prod_i 1/e_i = 1 / Gamma(K).


def _log_parts_of_tails(log_lower: Tensor, log_upper: Tensor, small: Tensor) -> Tensor:
    r"""Logarithms of parts, from :math:`\log w` and :math:`\log(1 - w)`, (B, K - 1)."""
    exponents = _exponents(log_upper)
    log_rests = log_upper / exponents
    # Where the series counts the other must not be infinite: zero times infinity is NaN.
    ordinary = (-log_rests.masked_fill(small, -1.0).expm1()).log()
    # Where w is small, log v = log w - log e + (1 - 1/e) w / 2 + O(w^2) has all digits of log w,
    # and 1 - w has none.
    series = log_lower - exponents.log() + 0.5 * (1 - 1 / exponents) * log_lower.exp()
    return _log_parts(torch.where(small, series, ordinary), log_rests)


def _normal_to_log_parts(z: Tensor) -> Tensor:
    # w = Phi(z): each tail has its own logarithm.
    small = z < _FAR_LEFT
    return _log_parts_of_tails(log_ndtr(z), log_ndtr(-z), small)


def _normal_from_parts(x: Tensor) -> Tensor:
    # The quantile is taken of the smaller one of the two tails, which has all the digits.
    log_rests = _log_rests(x)
    log_upper = log_rests * _exponents(log_rests)
    right = log_upper < -math.log(2)
    log_lower = (-log_upper.masked_fill(right, -1.0).expm1()).log()
    quantiles = _log_normal_quantile(torch.where(right, log_upper, log_lower))
    return torch.where(right, -quantiles, quantiles)


def _normal_log_volume(z: Tensor, log_parts: Tensor) -> Tensor:
    num = z.shape[1]
    return -0.5 * (z.square().sum(1) + num * _LOG_TWO_PI) - math.lgamma(num + 1)


def _log_normal_quantile(log_probability: Tensor) -> Tensor:
    r"""The :math:`z` with :math:`\log\Phi(z) = y`, for :math:`y \le -\log 2`; torch lacks it."""
    # The guess is torch's where that has digits, and z = -t with -2y = t^2 + log 2 pi + log t^2
    # further out. A Newton step doubles the digits, and the order to which derivatives by y are
    # right: from a constant guess the first step has the first derivative, the second the third.
    y = log_probability.detach()
    near = ndtri(y.clamp_min(_LEAST_EXPONENT).exp())
    square = -2 * y.clamp_max(_LEAST_EXPONENT) - _LOG_TWO_PI
    far = -(square - (square - square.log()).log()).sqrt()
    z = torch.where(y > _LEAST_EXPONENT, near, far)
    for _ in range(2):
        slope = math.sqrt(2 / math.pi) / erfcx(-z * math.sqrt(0.5))  # phi(z) / Phi(z)
        z = z - (log_ndtr(z) - log_probability) / slope
    return z


def _box_to_log_parts(w: Tensor) -> Tensor:
    _refuse_outside_box(w)
    return _log_parts_of_tails(w.log(), (-w).log1p(), w < _SMALL)


def _box_from_parts(x: Tensor) -> Tensor:
    log_rests = _log_rests(x)
    return -(log_rests * _exponents(log_rests)).expm1()


def _box_log_volume(w: Tensor, log_parts: Tensor) -> Tensor:
    return w.new_full((w.shape[0],), -math.lgamma(w.shape[1] + 1))


def _refuse_outside_box(w: Tensor) -> None:
    if not is_readable(w):
        return
    within = (w.detach() > 0) & (w.detach() < 1)  # false for NaN too
    if bool(within.all()):
        return
    check_finite(w, "z")
    outside = (~within).nonzero()
    raise OffManifoldError(
        f"z has {len(outside)} of {w.numel()} values outside (0, 1), the first at index "
        f"{outside[0].tolist()}: kind='uniform_box' maps the open unit box only. Use a base and "
        "flows on the box, or kind='normal', which takes any real number."
    )


def _logit_to_log_parts(z: Tensor) -> Tensor:
    logits = z - _exponents(z).log()
    return _log_parts(logsigmoid(logits), logsigmoid(-logits))


def _logit_from_parts(x: Tensor) -> Tensor:
    logits = x[:, :-1].log() - _tails(x)[:, 1:].log()
    return logits + _exponents(logits).log()


def _sum_of_logs(z: Tensor, log_parts: Tensor) -> Tensor:
    r"""The log-volume of logits, :math:`\sum_k \log x_k`, by sticks as by softmax."""
    # By sticks it is sum_i log v_i + e_i log(1 - v_i), which telescopes to that.
    return log_parts.sum(1)


def _additive_to_log_parts(z: Tensor) -> Tensor:
    return log_softmax(pad(z, (0, 1)), dim=1)


def _additive_from_parts(x: Tensor) -> Tensor:
    logs = x.log()
    return logs[:, :-1] - logs[:, -1:]


# Rows of H are h_i = a_i (0, ..., 0, 1, -1/e_i, ..., -1/e_i) with a_i^2 = e_i / (e_i + 1) and the
# one at place i: orthonormal, and orthogonal to (1, ..., 1). Products with it are running sums.


def isometric_logits(z: Tensor, exponents: Tensor) -> Tensor:
    r"""The logits :math:`z H` (*, K) of isometric coordinates (*, K - 1), with sum zero.

    Rows of fewer parts end in coordinates zero; the logits after their parts mean nothing.
    """
    scaled = z * (exponents / (exponents + 1)).sqrt()
    return pad(scaled, (0, 1)) - pad((scaled / exponents).cumsum(-1), (1, 0))


def isometric_coordinates(logits: Tensor, exponents: Tensor) -> Tensor:
    r"""Isometric coordinates :math:`y H^\top` (*, K - 1) of logits y (*, K) of any sum.

    Rows of fewer parts end in logits zero.
    """
    means_after = _tails(logits)[..., 1:] / exponents
    return (logits[..., :-1] - means_after) * (exponents / (exponents + 1)).sqrt()


def _isometric_to_log_parts(z: Tensor) -> Tensor:
    return log_softmax(isometric_logits(z, _exponents(z)), dim=1)


def _isometric_from_parts(x: Tensor) -> Tensor:
    return isometric_coordinates(x.log(), _exponents(x[:, 1:]))


def _isometric_log_volume(z: Tensor, log_parts: Tensor) -> Tensor:
    return log_parts.sum(1) + 0.5 * math.log(log_parts.shape[1])


COORDINATES = {
    "normal": SimplexCoordinates(_normal_to_log_parts, _normal_from_parts, _normal_log_volume),
    "logit": SimplexCoordinates(_logit_to_log_parts, _logit_from_parts, _sum_of_logs),
    "ilr": SimplexCoordinates(
        _isometric_to_log_parts, _isometric_from_parts, _isometric_log_volume
    ),
    "alr": SimplexCoordinates(_additive_to_log_parts, _additive_from_parts, _sum_of_logs),
    "uniform_box": SimplexCoordinates(_box_to_log_parts, _box_from_parts, _box_log_volume),
}

r"""Smooth maps of circles by given parameters, for couplings of angles.

For a point :math:`\omega = (a, b)` of the unit disk, of radius :math:`r` and angle :math:`\phi`,

.. math:: g_\omega(\theta) = \theta + 2 \arctan
          \frac{a \sin\theta - b \cos\theta}{1 - a \cos\theta - b \sin\theta}, \qquad
          g'_\omega(\theta) = \frac{1 - r^2}{1 - 2 (a \cos\theta + b \sin\theta) + r^2}

is an analytic map of the circle to itself: with :math:`t = \theta - \phi` the fraction is
:math:`r \sin t / (1 - r \cos t)`, whose arcus tangens has the derivative
:math:`(r \cos t - r^2) / (1 - 2 r \cos t + r^2)`. Its derivative is that of a Möbius map of the
disk, :math:`2\pi` times the density of a wrapped Cauchy law around :math:`\phi`. Convex sums of
such maps are maps of the circle again, and have no seam.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from ...checks import check_count
from ...errors import OptionError
from ...modules.turns import into_turn
from .transforms import ElementTransform

# Halvings of the circle until Newton's method converges for every radius that is admitted, and
# its steps until float64 is exhausted. The last two keep the graph: each of them doubles the
# number of derivatives that are right.
_HALVINGS, _STEPS, _RECORDED = 13, 3, 2


@final
class MobiusMixture(ElementTransform):
    r"""A convex sum of Möbius maps of the circle, and a turn.

    .. math:: h(\theta) = s + \theta + \sum_{k=1}^K w_k \big(g_{\omega_k}(\theta) - \theta\big)
              \pmod{2\pi}, \qquad h'(\theta) = \sum_k w_k\, g'_{\omega_k}(\theta)

    Density and all its derivatives are continuous on the whole circle, which splines cannot offer
    at their knots. ``inverse`` is this closed form, ``forward`` solves it by bisection and
    Newton's method to rounding. Angles are in radians and come out within
    :math:`[-\pi, \pi)`. An element has :math:`3K + 1` parameters; zero parameters are the
    identity.

    Args:
        num_components: :math:`K`.
        max_radius: Largest :math:`|\omega_k|`, below one. A single map stretches by at most
            :math:`(1 + r) / (1 - r)`.

    Raises:
        OptionError: If an option is out of range.

    References:
        Rezende et al., Normalizing flows on tori and spheres, arXiv 2002.02428. The closed form
        without a cut and the inverse are derived in ``flows/coupling/circular.py``.

    Examples:
        >>> mixture = MobiusMixture(2)
        >>> at_rest = torch.zeros(1, 2, mixture.num_parameters)
        >>> mixture.inverse(torch.tensor([[3.0, -1.0]]), at_rest)
        (tensor([[ 3., -1.]]), tensor([0.]))
    """

    def __init__(self, num_components: int = 8, max_radius: float = 0.98) -> None:
        self.num_components = check_count(num_components, "num_components")
        if not 0 < max_radius < 1:
            raise OptionError(f"max_radius must be between 0 and 1, got {max_radius!r}.")
        self.max_radius = float(max_radius)

    @property
    def num_parameters(self) -> int:  # type: ignore[override]
        """Weights and two coordinates of every point, and the turn."""
        return 3 * self.num_components + 1

    def forward(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Solve for the angles (B, A) that the sum sends to z, with the log-det (B,)."""
        weights, a, b, turn = self._read(parameters)
        target = z - turn
        with torch.no_grad():
            angles = _start(target, weights, a, b)
        for _ in range(_RECORDED):
            change, slope = _shift_and_slope(angles, weights, a, b)
            angles = angles + into_turn(target - angles - change) / slope
        slope = _shift_and_slope(angles, weights, a, b)[1]
        return into_turn(angles), -slope.log().sum(-1)

    def inverse(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the sum to angles (B, A), with the log-det (B,)."""
        weights, a, b, turn = self._read(parameters)
        change, slope = _shift_and_slope(x, weights, a, b)
        return into_turn(x + change + turn), slope.log().sum(-1)

    def _read(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights and coordinates (B, A, K) of the points, and turns (B, A)."""
        sizes = [self.num_components] * 3 + [1]
        logits, first, second, turn = parameters.split(sizes, dim=-1)
        # Into the disk, the more gently the farther out. Every point has axes of its own: an
        # optimiser that scales each parameter would otherwise move all of them alike.
        scale = self.max_radius * (1 + first.square() + second.square()).rsqrt()
        axes = torch.arange(self.num_components, dtype=scale.dtype, device=scale.device)
        axes = axes * (math.pi / 2 / self.num_components)
        sines, cosines = scale * axes.sin(), scale * axes.cos()
        a, b = cosines * first - sines * second, sines * first + cosines * second
        return logits.softmax(-1), a, b, turn.squeeze(-1)


def _shift_and_slope(
    angles: Tensor, weights: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    r"""The change of angles (B, A), within :math:`\pm\pi`, and the derivative of the sum there."""
    sines, cosines = angles.sin().unsqueeze(-1), angles.cos().unsqueeze(-1)
    along, across = a * cosines + b * sines, a * sines - b * cosines
    square = a.square() + b.square()
    shift = 2 * (weights * (across / (1 - along)).atan()).sum(-1)
    slope = (weights * (1 - square) / (1 - 2 * along + square)).sum(-1)
    return shift, slope


def _start(target: Tensor, weights: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Angles (B, A), not wrapped, close to those that the sum sends to targets."""
    # The lifted map increases, and differs from the angle by less than half a turn.
    lower, upper = target - math.pi, target + math.pi
    for _ in range(_HALVINGS):
        middle = (lower + upper) / 2
        is_above = middle + _shift_and_slope(middle, weights, a, b)[0] > target
        lower, upper = torch.where(is_above, lower, middle), torch.where(is_above, middle, upper)
    angles = (lower + upper) / 2
    for _ in range(_STEPS):
        shift, slope = _shift_and_slope(angles, weights, a, b)
        step = (target - angles - shift) / slope
        angles = (angles + step).maximum(lower).minimum(upper)
    return angles

"""Independent wrapped normal laws of angles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ..checks import as_floating
from ..errors import OptionError
from ..modules.precision import factored_dtype
from ..modules.turns import into_turn
from .torus import LocatedLaw, check_angles

# Where a scale is above this the series in cosines is used, which needs as few terms there.
WIDE = 1.0
HARMONICS = 8


@final
class WrappedNormal(LocatedLaw):
    r"""Independent wrapped normal laws of angles: normal variables around a circle.

    .. math:: \log p(x) = \sum_{i=1}^d \log \sum_{k \in \mathbb Z}
        \mathcal N(x_i - \mu_i + 2 \pi k;\ 0, \sigma_i^2)

    The sum has three terms for :math:`\sigma_i \le 1`, and above that nine of its Fourier series;
    the relative error of the density is below :math:`2 \cdot 10^{-16}` at every angle, see the
    source.
    Samples are normal variables taken modulo a turn, reparameterised. Densities are computed in
    float64 and rounded to the dtype of ``loc``. There is no closed form of the entropy.

    Trainable scales are the parameters themselves; the law depends on their absolute values.

    Args:
        loc: Mean angles :math:`\mu` of shape (d,) in radians.
        scale: :math:`\sigma > 0` in radians, one number or of shape (d,).
        trainable: Whether both are parameters.

    Raises:
        ShapeError: If the mean angles are no vector, or the scales of another shape.
        OptionError: If a scale is not positive.
        NonFiniteError: If one of them holds NaN or infinity.

    References:
        Mardia and Jupp, *Directional Statistics*, Wiley 2000, chapter 3.

    Examples:
        >>> law = WrappedNormal([0.0], scale=3.0)
        >>> law.log_prob(torch.tensor([[0.0], [3.14], [2 * torch.pi]])).exp()  # nearly 1 / 2 pi
        tensor([0.1627, 0.1556, 0.1627])
    """

    width = "scale"
    scale: Tensor

    def __init__(
        self,
        loc: Tensor | Sequence[float],
        scale: float | Tensor | Sequence[float],
        trainable: bool = False,
    ) -> None:
        mean = as_floating(loc, "loc")
        sigma = check_angles(mean, as_floating(scale, "scale", mean), "scale")
        super().__init__(len(mean))
        if not (sigma > 0).all():
            raise OptionError(
                f"scale must be positive, got {float(sigma.min()):g}. Give standard deviations."
            )
        self._set_parameters(mean, sigma, trainable)

    def _draw(self, num_samples: int) -> tuple[Tensor, Tensor]:
        loc, scale = self._lifted()
        normal = torch.randn(num_samples, *self.shape, dtype=loc.dtype, device=loc.device)
        x = loc + scale * normal
        return x, self._log_density(x)

    def _log_density(self, x: Tensor) -> Tensor:
        loc, scale = self._lifted()
        delta = into_turn(x - loc)
        each = torch.where(scale <= WIDE, _by_windings(delta, scale), _by_series(delta, scale))
        return each.sum(1).to(self.loc.dtype)

    def _lifted(self) -> tuple[Tensor, Tensor]:
        dtype = factored_dtype(self.loc.device)
        return self.loc.to(dtype), self.scale.to(dtype).abs()


def _by_windings(delta: Tensor, scale: Tensor) -> Tensor:
    """Log-densities of angles in [-pi, pi] by the terms k = -1, 0, 1, for scales up to one."""
    # A term left out, |k| >= 2, lies at least (2 |k| - 1) pi away, the nearest one at most pi, so
    # that their ratio is at most exp(-2 pi^2 |k| (|k| - 1) / sigma^2): 7.2e-18 each for k = +-2
    # and sigma = 1, and 1.5e-17 for all.
    sigma = scale.clamp(max=WIDE)[..., None]
    turns = 2 * math.pi * torch.arange(-1, 2, dtype=delta.dtype, device=delta.device)
    logs = -((delta[..., None] + turns) / sigma).square() / 2
    return logs.logsumexp(-1) - sigma[..., 0].log() - 0.5 * math.log(2 * math.pi)


def _by_series(delta: Tensor, scale: Tensor) -> Tensor:
    r"""Log-densities by the Fourier series, for scales from one."""
    # p = (1 + 2 sum_j exp(-j^2 sigma^2 / 2) cos(j delta)) / 2 pi. What is left out, j >= 9, is
    # below 5.2e-18 at sigma = 1, where 2 pi p is at least its value 0.0359 at delta = pi, so that
    # the relative error is below 1.5e-16; it is less for larger sigma.
    sigma = scale.clamp(min=WIDE)[..., None]
    order = torch.arange(1, HARMONICS + 1, dtype=delta.dtype, device=delta.device)
    terms = (-(order * sigma).square() / 2).exp() * (order * delta[..., None]).cos()
    return torch.log1p(2 * terms.sum(-1)) - math.log(2 * math.pi)

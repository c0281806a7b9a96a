"""Independent von Mises laws of angles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ..checks import as_floating
from ..errors import OptionError
from ..modules.precision import factored_dtype
from .tilted_angle import drop_of, moving_angle
from .torus import LocatedLaw, check_angles
from .von_mises_fisher import entropy, log_normaliser_from_mode, sample_drop, tilt


@final
class VonMises(LocatedLaw):
    r"""Independent von Mises laws of angles, the bump on the torus.

    .. math:: \log p(x) = \sum_{i=1}^d \kappa_i \cos(x_i - \mu_i) - \log 2 \pi I_0(\kappa_i)

    Each is the law of :class:`VonMisesFisher` in two dimensions, as an angle. Samples move with
    the parameters: with the concentrations by the implicit derivative of the angle. Densities are
    computed in float64 and rounded to the dtype of ``loc``.

    Trainable concentrations are the parameters themselves. Where a step takes one below zero, its
    mode is at :math:`\mu_i + \pi` and its concentration :math:`|\kappa_i|`.

    Args:
        loc: Mean angles :math:`\mu` of shape (d,) in radians.
        concentration: :math:`\kappa \ge 0`, one number or of shape (d,); 0 is uniform.
        trainable: Whether both are parameters.

    Raises:
        ShapeError: If the mean angles are no vector, or the concentrations of another shape.
        OptionError: If a concentration is negative.
        NonFiniteError: If one of them holds NaN or infinity.

    References:
        Mardia and Jupp, *Directional Statistics*, Wiley 2000, chapter 3.

    Examples:
        >>> law = VonMises([0.0, 3.0], concentration=[2.0, 0.0])
        >>> law.log_prob(torch.tensor([[0.0, 0.0], [2 * torch.pi, 1.0]])).exp()
        tensor([0.0821, 0.0821])
        >>> law(5)[0].shape
        torch.Size([5, 2])
    """

    width = "concentration"
    concentration: Tensor

    def __init__(
        self,
        loc: Tensor | Sequence[float],
        concentration: float | Tensor | Sequence[float],
        trainable: bool = False,
    ) -> None:
        mean = as_floating(loc, "loc")
        kappa = as_floating(concentration, "concentration", mean)
        kappa = check_angles(mean, kappa, "concentration")
        super().__init__(len(mean))
        if (kappa < 0).any():
            raise OptionError(
                f"concentration must not be negative, got {float(kappa.min()):g}. "
                "Add pi to loc instead."
            )
        self._set_parameters(mean, kappa, trainable)

    def _draw(self, num_samples: int) -> tuple[Tensor, Tensor]:
        mode, kappa = self._folded()
        shape = num_samples, *self.shape
        with torch.no_grad():
            drop = sample_drop(kappa.expand(shape), 2).clamp(max=2)
            side = torch.where(torch.rand_like(drop) < 0.5, -1.0, 1.0).to(drop)
        angle = moving_angle(drop, kappa, tilt(2))
        log_p = -kappa * drop_of(angle) - log_normaliser_from_mode(kappa, 2)
        return mode + side * angle, log_p.sum(1).to(self.loc.dtype)

    def entropy(self) -> Tensor:
        r"""Entropy :math:`-E \log p`, of shape (), in nats, with a gradient."""
        return self._entropy().to(self.loc.dtype)

    def kl_uniform(self) -> Tensor:
        r"""Kullback-Leibler divergence from this law to the uniform one, of shape (), in nats.

        .. math:: \mathrm{KL}(p \,\|\, u) = d \log 2 \pi - H(p)

        Absolute rounding is that of the dtype of ``loc``, with a gradient.
        """
        return (self.shape[0] * math.log(2 * math.pi) - self._entropy()).to(self.loc.dtype)

    def _entropy(self) -> Tensor:
        return entropy(self._folded()[1], 2).sum()

    def _log_density(self, x: Tensor) -> Tensor:
        mode, kappa = self._folded()
        log_p = -kappa * drop_of(x - mode) - log_normaliser_from_mode(kappa, 2)
        return log_p.sum(1).to(self.loc.dtype)

    def _folded(self) -> tuple[Tensor, Tensor]:
        """The modes, and concentrations that are not negative."""
        dtype = factored_dtype(self.loc.device)
        loc, kappa = self.loc.to(dtype), self.concentration.to(dtype)
        # Not the absolute value, whose derivative at zero is no derivative of the law.
        below = kappa < 0
        return torch.where(below, loc + math.pi, loc), torch.where(below, -kappa, kappa)

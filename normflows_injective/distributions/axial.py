r"""Laws on the sphere that depend on the angle to a mean direction alone, with draws that move.

A point at the angle :math:`\theta` is :math:`x = \cos\theta\, \mu + \sin\theta\, v`, with a
uniform tangent direction v. The angle moves with the concentration by its implicit derivative,
which keeps its probability; the point moves with the mean direction by a reflection that takes a
fixed pole to it. Both are derivatives of maps that push a fixed law to the right one for *all*
parameters near the present ones, so that the gradient of a mean is the mean of the gradients.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..checks import as_floating
from ..errors import OptionError, ShapeError
from ..modules.precision import factored_dtype
from .spherical import SphericalLaw, log_sphere_area
from .tilted_angle import Tilt, moving_angle


class AxialLaw(SphericalLaw):
    """A law about a direction, of which a subclass gives the angle and its density."""

    has_rsample = True

    def __init__(
        self,
        loc: Tensor | Sequence[float],
        concentration: float | Tensor,
        trainable: bool = False,
        *,
        off_manifold: str = "reject",
    ) -> None:
        mean = as_floating(loc, "loc")
        if mean.dim() != 1:
            raise ShapeError(f"loc must be a vector of shape (D,), got {tuple(mean.shape)}.")
        super().__init__(len(mean), off_manifold)
        lifted = mean.to(factored_dtype(mean.device))  # its square may leave the range of float32
        length = torch.linalg.vector_norm(lifted)
        if not length > 0:
            raise OptionError("loc must have a positive length, got zeros. Give a direction.")
        kappa = as_floating(concentration, "concentration", mean)
        if kappa.dim() != 0:
            raise ShapeError(f"concentration must be one number, got shape {tuple(kappa.shape)}.")
        if kappa < 0:
            raise OptionError(
                f"concentration must not be negative, got {float(kappa):g}. "
                "Turn loc round instead."
            )
        kind = nn.Parameter if trainable else nn.Buffer
        self.loc = kind((lifted / length).to(mean.dtype))
        self.concentration = kind(kappa.detach().clone())

    @property
    def trainable(self) -> bool:
        """Whether direction and concentration are parameters."""
        return isinstance(self.loc, nn.Parameter)

    def rsample(self, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        r"""Draw samples (num_samples, D) that move with the parameters, with log-densities.

        Samples carry the gradient of a reparameterisation, of the concentration by the implicit
        derivative of the angle; it is without bias, to 1e-9, and can be differentiated again.
        Log-densities are those of the moving samples, so that ``(log_p - log_target(x)).mean()``
        has the gradient of a divergence.

        Args:
            num_samples: Number of samples.

        Returns:
            Samples (num_samples, D), and their log-densities (num_samples,) in nats.

        Raises:
            NonFiniteError: If a parameter has become NaN or infinite.
        """
        x, log_p = self._moving_draws(num_samples)
        return x.to(self.loc.dtype), log_p.to(self.loc.dtype)

    def _moving_draws(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Samples and log-densities in float64, where the device has it."""
        self.refuse_diverged("loc", "concentration")
        direction, kappa = self._folded()
        with torch.no_grad():
            drop = self._sample_drop(kappa.expand(num_samples)).clamp(max=2)
            shape = num_samples, len(direction) - 1
            normal = torch.randn(shape, dtype=kappa.dtype, device=kappa.device)
            tangent = nn.functional.normalize(normal)
        angle = moving_angle(drop, kappa, self._tilt())
        at_pole = torch.cat([angle.cos()[:, None], angle.sin()[:, None] * tangent], dim=1)
        log_p = self._log_density_at(angle, kappa)
        return turn_pole(at_pole, direction), log_p

    def entropy(self) -> Tensor:
        r"""Entropy :math:`-E \log p`, of shape (), in nats against area, with a gradient."""
        return self._entropy().to(self.loc.dtype)

    def kl_uniform(self) -> Tensor:
        r"""Kullback-Leibler divergence from this law to the uniform one, of shape (), in nats.

        .. math:: \mathrm{KL}(p \,\|\, u) = \log A - H(p)

        Absolute rounding is that of the dtype of ``loc``, with a gradient.
        """
        lifted = log_sphere_area(*self.shape) - self._entropy()
        return lifted.to(self.loc.dtype)

    @abstractmethod
    def _entropy(self) -> Tensor:
        """The entropy in float64, where the device has it."""

    @abstractmethod
    def _sample_drop(self, kappa: Tensor) -> Tensor:
        """Draw 1 - cos of one angle for each concentration (*), which is not negative."""

    @abstractmethod
    def _log_density_at(self, angle: Tensor, kappa: Tensor) -> Tensor:
        """Log-densities (B,) at angles from the mode, of a concentration that is not negative."""

    @abstractmethod
    def _tilt(self) -> Tilt:
        """The law of the angle."""

    def _lifted(self) -> tuple[Tensor, Tensor]:
        dtype = factored_dtype(self.loc.device)
        mean = self.loc.to(dtype)
        return mean / torch.linalg.vector_norm(mean), self.concentration.to(dtype)

    def _folded(self) -> tuple[Tensor, Tensor]:
        """The direction of the mode, and a concentration that is not negative."""
        mean, kappa = self._lifted()
        # Not the absolute value, whose derivative at zero is no derivative of the law.
        sign = torch.where(kappa < 0, -1.0, 1.0).to(kappa)
        return sign * mean, sign * kappa


def turn_pole(x: Tensor, mean: Tensor) -> Tensor:
    """Turn the sphere so that the first axis goes to the mean direction, by one reflection."""
    # Of the two reflections that do so up to a sign, this one never subtracts equal numbers. Each
    # is smooth in the mean direction where it is chosen, also at its edge, where the derivative of
    # an absolute value would be wrong.
    sign = torch.where(mean[0] < 0, -1.0, 1.0).to(mean)
    normal = torch.cat([(mean[0] + sign)[None], mean[1:]])
    along = (x @ normal) / (1 + sign * mean[0])
    return -sign * (x - along[:, None] * normal)

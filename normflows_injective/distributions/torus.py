r"""Laws of angles: of points of the torus :math:`[-\pi, \pi)^d`, against its flat area.

The density is periodic, and any real angles may be scored. Draws lie in the box.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ..checks import check_finite
from ..errors import ShapeError
from ..modules.precision import factored_dtype
from ..modules.turns import into_turn
from .law import Law


class TorusLaw(Law):
    """A law of angles, of which a subclass gives the density."""

    on_manifold = True
    measure = "hausdorff"
    has_rsample = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.shape = (dim,)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density (B,) in nats of angles (B, d).

        Args:
            x: Angles of shape (B, d) in radians, also outside of [-pi, pi).

        Returns:
            Log-density of shape (B,) in nats against the flat area of the torus.

        Raises:
            ShapeError: If the points have another width.
            NonFiniteError: If an angle is NaN or infinite.
        """
        check_finite(x, "x")
        return self._log_density(x.to(factored_dtype(x.device)))

    def rsample(self, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        """Draw as ``forward`` does: samples move with the parameters."""
        return self.forward(num_samples)

    @abstractmethod
    def _log_density(self, x: Tensor) -> Tensor:
        """Log-density (B,) in nats of angles (B, d) in float64, where the device has it."""


class LocatedLaw(TorusLaw):
    """A law about mean angles, with parameters; a subclass draws in float64."""

    loc: Tensor
    # The parameter beside the location.
    width: ClassVar[str]

    def _set_parameters(self, loc: Tensor, width: Tensor, trainable: bool) -> None:
        kind = nn.Parameter if trainable else nn.Buffer
        self.loc = kind(loc)
        setattr(self, self.width, kind(width))

    @property
    def trainable(self) -> bool:
        """Whether the mean angles and the parameter beside them are parameters of torch."""
        return isinstance(self.loc, nn.Parameter)

    def forward(self, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        """Draw angles (num_samples, d) that move with the parameters, with log-densities.

        Args:
            num_samples: Number of samples.

        Returns:
            Angles in [-pi, pi), and their log-densities (num_samples,) in nats.

        Raises:
            NonFiniteError: If a parameter has become NaN or infinite.
        """
        self.refuse_diverged("loc", self.width)
        x, log_p = self._draw(num_samples)
        return in_turn(x, self.loc.dtype), log_p

    @abstractmethod
    def _draw(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Draw angles (n, d) of any number of turns, with log-densities (n,) in nats."""


@final
class UniformTorus(TorusLaw):
    r"""Uniform distribution of angles.

    .. math:: \log p(x) = -d \log 2\pi

    Args:
        dim: Number :math:`d` of angles.

    Raises:
        OptionError: If it is no positive integer.

    References:
        Mardia and Jupp, *Directional Statistics*, Wiley 2000, chapter 3.

    Examples:
        >>> law = UniformTorus(2)
        >>> law.log_prob(torch.tensor([[0.0, 9.0]])).neg().exp()  # (2 pi)^2
        tensor([39.4784])
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.dim = dim
        # Holds no number, which would lose digits, but the dtype and the device.
        self._like = nn.Buffer(torch.empty(0), persistent=False)

    def forward(self, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        """Draw angles (num_samples, d) in [-pi, pi) with their log-density (num_samples,)."""
        lifted = factored_dtype(self._like.device)
        uniform = torch.rand(num_samples, *self.shape, dtype=lifted, device=self._like.device)
        x = in_turn(math.pi * (2 * uniform - 1), self._like.dtype)
        return x, self._log_density(x)

    def entropy(self) -> Tensor:
        """Entropy, of shape (), in nats: the logarithm of the area."""
        return self._like.new_tensor(self.dim * math.log(2 * math.pi))

    def _log_density(self, x: Tensor) -> Tensor:
        return self._like.new_full((x.shape[0],), -self.dim * math.log(2 * math.pi))


def in_turn(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Angles in [-pi, pi), also after they are rounded to a dtype."""
    rounded = into_turn(x).to(dtype)
    # The nearest number to pi may be above it.
    most = math.pi * (1 - torch.finfo(dtype).eps)
    return rounded + (rounded.clamp(-most, most) - rounded).detach()


def check_angles(loc: Tensor, other: Tensor, name: str) -> Tensor:
    """Return one number for each angle, or raise unless the location is a vector of angles."""
    if loc.dim() != 1 or not len(loc):
        raise ShapeError(f"loc must be a vector of shape (d,), got {tuple(loc.shape)}.")
    if other.shape not in ((), loc.shape):
        raise ShapeError(
            f"{name} must be one number or have the shape {tuple(loc.shape)} of loc, got "
            f"{tuple(other.shape)}."
        )
    return other.expand(loc.shape).clone()

r"""The isotropic Gaussian law of rotations: the heat kernel of SO(3).

With :math:`t = \epsilon^2 / 2`, the density at a turn by :math:`\omega \in [0, \pi]` from the
centre is a sum over the characters :math:`\chi_l(\omega) = \sin((l + \tfrac12) \omega) /
\sin(\omega/2)`,

.. math:: f_t(\omega) = \sum_{l \ge 0} (2l + 1)\, e^{-l(l+1) t}\, \chi_l(\omega),

which needs many terms for small :math:`t`. With :math:`n = l + \tfrac12` it is :math:`-e^{t/4}
\tfrac{d}{d\omega} \sum_{n \in \mathbb Z + 1/2} e^{-n^2 t} \cos(n \omega) / \sin(\omega/2)`, and by
Poisson's sum formula

.. math:: f_t(\omega) = \frac{\sqrt\pi\, e^{t/4}}{2\, t^{3/2} \sin(\omega/2)}
          \sum_{m \in \mathbb Z} (-1)^m (\omega - 2 \pi m)\, e^{-(\omega - 2\pi m)^2 / 4t},

whose terms fall the faster the smaller :math:`t` is. The first is used for :math:`t \ge 1` with
:math:`l \le 8`; the terms that are left out are below :math:`361\, e^{-90}`. The second is used
below, with :math:`|m| \le 3`; those left out are below :math:`e^{-118}` of the sum. So truncation
is below rounding in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from ..checks import as_floating
from ..errors import OptionError, ShapeError
from ..flows.surfaces.quaternions import conjugate, from_quaternions, multiply
from ..modules.precision import factored_dtype
from .uniform_rotation import RotationLaw

SWITCH, DEGREES, WRAPS, CELLS = 1.0, 8, 3, 4096


@final
class IsotropicGaussianRotation(RotationLaw):
    r"""The law of a Brownian motion on SO(3): the isotropic Gaussian of rotations, IGSO(3).

    .. math:: p(R) = \sum_{l \ge 0} (2l + 1)\, e^{-l(l+1) \epsilon^2 / 2}\,
              \frac{\sin((l + \frac12) \omega)}{\sin(\omega / 2)}

    against Haar measure, with :math:`\omega` the angle of the turn from the centre to :math:`R`.
    For small :math:`\epsilon` the three coordinates of that turn are normal with deviation
    :math:`\epsilon` radians. Both forms of the sum are truncated below rounding in float64. The
    angle of samples comes from the inverse of its distribution function on 4096 cells, whose error
    is below 1e-6; samples carry no gradient, their log-densities do.

    A trainable scale is the parameter itself; its sign does not matter.

    Args:
        scale: :math:`\epsilon > 0`, in radians.
        loc: Centre, a quaternion of shape (4,) of any positive length; None for the identity.
        trainable: Whether both are parameters.
        form: ``"quaternion"`` for samples (n, 4) with :math:`w \ge 0`, or ``"matrix"`` for
            (n, 3, 3).
        off_manifold: Treatment by ``log_prob`` of other points: ``"reject"`` raises where a
            norm or an entry is off by more than 1e-4, ``"project"`` takes the nearest one.

    Raises:
        ShapeError: If the centre is no quaternion or the scale no number.
        OptionError: If the scale is not positive, the centre zero, or an option unknown.
        NonFiniteError: If one of them holds NaN or infinity.

    References:
        Nikolayev and Savyolova, Normal distribution on the rotation group SO(3), 1997; Leach et
        al., Denoising diffusion probabilistic models on SO(3), 2022. The stable sums are derived
        in the module.

    Examples:
        >>> law = IsotropicGaussianRotation(0.5)
        >>> law.log_prob(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])).exp()
        tensor([4.1379e+01, 3.4778e-07])
    """

    def __init__(
        self,
        scale: float | Tensor,
        loc: Tensor | Sequence[float] | None = None,
        trainable: bool = False,
        form: str = "quaternion",
        *,
        off_manifold: str = "reject",
    ) -> None:
        centre = as_floating([1.0, 0.0, 0.0, 0.0] if loc is None else loc, "loc")
        if centre.shape != (4,):
            raise ShapeError(f"loc must be a quaternion of shape (4,), got {tuple(centre.shape)}.")
        lifted = centre.to(factored_dtype(centre.device))
        length = torch.linalg.vector_norm(lifted)
        if not length > 0:
            raise OptionError("loc must have a positive length, got zeros. Give a quaternion.")
        width = as_floating(scale, "scale", centre)
        if width.dim() != 0:
            raise ShapeError(f"scale must be one number, got shape {tuple(width.shape)}.")
        if not width > 0:
            raise OptionError(f"scale must be positive, got {float(width):g}.")
        super().__init__(form, off_manifold)
        kind = nn.Parameter if trainable else nn.Buffer
        self.loc = kind((lifted / length).to(centre.dtype))
        self.scale = kind(width.detach().clone())

    @property
    def trainable(self) -> bool:
        """Whether scale and centre are parameters."""
        return isinstance(self.scale, nn.Parameter)

    def forward(self, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        """Draw rotations without a gradient, with log-densities (num_samples,) that carry one.

        Args:
            num_samples: Number of samples.

        Returns:
            Samples (num_samples, 4) or (num_samples, 3, 3), and their log-densities in nats.

        Raises:
            NonFiniteError: If a parameter has become NaN or infinite.
        """
        self.refuse_diverged("loc", "scale")
        with torch.no_grad():
            centre, time = self._lifted()
            half = _sample_angles(time, num_samples)[:, None] / 2
            axes = torch.randn(num_samples, 3, dtype=centre.dtype, device=centre.device)
            axes = nn.functional.normalize(axes)
            q = multiply(centre, torch.cat([half.cos(), half.sin() * axes], dim=1))
        return from_quaternions(q.to(self.loc.dtype), self.form), self._log_density(q)

    def _log_density(self, q: Tensor) -> Tensor:
        centre, time = self._lifted()
        turn = multiply(conjugate(centre), q)
        # The density is even in the angle, so it has no derivative where the clamp takes it.
        length = turn[:, 1:].square().sum(1).clamp_min(1e-24).sqrt()
        angles = 2 * torch.atan2(length, torch.where(turn[:, 0] < 0, -turn[:, 0], turn[:, 0]))
        return log_heat_kernel(angles, time).to(self.loc.dtype)

    def _lifted(self) -> tuple[Tensor, Tensor]:
        dtype = factored_dtype(self.loc.device)
        centre = self.loc.to(dtype)
        return centre / torch.linalg.vector_norm(centre), self.scale.to(dtype).square() / 2


def log_heat_kernel(angles: Tensor, time: Tensor) -> Tensor:
    """Log-density (*) at angles (*) within (0, pi] of the heat kernel at one time."""
    is_late = time >= SWITCH
    late = _by_characters(angles, time.clamp_min(SWITCH))
    early = _by_wrapping(angles, time.clamp_max(SWITCH))
    return torch.where(is_late, late, early)


def _by_characters(angles: Tensor, time: Tensor) -> Tensor:
    # chi_l = 1 + 2 cos(omega) + ... + 2 cos(l omega), also where the sine vanishes.
    character = total = torch.ones_like(angles)
    for degree in range(1, DEGREES + 1):
        character = character + 2 * (degree * angles).cos()
        total = total + (2 * degree + 1) * (-degree * (degree + 1) * time).exp() * character
    return total.log()


def _by_wrapping(angles: Tensor, time: Tensor) -> Tensor:
    # The sum over omega exp(-omega^2 / 4t), with m and -m together: with y = pi m omega / t and
    # e = exp((-pi^2 m^2 + pi m omega) / t), at most one, the pair is
    # omega e (1 + exp(-2 y)) + 2 pi m e expm1(-2 y), which keeps its digits next to omega = 0.
    total = torch.ones_like(angles)
    for m in range(1, WRAPS + 1):
        decay = -2 * math.pi * m * angles / time
        share = ((-((math.pi * m) ** 2) + math.pi * m * angles) / time).exp()
        pair = share * (1 + decay.exp()) + 2 * math.pi * m * share * decay.expm1() / angles
        total = total + (-1) ** m * pair
    log_sinc = torch.sinc(angles / (2 * math.pi)).log()
    log_scale = 0.5 * math.log(math.pi) + time / 4 - 1.5 * time.log()
    return log_scale - angles.square() / (4 * time) + total.log() - log_sinc


def angle_function(time: Tensor) -> tuple[Tensor, Tensor]:
    """Knots (n + 1,) of angles, and the distribution function (n + 1,) of the angle there."""
    # The density of the angle is f (1 - cos omega) / pi. Beyond nine deviations less than 1e-16 is
    # left. Simpson's rule in every cell.
    reach = (9 * (2 * time).sqrt()).clamp_max(math.pi)
    steps = torch.linspace(0, 1, 2 * CELLS + 1, dtype=time.dtype, device=time.device)
    angles = reach * steps
    density = log_heat_kernel(angles.clamp_min(1e-12), time).exp() * (angles / 2).sin().square()
    cells = density[:-2:2] + 4 * density[1::2] + density[2::2]
    function = nn.functional.pad(cells.cumsum(0), (1, 0))
    return angles[::2], function / function[-1]


def _sample_angles(time: Tensor, count: int) -> Tensor:
    """Draw angles (count,) by inversion of straight lines between the knots."""
    angles, function = angle_function(time)
    share = torch.rand(count, dtype=time.dtype, device=time.device)
    last = torch.searchsorted(function, share, right=True).clamp(1, CELLS)
    low, high = function[last - 1], function[last]
    within = ((share - low) / (high - low)).nan_to_num(0.5).clamp(0, 1)
    return angles[last - 1] + within * (angles[last] - angles[last - 1])

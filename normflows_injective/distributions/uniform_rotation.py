r"""Laws of rotations, against Haar measure, and the uniform one.

Haar measure of SO(3) is normalised to total mass one, so that the uniform density is one.
Rotations are unit quaternions :math:`q` with :math:`-q` identified: against the area of
:math:`S^3`, of which SO(3) is the half of area :math:`\pi^2`, all log-densities are lower by
:math:`\log\pi^2`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import final

import torch
from torch import Tensor, nn

from ..checks import lookup
from ..flows.surfaces.off_manifold import check_policy
from ..flows.surfaces.quaternions import FORMS, as_quaternions, from_quaternions
from ..modules.precision import factored_dtype
from .law import Law


class RotationLaw(Law):
    """A law of rotations, of which a subclass gives the density at unit quaternions."""

    on_manifold = True
    measure = "haar"

    def __init__(self, form: str, off_manifold: str) -> None:
        super().__init__()
        check_policy(off_manifold)
        self.shape = lookup(form, FORMS, "form")
        self.form, self.off_manifold = form, off_manifold

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density (B,) in nats of rotations (B, 4) or (B, 3, 3).

        Args:
            x: Unit quaternions (w, x, y, z) of either sign, or rotation matrices.

        Returns:
            Log-density of shape (B,) in nats against Haar measure of total mass one.

        Raises:
            ShapeError: If the rotations have another form.
            OffManifoldError: If some are no rotations and are to be rejected.
        """
        x = x.to(factored_dtype(x.device))
        return self._log_density(as_quaternions(x, self.form, self.off_manifold, "x"))

    @abstractmethod
    def _log_density(self, q: Tensor) -> Tensor:
        """Log-density (B,) in nats at quaternions (B, 4) in float64, where the device has it."""


@final
class UniformRotation(RotationLaw):
    r"""Uniform distribution of rotations, Haar measure itself.

    .. math:: \log p(R) = 0

    Args:
        form: ``"quaternion"`` for samples (n, 4) with :math:`w \ge 0`, or ``"matrix"`` for
            (n, 3, 3).
        off_manifold: Treatment by ``log_prob`` of other points: ``"reject"`` raises where a
            norm or an entry is off by more than 1e-4, ``"project"`` takes the nearest one.

    Raises:
        OptionError: If an option is unknown.

    References:
        Mardia and Jupp, *Directional Statistics*, Wiley 2000, chapter 13.

    Examples:
        >>> x, log_p = UniformRotation("matrix")(2)
        >>> x.shape, log_p
        (torch.Size([2, 3, 3]), tensor([0., 0.]))
    """

    def __init__(self, form: str = "quaternion", *, off_manifold: str = "reject") -> None:
        super().__init__(form, off_manifold)
        # Holds no number, but the dtype and the device.
        self._like = nn.Buffer(torch.empty(0), persistent=False)

    def forward(self, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        """Draw rotations (num_samples, 4) or (num_samples, 3, 3) with log-densities of zero."""
        like = self._like
        q = torch.randn(num_samples, 4, dtype=like.dtype, device=like.device)
        return from_quaternions(nn.functional.normalize(q), self.form), self._log_density(q)

    def _log_density(self, q: Tensor) -> Tensor:
        return self._like.new_zeros(q.shape[0])

"""The chart of the torus: one angle for every circle."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from ...checks import check_choice, check_count, check_positive
from .off_manifold import check_policy, unit_vectors
from .surface import Chart

FORMS = ("angles", "vectors")
KINDS = ("angles", "stereographic")


@final
class TorusChart(Chart):
    r"""The torus :math:`(S^1)^d`, from angles in radians.

    .. math:: \text{angles:}\quad x_i = \tfrac{P}{2\pi} \theta_i \bmod P, \quad
              \log\text{-volume} = d \log \tfrac{P}{2\pi}; \qquad
              \text{vectors:}\quad x_{2i-1, 2i} = (\cos\theta_i, \sin\theta_i), \quad
              \log\text{-volume} = 0

    because a circle of radius one is as long as its angles. The angles are coordinates of the
    whole torus, without poles, so layers whose angles are periodic, as those of
    :class:`AngularSpline`, see no seam. ``kind="stereographic"`` takes :math:`z = \tan(\theta/2)`
    instead, with the log-volume :math:`\log 2 - \log(1 + z^2)` more for each circle: numbers
    without bounds, for samplers, which miss half a turn.

    Args:
        dim: :math:`d \ge 1`, the number of circles.
        form: ``"angles"`` within one period from ``start``, or ``"vectors"``, unit vectors in
            :math:`\mathbb R^{2d}`, a pair of numbers for each circle.
        period: :math:`P`, in units of the data, for angles; 360 for degrees, 24 for hours.
        start: Where the period begins that angles come out in; None for :math:`-P/2`. Angles
            beyond are accepted and wrapped.
        off_manifold: Treatment by :meth:`inverse` of pairs whose norm is not one: ``"reject"``
            raises, ``"project"`` divides by the norm.
        kind: ``"angles"`` or ``"stereographic"``, the coordinates.

    Raises:
        OptionError: If an option is unknown or out of range.

    References:
        Rezende et al., Normalizing flows on tori and spheres, arXiv 2002.02428.

    Examples:
        >>> TorusChart(1, "vectors")(torch.tensor([[0.0]]))
        (tensor([[1., 0.]]), tensor([0.]))
        >>> clock = TorusChart(1, period=24.0, start=0.0)
        >>> clock.decode(clock.encode(torch.tensor([[23.0], [25.0]]))).round(decimals=3)
        tensor([[23.],
                [ 1.]])
    """

    def __init__(
        self,
        dim: int,
        form: str = "angles",
        period: float = 2 * math.pi,
        start: float | None = None,
        off_manifold: str = "reject",
        kind: str = "angles",
    ) -> None:
        super().__init__()
        self.dim = check_count(dim, "dim")
        self.form = check_choice(form, FORMS, "form")
        check_policy(off_manifold)
        self.off_manifold = off_manifold
        self.period = float(check_positive(period, "period"))
        self.start = -self.period / 2 if start is None else float(start)
        self.kind = check_choice(kind, KINDS, "kind")
        self.latent_shape = (dim,)
        self.ind_circ = list(range(dim)) if kind == "angles" else []
        self.data_shape = (dim,) if form == "angles" else (2 * dim,)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coordinates (B, d) to points of the torus, with the log-volume (B,) in nats."""
        angles, log_volume = z, z.new_full((z.shape[0],), self._log_volume)
        if self.kind == "stereographic":
            angles, log_volume = 2 * z.atan(), log_volume + _log_slope(z).sum(1)
        if self.form == "vectors":
            return torch.stack([angles.cos(), angles.sin()], 2).flatten(1), log_volume
        # Half a turn lies in the middle of the period, whose ends are one place.
        turned = torch.remainder(angles + math.pi, 2 * math.pi)
        return self.start + turned * (self.period / (2 * math.pi)), log_volume

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Points of the torus to coordinates (B, d), with minus the log-volume (B,) in nats."""
        if self.form == "vectors":
            pairs = unit_vectors(x.unflatten(1, (self.dim, 2)), self.off_manifold, "x")
            angles = torch.atan2(pairs[..., 1], pairs[..., 0])
        else:
            turned = torch.remainder(x - self.start, self.period)
            angles = turned * (2 * math.pi / self.period) - math.pi
        log_volume = x.new_full((x.shape[0],), self._log_volume)
        if self.kind == "stereographic":
            z = (angles / 2).tan()
            return z, -log_volume - _log_slope(z).sum(1)
        return angles, -log_volume

    def wrapped(self, x: Tensor) -> Tensor:
        """Angles (*) brought into the period by whole turns; vectors (*) as they are."""
        if self.form == "vectors":
            return x
        return self.start + torch.remainder(x - self.start, self.period)

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        turn = f"off_manifold={self.off_manifold!r}"
        if self.form == "angles":
            turn = f"period={self.period:g}, start={self.start:g}"
        return f"{self.dim}, form={self.form!r}, {turn}, kind={self.kind!r}"

    @property
    def _log_volume(self) -> float:
        is_angles = self.form == "angles"
        return self.dim * math.log(self.period / (2 * math.pi)) if is_angles else 0.0


def _log_slope(z: Tensor) -> Tensor:
    """Logarithms of the derivatives of twice the arcus tangens."""
    return math.log(2) - 2 * torch.hypot(z, torch.ones_like(z)).log()

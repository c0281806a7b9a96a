r"""Rotations of space as unit quaternions: coordinates, and the two forms in which they are given.

Unit quaternions are the sphere :math:`S^3`, of area :math:`2\pi^2`, and :math:`q` and :math:`-q`
are one rotation, so SO(3) is half of it. Haar measure, which no rotation of space changes, is the
area of that half divided by its total :math:`\pi^2`: the mass of SO(3) is one and the uniform
density is one.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from ...checks import is_readable, lookup
from ...errors import OffManifoldError
from .off_manifold import check_policy, unit_vectors
from .quaternions import FORMS, as_quaternions, from_quaternions
from .surface import Chart, Surface, SurfaceMap


@final
class HopfChart(Chart):
    r"""Coordinates of pairs of antipodes of :math:`S^3`, that is of rotations, with two angles.

    .. math:: q = (\cos\eta\, e^{i a}, \sin\eta\, e^{i b}), \quad
              \zeta = \sqrt2 \cot 2\eta, \; s = a + b, \; t = a - b, \qquad
              \log\frac{d\omega}{d\zeta\, ds\, dt}
              = -\tfrac72 \log 2 - \tfrac32 \log(1 + \zeta^2 / 2)

    with :math:`q = (w + i x, y + i z)`. Both :math:`a` and :math:`b` grow by :math:`\pi` from
    :math:`q` to :math:`-q`, so that antipodes have the same coordinates and :math:`s, t` have
    period :math:`2\pi`. Under the uniform law they are independent, :math:`\zeta` has Student's
    :math:`t_2` law and the angles are uniform. The chart leads to one of two antipodes and misses
    the circles :math:`\eta = 0, \pi/2`, at which flows that act on these coordinates have poles;
    those of ``rotation_flow`` act on the sphere, and the chart only names the points of the base.

    Args:
        off_manifold: Treatment by :meth:`inverse` of points whose norm is not one: ``"reject"``
            raises, ``"project"`` divides by the norm.

    Raises:
        OptionError: If the policy is unknown.

    References:
        Hopf coordinates; the log-volume is derived in the code.

    Examples:
        >>> x, log_det = HopfChart()(torch.zeros(1, 3))
        >>> x, log_det
        (tensor([[0.7071, 0.0000, 0.7071, 0.0000]]), tensor([-2.4260]))
    """

    codomain = "sphere"
    ind_circ = (1, 2)

    def __init__(self, off_manifold: str = "reject") -> None:
        super().__init__()
        check_policy(off_manifold)
        self.off_manifold = off_manifold
        self.latent_shape, self.data_shape = (3,), (4,)

    # The area is cos(eta) sin(eta) d(eta) da db. With c = cos(2 eta), dc = -4 cos sin d(eta) and
    # da db = ds dt / 2 it is dc ds dt / 8, and c = y / sqrt(1 + y^2) for y = cot(2 eta) gives
    # dc = (1 + y^2)^(-3/2) dy with dy = d(zeta) / sqrt(2). Near a circle y keeps the digits of the
    # distance, where c would round to one.

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coordinates (B, 3) to points (B, 4), with the log-volume (B,) in nats."""
        zeta, s, t = z.unbind(1)
        _check_angles(z[:, 1:])
        y = zeta / math.sqrt(2)
        # Twice the squared cosine is 1 + y / r; the smaller of cosine and sine comes from the
        # larger without cancellation. Not by abs(), which has no derivative at zero.
        length = torch.hypot(torch.ones_like(y), y)
        is_upper = y >= 0
        size = torch.where(is_upper, y, -y)
        large = ((length + size) / (2 * length)).sqrt()
        small = 1 / (2 * length * large)
        cosine = torch.where(is_upper, large, small)
        sine = torch.where(is_upper, small, large)
        a, b = (s + t) / 2, (s - t) / 2
        parts = (cosine * a.cos(), cosine * a.sin(), sine * b.cos(), sine * b.sin())
        return torch.stack(parts, dim=1), _log_volume(zeta)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Points (B, 4) to coordinates (B, 3), with minus the log-volume (B,) in nats."""
        u = unit_vectors(x, self.off_manifold, "x")
        first, second = _off_zero(u[:, :2]), _off_zero(u[:, 2:])
        (w, x1), (y, z) = first.unbind(1), second.unbind(1)
        lengths = torch.linalg.vector_norm(first, dim=1), torch.linalg.vector_norm(second, dim=1)
        rise = (lengths[0] - lengths[1]) * (lengths[0] + lengths[1])
        zeta = rise / (math.sqrt(2) * lengths[0] * lengths[1])
        s = torch.atan2(w * z + x1 * y, w * y - x1 * z)
        t = torch.atan2(x1 * y - w * z, w * y + x1 * z)
        return torch.stack([zeta, s, t], dim=1), -_log_volume(zeta)

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"off_manifold={self.off_manifold!r}"


@final
class AsRotation(SurfaceMap):
    r"""The last layer of a flow of rotations: antipodes become one rotation, in one of two forms.

    .. math:: \log\frac{d\mu}{d\omega} = -\log \pi^2

    turns the area :math:`\omega` of the half of :math:`S^3` that a flow covers into Haar measure
    :math:`\mu`, of total mass one. Densities behind it are against Haar measure, and the same for
    :math:`q` and :math:`-q`. Matrices are given and returned as (B, 3, 3); quaternions are
    returned with :math:`w \ge 0`, and both signs are taken.

    Args:
        form: ``"quaternion"``, :math:`(w, x, y, z)`, or ``"matrix"``.
        off_manifold: Treatment by :meth:`encode` of quaternions whose norm is off by more than
            1e-4 and of matrices with an entry as far from a rotation: ``"reject"`` raises,
            ``"project"`` takes the direction or the nearest rotation.

    Raises:
        OptionError: If the form or the policy is unknown.

    References:
        Mardia and Jupp, *Directional Statistics*, Wiley 2000, chapter 13.

    Examples:
        >>> AsRotation("matrix").decode(torch.tensor([[0.0, 0.0, 0.0, 1.0]]))  # by pi about z
        tensor([[[-1.,  0.,  0.],
                 [ 0., -1.,  0.],
                 [ 0.,  0.,  1.]]])
    """

    domain = "sphere"
    codomain = "rotations"
    measure = "haar"

    def __init__(self, form: str = "quaternion", off_manifold: str = "reject") -> None:
        super().__init__()
        check_policy(off_manifold)
        self.data_shape = lookup(form, FORMS, "form")
        self.form, self.off_manifold = form, off_manifold
        self.latent_shape = (4,)

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Unit quaternions (B, 4) to rotations (B, 4) or (B, 3, 3)."""
        return from_quaternions(unit_vectors(z, "reject", "z"), self.form)

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Rotations (B, 4) or (B, 3, 3) to unit quaternions (B, 4)."""
        return as_quaternions(x, self.form, self.off_manifold, "x")

    def log_stretch(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-factor (B,) in nats by which area becomes Haar measure."""
        return z.new_full((z.shape[0],), -2 * math.log(math.pi))

    def surface(self, before: Surface | None = None) -> Surface:
        """Rotations, against Haar measure."""
        return Surface("rotations", dim=FORMS[self.form][0], measure=self.measure)

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"form={self.form!r}, off_manifold={self.off_manifold!r}"


def _log_volume(zeta: Tensor) -> Tensor:
    return -3.5 * math.log(2) - 1.5 * (0.5 * zeta.square()).log1p()


def _off_zero(pairs: Tensor) -> Tensor:
    """Pairs (B, 2), with a tiny one in place of zero, whose angle is zero."""
    # The square of the quotient of two such lengths is within the range of float32.
    least = 1e-15
    tiny = pairs.new_tensor([least, 0.0]).expand_as(pairs)
    return torch.where(pairs.detach().abs().amax(1, keepdim=True) < least, tiny, pairs)


def _check_angles(angles: Tensor) -> None:
    if not is_readable(angles):
        return
    worst = angles.detach().abs().amax() if angles.numel() else angles.new_zeros(())
    if bool(worst > math.pi * (1 + 1e-5)):
        raise OffManifoldError(
            f"The last two coordinates of this chart are angles within [-pi, pi], and "
            f"{float(worst):.6g} came: another turn would count its points twice. Use "
            "nfi.flows.AngularSpline with ind_circ=[1, 2] before it."
        )

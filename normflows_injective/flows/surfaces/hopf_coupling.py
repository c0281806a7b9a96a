r"""Couplings of rotations: a turn about the first axis, by an angle that the other axes decide.

**Why on the sphere and not in a chart.** Coordinates of SO(3), such as axis and angle or
:class:`HopfChart`, have places where one point has many names. A spline that acts on one of
them by a network of the others gives these names different densities, so a trained density jumps
there, and a rational-quadratic spline has a kink at every knot, also at the ends of a period.
Here there are neither coordinates nor knots: each map below is an analytic function of the
rotation matrix, so that a density is as smooth as the network, everywhere.

**Fibres.** Write :math:`R = (r_1, r_2, r_3)` by columns. The rotations that share :math:`r_1` are
a circle, :math:`R \mapsto R\, R_x(\varphi)`, which turns :math:`r_2` and :math:`r_3` in their
plane, and :math:`SO(3) \to S^2,\ R \mapsto r_1` is a bundle of such circles (that of Hopf, on
:math:`S^3`). It has no global section: no continuous rule chooses one :math:`r_2` for every
:math:`r_1`, so there is no angle on all of the circles. Yet there are maps of them without an
angle. Let :math:`m = r_2 + i r_3 \in \mathbb C^3`; the turn by :math:`\varphi` multiplies it by
:math:`e^{-i\varphi}`. If :math:`P_k` is a homogeneous polynomial of degree :math:`k` whose
coefficients depend on :math:`r_1` alone, then :math:`\beta = P_k(m)` is multiplied by :math:`e^{-i
k \varphi}`, and with :math:`\rho = \sqrt{1 + |\beta|^2}`

.. math:: \varphi = \frac 2k \arg(\rho - \beta), \qquad
          \frac{d\theta'}{d\theta} = \frac{1}{|\rho - \beta|^2}

is a diffeomorphism of every circle. Indeed, for some reference :math:`\theta = 0` let
:math:`u = e^{i k \theta}` and :math:`\beta / \rho = \omega \bar u` with :math:`|\omega| < 1`. Then
:math:`u\, e^{i k \varphi} = u (1 - \omega \bar u) / (1 - \bar\omega u) = (u - \omega) /
(1 - \bar\omega u)` is a transformation of Moebius, with derivative
:math:`(1 - |\omega|^2) / |1 - \bar\omega u|^2`, here
:math:`\rho^{-2} / |1 - \beta/\rho|^2`. The real part of :math:`\rho - \beta` is positive, so the
argument lies in :math:`(-\pi/2, \pi/2)` and has no branch. The inverse is that of
:math:`-\omega`: the same formula with :math:`-\beta` at the image. For :math:`k > 1` it is the
lift to the circle of a map of its :math:`k`-fold cover, which makes :math:`k` modes.

Lengths of :math:`\beta` are kept below five by a smooth factor, which the phase does not change.

A layer composes a turn by a function of :math:`r_1`, which preserves volume, with one such map of
every degree :math:`1, \dots, K`. All use the same :math:`m`, whose phase alone changes. Since
:math:`m \cdot m = 0`, the polynomials of degree :math:`k` are spanned by the :math:`2k + 1`
products of :math:`(m_1 \pm i m_2) / 2` and :math:`m_3`, all of length one at most, whose complex
coefficients the network gives.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from ...checks import check_count
from ...errors import OptionError
from ...nets.mlp import ResidualMLP, start_at_zero
from .off_manifold import check_policy, unit_vectors
from .quaternions import conjugate, matrix_from_quaternion
from .surface import SurfaceMap

# The bound of the length of beta. The largest and the smallest derivative of one map are then 100
# and 1/100. Without it a large step of an optimiser may send a circle to one point of float32.
BOUND = 5.0


@final
class HopfCoupling(SurfaceMap):
    r"""A smooth coupling of unit quaternions that treats :math:`q` and :math:`-q` alike.

    .. math:: q \mapsto q\, \big(\cos\tfrac\varphi2, \sin\tfrac\varphi2, 0, 0\big), \qquad
              \varphi = f(r_1) + \sum_{k=1}^K \tfrac2k \arg(\rho_k - \beta_k), \qquad
              \log|\det| = -\sum_k \log |\rho_k - \beta_k|^2

    The first column :math:`r_1` of the rotation matrix stays, and the circle of rotations that
    share it is turned and stretched by transformations of Moebius, whose parameters a network
    finds from it. See the module for the derivation: the map is analytic, has no pole and no seam,
    and its inverse is a closed form. ``forward`` of :math:`-q` is exactly minus that of :math:`q`.
    The layer starts as the identity. Layers of different axes follow each
    other.

    Args:
        num_orders: :math:`K`, the largest number of modes that one layer makes on a circle.
        width: Width of the network.
        num_blocks: Number of its residual blocks.
        context_dim: Number of context features; 0 for none.
        off_manifold: Treatment of points whose norm is not one: ``"reject"`` raises, ``"project"``
            divides by the norm.
        axis: Which column stays, 0, 1 or 2.
        rows: Whether a row stays rather than a column: the layer turns in the space that the
            rotation leads to, not in that which it comes from.

    Raises:
        OptionError: If a number is not positive, the axis none of the three or the policy unknown.

    References:
        Transformations of Moebius in couplings of rotation matrices: Liu et al., Delving into
        discrete normalizing flows on SO(3), arXiv 2304.03937; of circles: Rezende et al., arXiv
        2002.02428. Degrees above one are ours.

    Examples:
        >>> layer = HopfCoupling(width=8)
        >>> q = torch.tensor([[0.6, 0.0, 0.8, 0.0]])
        >>> [t.detach() for t in layer(q)]  # the identity, at first
        [tensor([[0.6000, 0.0000, 0.8000, 0.0000]]), tensor([0.])]
    """

    codomain = "sphere"
    keeps_surface = True

    def __init__(
        self,
        num_orders: int = 3,
        width: int = 64,
        num_blocks: int = 2,
        context_dim: int = 0,
        off_manifold: str = "reject",
        axis: int = 0,
        rows: bool = False,
    ) -> None:
        super().__init__()
        check_policy(off_manifold)
        self.num_orders = check_count(num_orders, "num_orders")
        self.axis, self.rows = check_count(axis, "axis", least=0), rows
        if self.axis > 2:
            raise OptionError(f"axis must be 0, 1 or 2, that of a column, got {axis}.")
        self.width, self.num_blocks, self.context_dim = width, num_blocks, context_dim
        self.off_manifold = off_manifold
        self.latent_shape = self.data_shape = (4,)
        self._sizes = [2 * order + 1 for order in range(1, num_orders + 1)]
        self.net = ResidualMLP(3, 1 + 2 * sum(self._sizes), width, num_blocks, context_dim)
        start_at_zero(self.net.output)
        self._frame = nn.Buffer(_columns(), persistent=False)
        self.takes_context = self.needs_context = context_dim > 0

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Unit quaternions (B, 4) to unit quaternions, with the log-factor (B,) in nats."""
        q = self._to_first(unit_vectors(z, self.off_manifold, "z"))
        turn, rows = self._maps(q, context)
        log_det = torch.zeros_like(turn)
        for order, row in enumerate(rows, start=1):
            step, log_derivative = _moebius(row, order * turn)
            turn, log_det = turn + step / order, log_det + log_derivative
        return self._from_first(_turned(q, turn)), log_det

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Unit quaternions (B, 4) back, with minus the log-factor (B,) in nats."""
        q = self._to_first(unit_vectors(x, self.off_manifold, "x"))
        last, rows = self._maps(q, context)
        turn = log_det = torch.zeros_like(last)
        for order, row in reversed(list(enumerate(rows, start=1))):
            step, log_derivative = _moebius(-row, order * turn)
            turn, log_det = turn + step / order, log_det + log_derivative
        return self._from_first(_turned(q, turn - last)), log_det

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return (
            f"num_orders={self.num_orders}, context_dim={self.context_dim}, axis={self.axis}, "
            f"rows={self.rows}"
        )

    def _to_first(self, q: Tensor) -> Tensor:
        """Quaternions (B, 4) of rotations whose first column is the column or row that stays."""
        # The conjugate is the transpose; a cycle of the last three numbers is one of the axes.
        return _cycled(conjugate(q) if self.rows else q, -self.axis)

    def _from_first(self, q: Tensor) -> Tensor:
        """The way back from :meth:`_to_first`."""
        q = _cycled(q, self.axis)
        return conjugate(q) if self.rows else q

    def _maps(self, q: Tensor, context: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        r"""The turn (B,) of all circles, and beta (B,), a complex number, of every degree."""
        pairs = (q.unsqueeze(2) * q.unsqueeze(1)).flatten(1)
        first, second, third = (pairs @ self._frame.to(q)).split(3, dim=1)
        turn, real, imaginary = self.net(first, context).split([1, *2 * [sum(self._sizes)]], dim=1)
        products = _products(torch.complex(second, third), self.num_orders)
        betas = torch.complex(real, imaginary) * products
        parts = [part.sum(1) for part in betas.split(self._sizes, dim=1)]
        return turn.squeeze(1), list(_bounded(torch.stack(parts)).unbind(0))


def _bounded(betas: Tensor) -> Tensor:
    """Complex numbers with their phases, and lengths below the bound."""
    squares = betas.real.square() + betas.imag.square()
    return betas * (1 + squares / BOUND**2).rsqrt()


def _cycled(q: Tensor, by: int) -> Tensor:
    """Quaternions (B, 4) with their vectors' coordinates moved round."""
    return torch.cat([q[:, :1], q[:, 1:].roll(by, 1)], dim=1) if by else q


def _columns() -> Tensor:
    """The matrix (16, 9) from products of a quaternion with itself to columns of its rotation."""
    # A quadratic form from its values, where those of sums of two basis vectors give the rest.
    basis = torch.eye(4)
    values = matrix_from_quaternion(basis).mT.flatten(1)
    sums = matrix_from_quaternion(basis.unsqueeze(1) + basis).mT.flatten(2)
    return ((sums - values.unsqueeze(1) - values) / 2).flatten(0, 1)


def _products(m: Tensor, num_orders: int) -> Tensor:
    r"""Products :math:`(\tfrac{m_1 \pm i m_2}2)^a m_3^{k-a}` of all degrees, none above one."""
    (a, b, c), (d, e, f) = m.real.unbind(1), m.imag.unbind(1)
    first = torch.complex(
        torch.stack([(a - e) / 2, c, (a + e) / 2], dim=1),
        torch.stack([(d + b) / 2, f, (d - b) / 2], dim=1),
    )
    sums, middle, differences = first.split(1, dim=1)
    last = first
    found = [last]
    for _ in range(1, num_orders):
        last = torch.cat([sums * last[:, :1], middle * last, differences * last[:, -1:]], dim=1)
        found.append(last)
    return torch.cat(found, dim=1)


def _moebius(beta: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    r"""Angle :math:`2\arg(\rho - \beta e^{-i t})` (B,) after a turn t, and its log-derivative."""
    turned = beta * torch.polar(torch.ones_like(turn), -turn)
    x, y = turned.real, turned.imag
    rest = 1 + y.square()
    length = (rest + x.square()).sqrt()
    # rho - x, whose digits are lost for large x, is (1 + y^2) / (rho + x).
    real = torch.where(x > 0, rest / (length + x.clamp_min(0)), length - x)
    return -2 * torch.atan2(y, real), -(real.square() + y.square()).log()


def _turned(q: Tensor, turn: Tensor) -> Tensor:
    """Quaternions (B, 4) after a turn (B,) about their own first axis."""
    w, x, y, z = q.unbind(1)
    cosine, sine = (turn / 2).cos(), (turn / 2).sin()
    parts = (
        w * cosine - x * sine,
        x * cosine + w * sine,
        y * cosine + z * sine,
        z * cosine - y * sine,
    )
    return torch.stack(parts, dim=1)

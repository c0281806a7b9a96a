"""A monotone map of the distance from the origin."""

from __future__ import annotations

import math
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from ...checks import check_batch, check_count, check_event_shape, check_interval
from ...errors import ShapeError
from ...modules.precision import as_factored
from ..layer import Layer

__all__ = ["RadialFlow1D"]

# Share of a standard normal that may lie below, and above, the default range of the knots.
_OUTSIDE = 1e-3
# Bound of the logarithms of the slopes: of either sign, so that both directions keep digits.
_MAX_LOG_SLOPE = 6.0


@final
class RadialFlow1D(Layer):
    r"""Move points along their rays by a learned monotone map of the radius.

    .. math:: x = e^{h(u) - u} z, \quad u = \log \lVert z \rVert, \qquad
              \log\det = \log h'(u) + D \, (h(u) - u)

    :math:`h` is a rational-quadratic spline with fixed knots, between :math:`h(u) = u + b` below
    the first, where the layer is a plain scaling and smooth through the origin, and a line of
    learned slope beyond the last. It starts as the identity, and commutes with rotations. Behind
    it any radial base density is in reach, so that one such layer at the base lifts the floor
    under volume-preserving flows.

    Args:
        dim: :math:`D`.
        num_bins: Number of bins :math:`K`; the layer has :math:`2K + 1` parameters.
        log_range: First and last knot, as logarithms of radii. By default they enclose the radii
            of a standard normal in :math:`D` dimensions, all but a thousandth on either side;
            :meth:`from_data` chooses by samples.

    Raises:
        OptionError: If a count is not a positive integer, or the range is empty.

    References:
        Radial layer and its log-det: derived here, from the polar volume :math:`r^{D-1}`.
        Spline: Gregory and Delbourgo 1982, as in Durkan et al., arXiv 1906.04032, equations 4-8.

    Examples:
        >>> flow = RadialFlow1D(2)
        >>> _ = flow.offset.data.fill_(math.log(3))
        >>> x, log_det = flow(torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
        >>> x.round(decimals=4).tolist(), log_det.exp().round(decimals=3).tolist()
        ([[0.0, 0.0], [0.0, 3.0]], [9.0, 9.0])
    """

    def __init__(
        self, dim: int, num_bins: int = 24, log_range: tuple[float, float] | None = None
    ) -> None:
        super().__init__()
        check_count(dim, "dim")
        check_count(num_bins, "num_bins")
        if log_range is None:
            log_range = _normal_log_radii(dim)
        low, high = check_interval(
            log_range, "log_range", "Give two finite, increasing logarithms of radii."
        )
        self.dim, self.shape, self.num_bins = dim, (dim,), num_bins
        self.knots = nn.Buffer(torch.linspace(low, high, num_bins + 1))
        self.offset = nn.Parameter(torch.zeros(()))
        self.log_slopes = nn.Parameter(torch.zeros(num_bins))
        # At the knots but the first, whose derivative is that of the scaling below it: one.
        self.log_derivatives = nn.Parameter(torch.zeros(num_bins))

    @classmethod
    def from_data(cls, z: Tensor, num_bins: int = 24) -> RadialFlow1D:
        """A layer whose knots enclose the radii of samples, all but a thousandth on either side.

        Args:
            z: Samples of shape (N, D) of what the layer takes in its forward direction.
            num_bins: Number of bins.

        Raises:
            ShapeError: If z is not a matrix.
            OptionError: If the radii are all the same.

        Examples:
            >>> z = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
            >>> bool(RadialFlow1D.from_data(10 * z).knots[-1] > math.log(20))
            True
        """
        check_batch(z, "z")
        if z.dim() != 2:
            raise ShapeError(f"z must have shape (N, D), got {tuple(z.shape)}.")
        radii = torch.linalg.vector_norm(as_factored(z.detach()), dim=1).sort().values
        last = len(radii) - 1
        tiny = torch.finfo(torch.float32).tiny
        low, high = (
            math.log(max(float(radii[round(share * last)]), tiny))
            for share in (_OUTSIDE, 1 - _OUTSIDE)
        )
        return cls(z.shape[1], num_bins, (low, high)).to(z)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents (B, D) to data (B, D), with the log-det (B,) in nats."""
        check_event_shape(z, self.shape, "z")
        curve = self._curve()
        first, last = self.knots[0], self.knots[-1]
        u = _log_radius(z, first)
        inside = torch.minimum(u, last)
        piece = curve.pieces(inside, self.knots)
        theta = (inside - piece.left) / piece.width
        # Beyond the last knot the line through it goes on, with its derivative.
        image = piece.value(theta) + curve.derivatives[-1] * torch.relu(u - last)
        log_stretch = image - u
        x = z * log_stretch.exp().unsqueeze(1)
        return x, piece.log_derivative(theta) + self.shape[0] * log_stretch

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (B, D) to latents (B, D), with the log-det (B,) in nats."""
        check_event_shape(x, self.shape, "x")
        curve = self._curve()
        first, last = curve.heights[0], curve.heights[-1]
        image = _log_radius(x, first)
        inside = torch.minimum(image, last)
        piece = curve.pieces(inside, curve.heights)
        theta = piece.solve(inside)
        u = piece.left + theta * piece.width
        u = u + torch.relu(image - last) / curve.derivatives[-1]
        log_stretch = u - image
        z = x * log_stretch.exp().unsqueeze(1)
        return z, self.shape[0] * log_stretch - piece.log_derivative(theta)

    @property
    def log_range(self) -> tuple[float, float]:
        """Logarithms of the radii of the first and the last knot."""
        return float(self.knots[0]), float(self.knots[-1])

    @property
    def takes_context(self) -> bool:
        """False: the keyword is accepted and not used."""
        return False

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        low, high = float(self.knots[0]), float(self.knots[-1])
        return f"dim={self.shape[0]}, num_bins={self.num_bins}, log_range=({low:.3g}, {high:.3g})"

    def _curve(self) -> _Curve:
        slopes, derivatives = _slopes(self.log_slopes), _slopes(self.log_derivatives)
        rises = (slopes * self.knots.diff()).cumsum(0)
        start = self.knots[:1] + self.offset
        return _Curve(
            self.knots,
            torch.cat([start, start + rises]),
            slopes,
            torch.cat([torch.ones_like(start), derivatives]),
        )


class _Curve(NamedTuple):
    """Knots, heights and derivatives (K + 1,) of a monotone spline, and mean slopes (K,)."""

    knots: Tensor
    heights: Tensor
    slopes: Tensor
    derivatives: Tensor

    def pieces(self, values: Tensor, edges: Tensor) -> _Piece:
        """The bin of every value (B,) among edges (K + 1,), the knots or the heights."""
        # Comparisons, unlike a search, go through vmap and compilation; K is small.
        index = (values.detach().unsqueeze(-1) >= edges.detach()[1:-1]).sum(-1)
        width = self.knots.diff()[index]
        return _Piece(
            self.knots[:-1][index],
            width,
            self.heights[:-1][index],
            width * self.slopes[index],
            self.slopes[index],
            self.derivatives[:-1][index],
            self.derivatives[1:][index],
        )


class _Piece(NamedTuple):
    """The bin of every sample, all (B,): origin, sizes, mean slope, derivatives at its ends."""

    left: Tensor
    width: Tensor
    bottom: Tensor
    height: Tensor
    slope: Tensor
    first: Tensor
    second: Tensor

    def value(self, theta: Tensor) -> Tensor:
        """The spline at a share theta of the bin."""
        mixed = theta * (1 - theta)
        rise = self.slope * theta.square() + self.first * mixed
        return self.bottom + self.height * rise / self._denominator(mixed)

    def log_derivative(self, theta: Tensor) -> Tensor:
        """Logarithm of its derivative there."""
        mixed = theta * (1 - theta)
        weighted = (
            self.second * theta.square()
            + 2 * self.slope * mixed
            + self.first * (1 - theta).square()
        )
        return 2 * (self.slope.log() - self._denominator(mixed).log()) + weighted.log()

    def solve(self, image: Tensor) -> Tensor:
        """The share theta of the bin at which the spline takes a value.

        The equation is quadratic in theta, and this form of its root in [0, 1] cancels no digits:
        both terms of the denominator are of one sign.
        """
        rise = image - self.bottom
        bend = rise * (self.first + self.second - 2 * self.slope)
        a = self.height * (self.slope - self.first) + bend
        b = self.height * self.first - bend
        c = self.slope * rise
        return 2 * c / (b + (b.square() + 4 * a * c).sqrt())

    def _denominator(self, mixed: Tensor) -> Tensor:
        return self.slope + (self.first + self.second - 2 * self.slope) * mixed


def _slopes(parameters: Tensor) -> Tensor:
    return (_MAX_LOG_SLOPE * torch.tanh(parameters / _MAX_LOG_SLOPE)).exp()


def _log_radius(points: Tensor, floor: Tensor) -> Tensor:
    # Below the first knot the layer is a scaling, whatever the radius: values and derivatives at
    # the floor are those at every smaller radius, and the origin is no special point.
    squares = points.square().sum(1)
    return 0.5 * torch.maximum(squares, (2 * floor).exp()).log()


def _normal_log_radii(dim: int) -> tuple[float, float]:
    """Log-radii that enclose a standard normal but for a share of 1e-3 on either side.

    The mass within r is at most the volume of the ball times the density at zero, which is
    (r^2/2)^(D/2) / Gamma(D/2 + 1); above, Laurent and Massart 2000, lemma 1, bound the mass of
    squared radii beyond D + 2 sqrt(D t) + 2 t by exp(-t).
    """
    low = 0.5 * math.log(2) + (math.log(_OUTSIDE) + math.lgamma(dim / 2 + 1)) / dim
    t = -math.log(_OUTSIDE)
    return low, 0.5 * math.log(dim + 2 * math.sqrt(dim * t) + 2 * t)

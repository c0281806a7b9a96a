"""A monotone map of the distance from the origin."""

from __future__ import annotations

import math
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from ...checks import check_batch, check_interval
from ...errors import ShapeError
from ...modules.precision import as_factored
from ..layer import Layer
from ..splines import Bin

# Share of a standard normal that may lie below, and above, the default range of the knots.
_OUTSIDE = 1e-3
# Bound of the logarithms of the slopes: of either sign, so that both directions keep digits.
_MAX_LOG_SLOPE = 6.0


@final
class RadialFlow1D(Layer):
    r"""Move points along their rays by a learned monotone map of the radius.

    .. math:: x = e^{h(u) - u} z, \quad u = \log \lVert z \rVert, \qquad
              \log\det = \log h'(u) + D \, (h(u) - u)

    :math:`h` is a rational-quadratic spline with fixed knots. Below the first knot
    :math:`h(u) = u + b`, so that the layer is a plain scaling and smooth through the origin;
    beyond the last knot :math:`h` is a line of learned slope. The layer starts as the identity and
    commutes with rotations. It turns a normal base into any radial density, so one such layer at
    the base lifts the floor under volume-preserving flows.

    Args:
        dim: :math:`D`.
        num_bins: Number of bins :math:`K`; the layer has :math:`2K + 1` parameters.
        log_range: First and last knot, as logarithms of radii. By default at most a thousandth
            of a standard normal in :math:`D` dimensions lies beyond either; :meth:`from_data`
            chooses them from samples.

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

    takes_context = False

    def __init__(
        self, dim: int, num_bins: int = 24, log_range: tuple[float, float] | None = None
    ) -> None:
        super().__init__()
        if log_range is None:
            log_range = _normal_log_radii(dim)
        low, high = check_interval(
            log_range, "log_range", "Give two finite, increasing logarithms of radii."
        )
        self.dim, self.shape, self.num_bins = dim, (dim,), num_bins
        self.knots = nn.Buffer(torch.linspace(low, high, num_bins + 1))
        self.offset = nn.Parameter(torch.zeros(()))
        self.log_slopes = nn.Parameter(torch.zeros(num_bins))
        # At all knots but the first, whose derivative is that of the scaling below it: one.
        self.log_derivatives = nn.Parameter(torch.zeros(num_bins))

    @classmethod
    def from_data(cls, z: Tensor, num_bins: int = 24) -> RadialFlow1D:
        """A layer whose knots enclose the radii of samples but for a thousandth on either side.

        Args:
            z: Latents of the layer, (N, D).
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
        curve = self._curve()
        first, last = self.knots[0], self.knots[-1]
        u = _log_radius(z, first)
        inside = torch.minimum(u, last)
        image, log_derivative = curve.bins(inside, self.knots).image(inside)
        # Beyond the last knot the line through it goes on, with its derivative.
        image = image + curve.derivatives[-1] * torch.relu(u - last)
        log_stretch = image - u
        x = z * log_stretch.exp().unsqueeze(1)
        return x, log_derivative + self.dim * log_stretch

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (B, D) to latents (B, D), with the log-det (B,) in nats."""
        curve = self._curve()
        first, last = curve.heights[0], curve.heights[-1]
        image = _log_radius(x, first)
        inside = torch.minimum(image, last)
        u, log_derivative = curve.bins(inside, curve.heights).preimage(inside)
        u = u + torch.relu(image - last) / curve.derivatives[-1]
        log_stretch = u - image
        z = x * log_stretch.exp().unsqueeze(1)
        return z, log_derivative + self.dim * log_stretch

    @property
    def log_range(self) -> tuple[float, float]:
        """Logarithms of the radii of the first and the last knot."""
        return float(self.knots[0]), float(self.knots[-1])

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        low, high = self.log_range
        return f"dim={self.dim}, num_bins={self.num_bins}, log_range=({low:.3g}, {high:.3g})"

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

    def bins(self, values: Tensor, edges: Tensor) -> Bin:
        """The bin of every value (B,) among edges (K + 1,), the knots or the heights."""
        # Comparisons, unlike a search, go through vmap and compilation; K is small.
        index = (values.detach().unsqueeze(-1) >= edges.detach()[1:-1]).sum(-1)
        width = self.knots.diff()[index]
        return Bin(
            left=self.knots[:-1][index],
            width=width,
            bottom=self.heights[:-1][index],
            height=width * self.slopes[index],
            slope=self.slopes[index],
            first=self.derivatives[:-1][index],
            last=self.derivatives[1:][index],
        )


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

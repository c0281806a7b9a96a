r"""Charts of lines, half-lines and intervals, for columns that are plain numbers.

Their coordinates are of the order of one and their bases normal. An interval takes the
distribution function of the normal law, so that its uniform law is a standard normal one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import final

import torch
from torch import Tensor, nn

from ...checks import as_floating, check_finite, check_positive, is_readable
from ...errors import OffManifoldError, OptionError
from .surface import Chart

_LOG_SQRT_TWO_PI = 0.5 * math.log(2 * math.pi)


class ColumnChart(Chart):
    """A chart of one column; a base class. Its measure is the length in the column's unit."""

    measure = "lebesgue"
    latent_shape = data_shape = (1,)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coordinates (B, 1) to the column (B, 1), with the log-volume (B,) in nats."""
        return self._to_column(z), self._log_slope(z).squeeze(1)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The column (B, 1) to coordinates (B, 1), with minus the log-volume (B,) in nats."""
        self._refuse_outside(x)
        z = self._from_column(x)
        return z, -self._log_slope(z).squeeze(1)

    @abstractmethod
    def _to_column(self, z: Tensor) -> Tensor:
        """Numbers (B, 1) of coordinates (B, 1)."""

    @abstractmethod
    def _from_column(self, x: Tensor) -> Tensor:
        """Coordinates (B, 1) of numbers (B, 1)."""

    @abstractmethod
    def _log_slope(self, z: Tensor) -> Tensor:
        """Logarithm (B, 1) of the derivative of the column at coordinates (B, 1)."""

    def _refuse_outside(self, x: Tensor) -> None:
        """Raise where numbers are outside of the column's range."""


@final
class LineChart(ColumnChart):
    r"""A column of any numbers, :math:`x = m + s z`.

    Args:
        loc: :math:`m`, in the unit of the column.
        scale: :math:`s > 0`, in the unit of the column.

    Raises:
        OptionError: If the scale is not positive.

    References:
        A change of units.

    Examples:
        >>> LineChart(20.0, 5.0)(torch.tensor([[1.0]]))
        (tensor([[25.]]), tensor([1.6094]))
    """

    def __init__(self, loc: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        check_positive(scale, "scale")
        self.loc = nn.Buffer(as_floating(float(loc), "loc"))
        self.scale = nn.Buffer(as_floating(float(scale), "scale"))

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"loc={float(self.loc):.4g}, scale={float(self.scale):.4g}"

    def _to_column(self, z: Tensor) -> Tensor:
        return self.loc + self.scale * z

    def _from_column(self, x: Tensor) -> Tensor:
        return (x - self.loc) / self.scale

    def _log_slope(self, z: Tensor) -> Tensor:
        return self.scale.log().expand_as(z)


@final
class HalfLineChart(ColumnChart):
    r"""A column of numbers above a bound, :math:`x = l + e^{m + s z}`.

    Args:
        lower: :math:`l`, in the unit of the column.
        loc: :math:`m`, of the logarithm of the distance from the bound.
        scale: :math:`s > 0`, of that logarithm.

    Raises:
        OptionError: If the scale is not positive.

    References:
        A log-normal column has a normal coordinate.

    Examples:
        >>> HalfLineChart()(torch.tensor([[0.0], [1.0]]))
        (tensor([[1.0000],
                [2.7183]]), tensor([0., 1.]))
    """

    def __init__(self, lower: float = 0.0, loc: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        check_positive(scale, "scale")
        self.lower = float(lower)
        self.loc = nn.Buffer(as_floating(float(loc), "loc"))
        self.scale = nn.Buffer(as_floating(float(scale), "scale"))

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"lower={self.lower:g}, loc={float(self.loc):.4g}, scale={float(self.scale):.4g}"

    def _to_column(self, z: Tensor) -> Tensor:
        x = self.lower + (self.loc + self.scale * z).exp()
        check_finite(x, "the column", "Its logarithm has left the range of the dtype.")
        return x

    def _from_column(self, x: Tensor) -> Tensor:
        return ((x - self.lower).log() - self.loc) / self.scale

    def _log_slope(self, z: Tensor) -> Tensor:
        return self.scale.log() + self.loc + self.scale * z

    def _refuse_outside(self, x: Tensor) -> None:
        _refuse(x, x > self.lower, f"above {self.lower:g}")


@final
class IntervalChart(ColumnChart):
    r"""A column of numbers between two bounds, :math:`x = a + (b - a)\, \Phi(z)`.

    A standard normal coordinate is the uniform law of the interval.

    Args:
        lower: :math:`a`, in the unit of the column.
        upper: :math:`b > a`.

    Raises:
        OptionError: If the bounds are not finite or in the wrong order.

    References:
        :math:`\Phi` is the distribution function of the standard normal law.

    Examples:
        >>> IntervalChart(0.0, 10.0).decode(torch.tensor([[0.0]]))
        tensor([[5.]])
    """

    def __init__(self, lower: float = 0.0, upper: float = 1.0) -> None:
        super().__init__()
        self.lower, self.upper = float(lower), float(upper)
        if not -math.inf < self.lower < self.upper < math.inf:
            raise OptionError(
                f"An interval needs finite bounds, the lower first, got {lower!r} and {upper!r}."
            )

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"lower={self.lower:g}, upper={self.upper:g}"

    def _to_column(self, z: Tensor) -> Tensor:
        # From the nearer end, so that numbers close to the upper one keep their digits; by erfc,
        # because torch's ndtr is zero below -8.3, or -5.5 in float32.
        share = 0.5 * torch.special.erfc(torch.where(z < 0, -z, z) / math.sqrt(2))
        width = self.upper - self.lower
        return torch.where(z < 0, self.lower + width * share, self.upper - width * share)

    def _from_column(self, x: Tensor) -> Tensor:
        width = self.upper - self.lower
        below, above = (x - self.lower) / width, (self.upper - x) / width
        z = torch.special.ndtri(below.minimum(above))
        return torch.where(below < above, z, -z)

    def _log_slope(self, z: Tensor) -> Tensor:
        return math.log(self.upper - self.lower) - _LOG_SQRT_TWO_PI - 0.5 * z.square()

    def _refuse_outside(self, x: Tensor) -> None:
        inside = (x > self.lower) & (x < self.upper)
        _refuse(x, inside, f"between {self.lower:g} and {self.upper:g}")


def _refuse(x: Tensor, inside: Tensor, where: str) -> None:
    if not is_readable(x) or bool(inside.all()):
        return
    index = int((~inside).flatten().nonzero()[0])
    number = float(x.detach().flatten()[index])
    raise OffManifoldError(
        f"{int((~inside).sum())} of {inside.numel()} numbers of the column are not {where}, the "
        f"first at index {index}: {number:.6g}. A density gives the bounds no mass: move such "
        "numbers inside, or give wider bounds."
    )

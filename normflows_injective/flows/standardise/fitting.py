"""Location, scale and transform of a column, which a few absurd values do not move.

The window of a column is its median and ten robust deviations on either side, or as much as holds
99 % of the values, if that is more; values beyond count as its ends. The robust deviation is
1.4826 times the median distance from the median, the standard deviation of a normal column. A
normal column has no values out there, so the moments of the winsorised values are its mean and
standard deviation, with the usual statistical error. The same holds for a column of spikes, if
they are more than 1 % of the values. Whatever the size of fewer absurd values, k among N, they
move the mean of a normal column by at most 10 k / N robust deviations, and the variance by at most
100 k / N of their squares. A median alone would also be robust, but is a poor location of columns
with two modes or a tail, which the window keeps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .power import likeliest_power, yeo_johnson

KINDS = ("none", "log", "power")
_NORMAL = 1.4826022185056018  # 1 / the median size of a standard normal variable
_DEVIATIONS = 10.0
# Part of the values that a window holds at least.
_MOST = 0.99
# Of rows that differ from the median, where the median distance is zero.
_FEW = 0.01
_STRONG_SKEWNESS = 1.0


class ColumnFit(NamedTuple):
    """The numbers of one column, and remarks on it in words."""

    kind: str
    power: float
    origin: float
    unit: float
    shift: float
    scale: float
    remarks: tuple[str, ...]


class Window(NamedTuple):
    """Median of a column, its robust deviation, and how far values count as they are.

    The deviation is zero where nearly all values are the median.
    """

    centre: float
    deviation: float
    reach: float

    @property
    def ends(self) -> tuple[float, float]:
        """The values beyond which others count as these."""
        return self.centre - self.reach, self.centre + self.reach

    def outside(self, values: Tensor) -> int:
        """How many values (N,) lie beyond ten robust deviations."""
        return int(((values - self.centre).abs() > _DEVIATIONS * self.deviation).sum())


def window_of(ordered: Tensor) -> Window:
    """The window of float64 values (N,) in order."""
    centre = _middle(ordered)
    distances = (ordered - centre).abs().sort().values
    deviation = _middle(distances)
    if deviation == 0:
        # More than half of the values are one: the scale is that of the others, if they are many
        # enough to be part of the column rather than a few mistakes in it.
        others = distances[distances > 0]
        if len(others) >= max(2.0, _FEW * len(ordered)):
            deviation = _middle(others)
    deviation *= _NORMAL
    most = distances[max(0, int(_MOST * len(ordered)) - 1)]
    return Window(centre, deviation, max(_DEVIATIONS * deviation, float(most)))


def fit_column(column: Tensor, kind: str) -> ColumnFit:
    """The numbers of a column (N,) under one kind of transform, for log a positive column."""
    values = column.double().sort().values
    if bool(values[0] == values[-1]):
        return ColumnFit("none", 1.0, 0.0, 1.0, float(values[0]), 1.0, ("constant",))
    window = window_of(values)
    if window.deviation == 0:
        others = int((values != window.centre).sum())
        remark = f"constant but for {others} of {len(values)} values"
        return ColumnFit("none", 1.0, 0.0, 1.0, window.centre, 1.0, (remark,))
    if kind == "log":
        return _moments(kind, values.log())
    if kind == "power":
        units = (values - window.centre) / window.deviation
        power = likeliest_power(units.clamp(-_DEVIATIONS, _DEVIATIONS))
        image, _ = yeo_johnson(units, units.new_tensor(power))
        fit = _moments(kind, image)
        at_end = ("exponent at the end of its range",) if power in (0.0, 2.0) else ()
        return fit._replace(
            power=power,
            origin=window.centre,
            unit=window.deviation,
            remarks=(*fit.remarks, *at_end),
        )
    return _moments(kind, values)


def chosen_kind(column: Tensor) -> str:
    """The kind of transform of a column (N,), by the skewness of its winsorised values.

    Up to 1 in size it is none. Beyond, it is log if all values are positive and that leaves at
    most 0.5; else power if that leaves at most half; else none, as for rare marks, whose skewness
    no transform changes.
    """
    values = column.double().sort().values
    window = window_of(values)
    if window.deviation == 0:
        return "none"
    skewness = abs(_skewness(values))
    if skewness <= _STRONG_SKEWNESS:
        return "none"
    if bool(values[0] > 0) and abs(_skewness(values.log())) <= 0.5 * _STRONG_SKEWNESS:
        return "log"
    units = (values - window.centre) / window.deviation
    power = likeliest_power(units.clamp(-_DEVIATIONS, _DEVIATIONS))
    left = abs(_skewness(yeo_johnson(units, units.new_tensor(power))[0]))
    return "power" if left <= 0.5 * skewness else "none"


def _moments(kind: str, ordered: Tensor) -> ColumnFit:
    """The fit by mean and standard deviation of winsorised values (N,)."""
    window = window_of(ordered)
    inside = _winsorised(ordered, window)
    remarks: tuple[str, ...] = ()
    if window.deviation > 0 and (beyond := window.outside(ordered)):
        share = f"{beyond} of {len(ordered)} values"
        remarks = (f"{share} beyond {_DEVIATIONS:.0f} robust deviations",)
    # About the centre, so that no digit is lost where the offset is large.
    centred = inside - window.centre
    shift, scale = float(window.centre + centred.mean()), float(centred.std(correction=0))
    # Of values that differ by less than can be told in squares nothing can be standardised.
    return ColumnFit(kind, 1.0, 0.0, 1.0, shift, scale if scale > 0 else 1.0, remarks)


def _winsorised(ordered: Tensor, window: Window) -> Tensor:
    return ordered.clamp(*window.ends) if window.deviation > 0 else ordered


def _skewness(ordered: Tensor) -> float:
    window = window_of(ordered)
    inside = _winsorised(ordered, window) - window.centre
    centred = inside - inside.mean()
    return float(centred.pow(3).mean() / centred.square().mean().pow(1.5))


def _middle(ordered: Tensor) -> float:
    """The median of values (N,) in order."""
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return float(torch.lerp(low, high, 0.5))

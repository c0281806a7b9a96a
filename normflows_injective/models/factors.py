"""The factors of a product by name: their charts, bases, and the maps that mix coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import normflows as nf
from torch import Tensor, nn

from ..checks import check_finite, describe
from ..distributions import (
    DiagGaussian,
    Pullback,
    UniformRotation,
    UniformSphere,
    UniformTorus,
)
from ..errors import OptionError
from ..flows.composite import InjectiveComposite
from ..flows.coupling.linear import LULinear
from ..flows.injection import Injection
from ..flows.on_coordinates import OnCoordinates
from ..flows.surfaces.intervals import HalfLineChart, IntervalChart, LineChart
from ..flows.surfaces.product import ProductSurface, angles_of
from ..flows.surfaces.rotations import AsRotation, HopfChart
from ..flows.surfaces.simplex import SimplexStickBreaking
from ..flows.surfaces.sphere import InChart, SphereChart, SphereLinear
from ..flows.surfaces.torus import TorusChart


class _Word(NamedTuple):
    """The counts of numbers that may follow a word, their meaning, and the chart."""

    counts: tuple[int, ...]
    numbers: str
    chart: Callable[..., Injection]


def factor_of(name: str, word: Any, data: Any, off_manifold: str) -> Injection:
    """The chart of a column by its word, or the chart that stands in its place."""
    if isinstance(word, Injection):
        return word
    if not isinstance(word, str):
        raise OptionError(
            f"The word of the column {name!r} must be a string or a chart, got {describe(word)}. "
            f"Words are {_listed()}."
        )
    kind, *texts = word.split(":")
    known, numbers = _WORDS.get(kind), [_number(text) for text in texts]
    if known is None or len(numbers) not in known.counts or None in numbers:
        raise OptionError(
            f"The word of the column {name!r} is not understood: {word!r}. Words are {_listed()}."
        )
    if kind in _COMPACT:
        return known.chart(off_manifold, *numbers)
    column = None if data is None else _column(name, data)
    return known.chart(column, *numbers)


def base_of(factor: Injection) -> nn.Module:
    """The uniform law of a compact factor in its chart, or else a standard normal one."""
    if isinstance(factor, TorusChart):
        return UniformTorus(factor.dim)
    first = _first_of(factor)
    if isinstance(first, SphereChart) and first.kind == "cot":
        return Pullback(UniformSphere(first.dim), SphereChart(first.dim))
    if isinstance(first, HopfChart):
        return Pullback(UniformRotation(off_manifold="project"), _rotation("project"))
    if angles_of(factor):
        raise OptionError(
            f"The chart {type(factor).__name__} has angles among its coordinates, and no uniform "
            "law is known for it. Build the model from AngularSpline, ProductSurface and a base "
            "of your own."
        )
    return DiagGaussian(math.prod(factor.latent_shape or ()), trainable=False)


def mixings(surface: ProductSurface) -> list[nf.flows.Flow]:
    """Maps that turn every sphere, and one linear map of all plain coordinates."""
    (dim,) = surface.latent_shape or (0,)
    maps: list[nf.flows.Flow] = []
    plain: list[int] = []
    for factor, coordinates in zip(surface.factors, surface.coordinates, strict=True):
        first = _first_of(factor)
        if isinstance(first, SphereChart) and first.kind == "cot":
            turn = InChart(SphereLinear(first.dim, rotate=True), SphereChart(first.dim))
            maps.append(OnCoordinates(turn, list(coordinates), dim))
        elif isinstance(first, HopfChart):
            turn = InChart(SphereLinear(4, rotate=True), HopfChart())
            maps.append(OnCoordinates(turn, list(coordinates), dim))
        elif not angles_of(factor):
            plain += coordinates
    if len(plain) > 1:
        maps.append(OnCoordinates(LULinear(len(plain)), plain, dim))
    return maps


def _first_of(factor: Any) -> Any:
    """The chart of a factor, which may be the first layer of a composite."""
    return next(iter(getattr(factor, "flows", [])), factor)


def _rotation(off_manifold: str) -> Injection:
    return InjectiveComposite([HopfChart(), AsRotation(off_manifold=off_manifold)])


def _line(column: Tensor | None) -> Injection:
    return LineChart() if column is None else LineChart(*_place_of(column))


def _half_line(column: Tensor | None, lower: float = 0.0) -> Injection:
    if column is None:
        return HalfLineChart(lower)
    HalfLineChart(lower).inverse(column.unsqueeze(1))  # refuses numbers below the bound
    return HalfLineChart(lower, *_place_of((column - lower).log()))


def _column(name: str, data: Any) -> Tensor:
    """One column of the data, in float64."""
    product = ProductSurface({name: LineChart()})
    column = product.rows(data).double().squeeze(1)
    check_finite(column, f"the column {name!r}", "Drop rows with gaps.")
    return column


def _place_of(column: Tensor) -> tuple[float, float]:
    """Mean and deviation of a column, whose scale is one where it is constant."""
    deviation = float(column.std(correction=0))
    return float(column.mean()), deviation if deviation > 0 else 1.0


def _circle(off_manifold: str, period: float = 2 * math.pi) -> Injection:
    is_radians = period == 2 * math.pi
    return TorusChart(1, period=period, start=None if is_radians else 0.0)


# Charts of compact factors take the policy for points off them, those of lines the data.
_COMPACT = {
    "between": _Word((2,), "two bounds", lambda policy, a, b: IntervalChart(a, b)),
    "circle": _Word((0, 1), "the period, or nothing for radians", _circle),
    "torus": _Word((1,), "the number of angles", lambda policy, dim: TorusChart(_whole(dim))),
    "sphere": _Word(
        (0, 1),
        "the number of coordinates, or nothing for three",
        lambda policy, dim=3.0: SphereChart(_whole(dim), "cot", policy),
    ),
    "rotation": _Word((0,), "", _rotation),
    "simplex": _Word(
        (1,),
        "the number of parts",
        lambda policy, dim: SimplexStickBreaking(_whole(dim), off_manifold=policy),
    ),
}
_WORDS = {
    "real": _Word((0,), "", _line),
    "positive": _Word((0,), "", _half_line),
    "above": _Word((1,), "the bound", _half_line),
    **_COMPACT,
}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _whole(number: float) -> Any:
    """A number as an integer where it is one, so that a layer can refuse others by name."""
    return int(number) if number.is_integer() else number


def _listed() -> str:
    words = (
        f"{kind}:... ({word.numbers})" if word.numbers else kind for kind, word in _WORDS.items()
    )
    return ", ".join(words)

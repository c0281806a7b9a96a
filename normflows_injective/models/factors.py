"""The factors of a product by name: their charts, bases, and the maps that mix coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import normflows as nf
from torch import Tensor, nn

from ..checks import check_finite, describe
from ..distributions import DiagGaussian, Pullback, UniformSphere, UniformTorus
from ..errors import OptionError
from ..flows.coupling.linear import LULinear
from ..flows.injection import Injection
from ..flows.on_coordinates import OnCoordinates
from ..flows.surfaces.intervals import HalfLineChart, IntervalChart, LineChart
from ..flows.surfaces.product import ProductSurface, angles_of
from ..flows.surfaces.simplex import SimplexStickBreaking
from ..flows.surfaces.sphere import InChart, SphereChart, SphereLinear
from ..flows.surfaces.torus import TorusChart

# Words with the numbers that follow them, and those that may be left out.
_WORDS = {
    "real": "",
    "positive": "",
    "above": "the bound",
    "between": "two bounds",
    "circle": "the period, or nothing for radians",
    "torus": "the number of angles",
    "sphere": "the number of coordinates, or nothing for three",
    "simplex": "the number of parts",
}


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
    try:
        numbers = [float(text) for text in texts]
        if kind in ("real", "positive", "above"):
            return _line(kind, numbers, name, data)
        return _COMPACT[kind](off_manifold, *numbers)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(
            f"The word of the column {name!r} is not understood: {word!r}. Words are {_listed()}."
        ) from error


def base_of(factor: Injection) -> nn.Module:
    """The uniform law of a compact factor in its chart, or else a standard normal one."""
    if isinstance(factor, TorusChart):
        return UniformTorus(factor.dim)
    sphere = _sphere_of(factor)
    if sphere is not None and sphere.kind == "cot":
        return Pullback(UniformSphere(sphere.dim), SphereChart(sphere.dim))
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
        sphere = _sphere_of(factor)
        if sphere is not None and sphere.kind == "cot":
            turn = InChart(SphereLinear(sphere.dim, rotate=True), SphereChart(sphere.dim))
            maps.append(OnCoordinates(turn, list(coordinates), dim))
        elif not angles_of(factor):
            plain += coordinates
    if len(plain) > 1:
        maps.append(OnCoordinates(LULinear(len(plain)), plain, dim))
    return maps


def _sphere_of(factor: Any) -> SphereChart | None:
    """The chart of the sphere of a factor, or of the surface around a centre that it leads to."""
    first = next(iter(getattr(factor, "flows", [])), factor)
    return first if isinstance(first, SphereChart) else None


def _line(kind: str, numbers: list[float], name: str, data: Any) -> Injection:
    """A line, or a half-line, with location and scale of the data where they are given."""
    if len(numbers) != (kind == "above"):
        raise TypeError(kind)
    lower = None if kind == "real" else sum(numbers)
    if data is None:
        return LineChart() if lower is None else HalfLineChart(lower)
    column = _column(name, data)
    if lower is None:
        return LineChart(*_place_of(column))
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


# Charts of compact factors, from the policy for points off them and the numbers of their word.
_COMPACT: dict[str, Callable[..., Injection]] = {
    "between": lambda off_manifold, lower, upper: IntervalChart(lower, upper),
    "circle": _circle,
    "torus": lambda off_manifold, dim: TorusChart(int(dim)),
    "sphere": lambda off_manifold, dim=3: SphereChart(int(dim), "cot", off_manifold),
    "simplex": lambda off_manifold, dim: SimplexStickBreaking(int(dim), off_manifold=off_manifold),
}


def _listed() -> str:
    words = (f"{word}:... ({rest})" if rest else word for word, rest in _WORDS.items())
    return ", ".join(words)

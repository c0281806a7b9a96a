r"""Maps of points and densities on the torus, the sphere and the rotations of space.

The sphere is drawn in Mollweide's projection, which keeps areas: equal numbers of points per area
look equally dense everywhere. With an auxiliary angle :math:`\vartheta`,

.. math:: x = \frac{2 \sqrt 2}{\pi} \lambda \cos\vartheta, \qquad y = \sqrt 2 \sin\vartheta, \qquad
          2 \vartheta + \sin 2 \vartheta = \pi \sin\varphi

A graticule is all that is drawn beside them. Coastlines are data of one planet, with a source and
a date, and most spheres are others; draw yours by ``plot_globe`` as points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checks import checks_arguments, numbers_of
from ..errors import OptionError, ShapeError
from ..points import (
    directions_from_lat_lon,
    lat_lon_from_directions,
    matrices_from_quaternions,
    wrap,
)
from .figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A tensor, an array or a list of numbers.
Numbers = Any
LogProb = Callable[[Tensor], Tensor]

_PIXELS = 240
_CHUNK = 8192
# Log-densities further below the largest than this have the darkest colour.
_DEPTH = 10.0
_EDGE = 2 * math.sqrt(2)
_POINTS = "#00c8e0"
_DENSITY = "magma"


@checks_arguments
def plot_torus(
    angles: Numbers | None = None,
    log_prob: LogProb | None = None,
    *,
    names: tuple[str, str] = ("first angle", "second angle"),
    ax: Axes | None = None,
) -> Axes:
    r"""Draw pairs of angles on the square from -180° to 180°, as in a Ramachandran plot.

    The left edge continues at the right one, and the lower edge at the upper one.

    Args:
        angles: Points :math:`\theta` of shape (N, 2) in **radians**, of any number of turns.
        log_prob: Function of angles (M, 2) in radians in :math:`[-\pi, \pi)` that gives
            log-densities (M,) in nats, which become colours. A model on pairs of cosines and sines
            is ``lambda a: model.log_prob(nfi.points.unit_vectors_from_angles(a))``.
        names: Names of the two angles, such as ``("phi", "psi")``.
        ax: Plain matplotlib axes to draw on; those of a new figure if None.

    Returns:
        The axes, not shown and not saved; ``.figure`` is the figure.

    Raises:
        ShapeError: If the angles are no pairs, or log_prob does not give one number for each.
        OptionError: If there is neither a point nor a density, or matplotlib is not installed.
        NonFiniteError: If an angle is NaN or infinite.

    References:
        Ramachandran, Ramakrishnan and Sasisekharan, Journal of Molecular Biology 7, 1963.

    Examples:
        >>> axes = plot_torus(torch.zeros(1, 2), names=("phi", "psi"))
        >>> axes.get_xlabel()
        'phi, degrees'
    """
    points = None if angles is None else wrap(_rows(angles, 2, "angles")).rad2deg()
    names = _two_names(names)
    axes = _axes(ax, points is None and log_prob is None, (5.4, 4.6))
    if log_prob is not None:
        edges = torch.linspace(-180, 180, _PIXELS + 1, dtype=_dtype(points))
        centres = (edges[1:] + edges[:-1]) / 2
        grid = torch.cartesian_prod(centres, centres).deg2rad()
        # Rows of an image are the second angle.
        image = _evaluated(log_prob, grid).reshape(_PIXELS, _PIXELS).T
        _shade(axes, image, (-180, 180, -180, 180), f"{-2 * math.log(2 * math.pi):.2f}")
    if points is not None:
        _scatter(axes, points.double().numpy(force=True), None)
    ticks = range(-180, 181, 60)
    axes.set(xlim=(-180, 180), ylim=(-180, 180), aspect="equal", xticks=ticks, yticks=ticks)
    axes.set(xlabel=f"{names[0]}, degrees", ylabel=f"{names[1]}, degrees")
    axes.set_title("torus: opposite edges are the same line", fontsize=10)
    return axes


@checks_arguments
def plot_globe(
    points: Numbers | None = None, log_prob: LogProb | None = None, *, ax: Axes | None = None
) -> Axes:
    r"""Draw points and a density on the whole sphere, in Mollweide's projection.

    It keeps areas, so that points look as dense as they are. North is up and east is
    right, as on a map of the Earth seen from outside; 0°N 0°E, the axis +x, is in the middle.

    Args:
        points: Unit vectors of shape (N, 3).
        log_prob: Function of unit vectors (M, 3) that gives log-densities (M,) in nats against
            area, which become colours: ``model.log_prob``.
        ax: Plain matplotlib axes to draw on; those of a new figure if None.

    Returns:
        The axes, not shown and not saved; ``.figure`` is the figure.

    Raises:
        ShapeError: If the points have other shapes, or log_prob gives not one number for each.
        OffManifoldError: If the norm of a point is not one within 1e-4.
        OptionError: If there is neither a point nor a density, or matplotlib is not installed.
        NonFiniteError: If a coordinate is NaN or infinite.

    References:
        Snyder, Map Projections: A Working Manual, 1987, page 249.

    Examples:
        >>> axes = plot_globe(torch.eye(3))
        >>> axes.get_title()
        'sphere: an equal-area map'
    """
    places = None if points is None else _rows(points, 3, "points")
    flat = None if places is None else _projected(places)
    axes = _axes(ax, places is None and log_prob is None, (7.4, 4.0))
    if log_prob is not None:
        directions, inside = _pixels(_dtype(places))
        image = torch.full(inside.shape, math.nan, dtype=torch.float64)
        image[inside] = _evaluated(log_prob, directions)
        extent = (-_EDGE, _EDGE, -_EDGE / 2, _EDGE / 2)
        _shade(axes, image, extent, f"{-math.log(4 * math.pi):.2f}")
    _draw_frame(axes, log_prob is not None)
    if flat is not None:
        _scatter(axes, flat, None)
    axes.set_title("sphere: an equal-area map", fontsize=10)
    axes.set_xlabel("+x is 0°N 0°E, +y is 0°N 90°E, +z is the north pole", fontsize=9)
    return axes


@checks_arguments
def plot_rotations(quaternions: Numbers, *, ax: Axes | None = None) -> Axes:
    r"""Draw rotations as points of the sphere, where they take the z axis, with a colour.

    A rotation is first a turn about z by the angle :math:`\psi`, which is the colour, and then the
    shortest rotation that takes z to the place of the point, :math:`R e_z`:

    .. math:: \psi = 2 \operatorname{atan2}(q_z, q_w)

    The identity is at the north pole in the colour of 0°. At the south pole the shortest rotation
    is not unique, and colours change fast around it; no other choice avoids such a place.

    Args:
        quaternions: Unit quaternions of shape (N, 4), in the order (w, x, y, z).
        ax: Plain matplotlib axes to draw on; those of a new figure if None.

    Returns:
        The axes, not shown and not saved; ``.figure`` is the figure.

    Raises:
        ShapeError: If the quaternions have another shape.
        OffManifoldError: If a norm is not one within 1e-4.
        OptionError: If matplotlib is not installed.
        NonFiniteError: If a value is NaN or infinite.

    References:
        After Murphy, Esteves, Jampani, Ramalingam and Makadia, Implicit-PDF, arXiv 2106.05965,
        who tilt by another choice of the shortest rotation.

    Examples:
        >>> axes = plot_rotations([[1.0, 0.0, 0.0, 0.0]])
        >>> axes.get_title()
        'rotations: each where it takes the z axis'
    """
    rotations = _rows(quaternions, 4, "quaternions")
    flat = _projected(matrices_from_quaternions(rotations)[..., 2])
    turns = wrap(2 * torch.atan2(rotations[:, 3], rotations[:, 0])).rad2deg()
    axes = _axes(ax, False, (7.4, 4.0))
    _draw_frame(axes, False)
    colours = _scatter(axes, flat, turns.double().numpy(force=True))
    bar = axes.figure.colorbar(colours, ax=axes, ticks=range(-180, 181, 90), shrink=0.8)
    bar.set_label("turned about z before by, degrees")
    axes.set_title("rotations: each where it takes the z axis", fontsize=10)
    axes.set_xlabel("+x is 0°N 0°E, +y is 0°N 90°E, +z is the north pole", fontsize=9)
    return axes


def _rows(values: Numbers, width: int, name: str) -> Tensor:
    """Rows (N, width) without their graph."""
    rows = numbers_of(values, name).detach()
    if rows.dim() != 2 or rows.shape[1] != width:
        raise ShapeError(f"{name} must have shape (N, {width}), got {tuple(rows.shape)}.")
    return rows


def _two_names(names: Any) -> tuple[str, str]:
    is_pair = isinstance(names, tuple | list) and len(names) == 2
    if not is_pair or not all(isinstance(name, str) for name in names):
        raise OptionError(f"names must be two texts, such as ('phi', 'psi'), got {names!r}.")
    return names[0], names[1]


def _dtype(points: Tensor | None) -> torch.dtype:
    """The dtype in which a density is asked: that of the points, if there are any."""
    return torch.get_default_dtype() if points is None else points.dtype


def _axes(ax: Any, is_empty: bool, size: tuple[float, float]) -> Axes:
    """Plain axes to draw on."""
    if is_empty:
        raise OptionError("There is nothing to draw. Give points, log_prob, or both.")
    if ax is None:
        return new_figure(*size).subplots()
    if getattr(ax, "name", "") != "rectilinear":
        raise OptionError(
            f"ax must be plain matplotlib axes, got {ax!r}. The projection is done here: make "
            "them by plt.subplots(), without projection=."
        )
    return ax


def _evaluated(log_prob: LogProb, points: Tensor) -> Tensor:
    """Log-densities (M,) of points in float64, asked for in chunks."""
    with torch.no_grad():
        parts = []
        for chunk in points.split(_CHUNK):
            part = log_prob(chunk)
            if not isinstance(part, Tensor) or part.shape != chunk.shape[:1]:
                got = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise ShapeError(
                    f"log_prob must give one log-density for each of {len(chunk)} points, a "
                    f"tensor of shape ({len(chunk)},), got {got}."
                )
            parts.append(part.double().cpu())
    return torch.cat(parts)


def _shade(
    axes: Axes, image: Tensor, extent: tuple[float, float, float, float], uniform: str
) -> None:
    """Colours of log-densities, from the lower left, with a bar that explains them."""
    finite = image[image.isfinite()]
    most = float(finite.max()) if len(finite) else 0.0
    least = max(float(finite.min()), most - _DEPTH) if len(finite) else -1.0
    drawn = axes.imshow(
        image.clamp(least).numpy(),
        extent=extent,
        origin="lower",
        cmap=_DENSITY,
        vmin=least,
        vmax=max(most, least + 1e-6),
        interpolation="nearest",
    )
    is_cut = len(finite) > 0 and float(finite.min()) < least
    bar = axes.figure.colorbar(drawn, ax=axes, shrink=0.8, extend="min" if is_cut else "neither")
    bar.set_label(f"log-density, nats (uniform: {uniform})")


def _scatter(axes: Axes, flat: NDArray[Any], turns: NDArray[Any] | None) -> Any:
    """Points (N, 2) as dots, smaller the more there are, coloured by angles in degrees."""
    size = min(24.0, max(2.0, 6000 / max(len(flat), 1)))
    style: dict[str, Any] = {"s": size, "edgecolors": "black", "linewidths": 0.04 * size**0.5}
    if turns is None:
        style |= {"color": _POINTS}
    else:
        style |= {"c": turns, "cmap": "hsv", "vmin": -180, "vmax": 180}
    return axes.scatter(flat[:, 0], flat[:, 1], zorder=3, **style)


def _mollweide(latitude: NDArray[Any], longitude: NDArray[Any]) -> NDArray[Any]:
    """Plane coordinates (N, 2) of latitudes and longitudes (N,) in radians."""
    # The auxiliary angle by its table, of nodes that are dense at the poles.
    nodes = np.sin(np.linspace(-np.pi / 2, np.pi / 2, 4001)) * np.pi / 2
    sines = (2 * nodes + np.sin(2 * nodes)) / np.pi
    angle = np.interp(np.sin(latitude), sines, nodes)
    x = _EDGE / np.pi * longitude * np.cos(angle)
    return np.stack([x, _EDGE / 2 * np.sin(angle)], 1)


def _projected(directions: Tensor) -> NDArray[Any]:
    """Plane coordinates (N, 2) of unit vectors (N, 3)."""
    latitude, longitude = lat_lon_from_directions(directions.double(), degrees=False)
    return _mollweide(latitude.numpy(force=True), longitude.numpy(force=True))


def _pixels(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Directions (M, 3) at the pixels within the ellipse, and which those are, (H, W)."""
    ticks = (torch.arange(_PIXELS, dtype=torch.float64) + 0.5) / _PIXELS * 2 - 1
    wide = (torch.arange(2 * _PIXELS, dtype=torch.float64) + 0.5) / _PIXELS - 1
    y, x = torch.meshgrid(ticks, wide, indexing="ij")
    inside = x.square() + y.square() < 1
    angle = y[inside].asin()
    latitude = ((2 * angle + (2 * angle).sin()) / math.pi).clamp(-1, 1).asin()
    longitude = math.pi * x[inside] / angle.cos()
    return directions_from_lat_lon(latitude, longitude, degrees=False).to(dtype), inside


def _draw_frame(axes: Axes, on_density: bool) -> None:
    """The outline, and parallels and meridians every 30 degrees, with their names."""
    from matplotlib.patheffects import withStroke

    line = np.linspace(-np.pi, np.pi, 181)
    style: dict[str, Any] = {"color": "white" if on_density else "0.7", "linewidth": 0.5}
    text: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "zorder": 4}
    for degrees in range(-150, 151, 30):
        axes.plot(*_on_map(line / 2, np.deg2rad(degrees)).T, **style)
    for degrees in range(-60, 61, 30):
        axes.plot(*_on_map(np.deg2rad(degrees), line).T, **style)
        place = _on_map(np.deg2rad(degrees), -np.pi)[0]
        name = _name_of(degrees, "NS")
        axes.annotate(name, place, (-8, 0), ha="right", va="center", **text)
    for degrees in range(-120, 121, 60):
        # An outline, because the density behind it is dark here and light there.
        outlined = {"path_effects": [withStroke(linewidth=2, foreground="white")], **text}
        place = _on_map(0.0, np.deg2rad(degrees))[0]
        axes.annotate(_name_of(degrees, "EW"), place, (2, 3), **outlined)
    turn = np.linspace(0, 2 * np.pi, 361)
    axes.plot(_EDGE * np.cos(turn), _EDGE / 2 * np.sin(turn), color="black", linewidth=0.8)
    margin = 1.02 * _EDGE
    axes.set(xlim=(-margin, margin), ylim=(-margin / 2, margin / 2), aspect="equal")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _name_of(degrees: int, sides: str) -> str:
    """A latitude or a longitude in words."""
    return f"{abs(degrees)}°{sides[degrees < 0]}" if degrees else "0°"


def _on_map(latitude: Any, longitude: Any) -> NDArray[Any]:
    """Plane coordinates (N, 2) of a line given in radians, one of whose coordinates is fixed."""
    return _mollweide(*map(np.atleast_1d, np.broadcast_arrays(latitude, longitude)))

"""Angles, latitudes and longitudes, and periodic times, as unit vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_positive, checks_arguments, numbers_of
from ..errors import ShapeError
from ..modules.turns import into_turn
from .refusals import Numbers, check_axes, check_same_shape, check_unit, refuse_where


@checks_arguments
def directions_from_lat_lon(latitude: Numbers, longitude: Numbers, degrees: bool = True) -> Tensor:
    r"""Turn latitudes and longitudes into unit vectors.

    .. math:: x = (\cos\varphi \cos\lambda,\; \cos\varphi \sin\lambda,\; \sin\varphi)

    The north pole is :math:`(0, 0, 1)`, and the place 0°N 0°E is :math:`(1, 0, 0)`. In degrees
    multiples of 90° lead to exact zeros and ones, and nothing is lost near a pole.

    Args:
        latitude: :math:`\varphi` of shape (*), from -90° to 90°, north positive.
        longitude: :math:`\lambda` of the same shape, of any number of turns, east positive.
        degrees: Whether both are in degrees; else they are in radians.

    Returns:
        Unit vectors :math:`x` of shape (*, 3).

    Raises:
        ShapeError: If the two have different shapes.
        OffManifoldError: If a latitude lies beyond a pole.
        NonFiniteError: If a value is NaN or infinite.

    References:
        Snyder, Map Projections: A Working Manual, 1987, of the sphere. Geodetic latitudes of an
        ellipsoid, such as those of GPS, are taken as they are, which moves points of the Earth by
        up to 0.19°.

    Examples:
        >>> directions_from_lat_lon([90.0, 0.0, 0.0], [0.0, 0.0, -90.0])
        tensor([[ 0.,  0.,  1.],
                [ 1.,  0.,  0.],
                [ 0., -1.,  0.]])
    """
    latitude, longitude = numbers_of(latitude, "latitude"), numbers_of(longitude, "longitude")
    check_same_shape(longitude.shape, latitude.shape, "longitude and latitude")
    turn = 360.0 if degrees else 2 * math.pi
    limit = turn / 4 * (1 + 4 * torch.finfo(latitude.dtype).eps)
    refuse_where(
        latitude.detach().abs() > limit,
        f"latitude must be from {-turn / 4:.6g} to {turn / 4:.6g}",
        latitude.detach(),
        "Were latitude and longitude swapped? Radians need degrees=False.",
    )
    cos_latitude, sin_latitude = _cos_sin(latitude, turn)
    cos_longitude, sin_longitude = _cos_sin(longitude, turn)
    x, y = cos_latitude * cos_longitude, cos_latitude * sin_longitude
    return torch.stack([x, y, sin_latitude.to(x.dtype)], -1)


@checks_arguments
def lat_lon_from_directions(x: Numbers, degrees: bool = True) -> tuple[Tensor, Tensor]:
    r"""Turn unit vectors into latitudes and longitudes.

    .. math:: \varphi = \operatorname{atan2}(x_3, \sqrt{x_1^2 + x_2^2}), \qquad
              \lambda = \operatorname{atan2}(x_2, x_1)

    No arc sine is taken, which would lose half of the digits near the poles. At a pole itself the
    longitude is zero, and its gradient, which is infinite, as well.

    Args:
        x: Unit vectors of shape (*, 3).
        degrees: Whether to return degrees; else radians.

    Returns:
        Latitudes (*) from -90° to 90° and longitudes (*) in [-180°, 180°).

    Raises:
        ShapeError: If x has another last axis.
        OffManifoldError: If a norm is not one within 1e-4.
        NonFiniteError: If a value is NaN or infinite.

    References:
        Snyder, Map Projections: A Working Manual, 1987.

    Examples:
        >>> lat_lon_from_directions(torch.tensor([[0.0, -0.6, 0.8], [-1.0, 0.0, 0.0]]))
        (tensor([53.1301,  0.0000]), tensor([ -90., -180.]))
    """
    x = numbers_of(x, "x")
    check_axes(x, (3,), "x")
    check_unit(x, "x")
    first, second, third = x.unbind(-1)
    radius, longitude = _polar(first, second)
    latitude = torch.atan2(third, radius)
    if degrees:
        return latitude.rad2deg(), into_turn(longitude.rad2deg(), 180.0)
    return latitude, into_turn(longitude, math.pi)


@checks_arguments
def unit_vectors_from_angles(angles: Numbers) -> Tensor:
    r"""Turn angles, points of a torus, into pairs of cosines and sines.

    .. math:: x = (\cos\theta_1, \sin\theta_1, \dots, \cos\theta_d, \sin\theta_d)

    Lengths are kept, so a density against the angles is one against the surface of the torus.

    Args:
        angles: :math:`\theta` of shape (*, d) in radians.

    Returns:
        Points :math:`x` of shape (*, 2 d), each pair of norm one.

    Raises:
        ShapeError: If there is no axis of angles.
        NonFiniteError: If a value is NaN or infinite.

    References:
        Mardia and Jupp, Directional Statistics, 2000.

    Examples:
        >>> unit_vectors_from_angles([[0.0, torch.pi / 6]])
        tensor([[1.0000, 0.0000, 0.8660, 0.5000]])
    """
    angles = numbers_of(angles, "angles")
    if angles.dim() == 0 or angles.shape[-1] == 0:
        raise ShapeError(
            f"angles must have shape (*, d) with at least one angle, got {tuple(angles.shape)}. "
            "Give a column of single angles an axis of its own, angles[:, None]."
        )
    return torch.stack([angles.cos(), angles.sin()], -1).flatten(-2)


@checks_arguments
def angles_from_unit_vectors(x: Numbers) -> Tensor:
    r"""Turn pairs of cosines and sines into angles.

    .. math:: \theta_i = \operatorname{atan2}(x_{2i}, x_{2i-1})

    Args:
        x: Points of shape (*, 2 d), each pair :math:`(x_{2i-1}, x_{2i})` of norm one.

    Returns:
        Angles :math:`\theta` of shape (*, d) in radians, in :math:`[-\pi, \pi)`.

    Raises:
        ShapeError: If the last axis is not even.
        OffManifoldError: If the norm of a pair is not one within 1e-4.
        NonFiniteError: If a value is NaN or infinite.

    References:
        Mardia and Jupp, Directional Statistics, 2000.

    Examples:
        >>> angles_from_unit_vectors(torch.tensor([0.0, 1.0, -1.0, 0.0]))
        tensor([ 1.5708, -3.1416])
    """
    x = numbers_of(x, "x")
    if x.dim() == 0 or x.shape[-1] == 0 or x.shape[-1] % 2:
        raise ShapeError(
            f"x must have shape (*, 2 d), a cosine and a sine for each of d angles, got "
            f"{tuple(x.shape)}."
        )
    pairs = x.unflatten(-1, (-1, 2))
    check_unit(pairs, "pairs of x")
    return into_turn(_polar(pairs[..., 0], pairs[..., 1])[1], math.pi)


@checks_arguments
def wrap(angles: Numbers) -> Tensor:
    r"""Bring angles into :math:`[-\pi, \pi)` by whole turns.

    .. math:: \theta - 2\pi \lfloor (\theta + \pi) / 2\pi \rfloor

    Angles that lie there already come back to the last digit. The gradient is one.

    Args:
        angles: :math:`\theta` of shape (*) in radians.

    Returns:
        Angles of the same shape.

    Raises:
        NonFiniteError: If a value is NaN or infinite.

    References:
        Mardia and Jupp, Directional Statistics, 2000.

    Examples:
        >>> wrap([0.5, 2 * torch.pi + 0.5, torch.pi])
        tensor([ 0.5000,  0.5000, -3.1416])
    """
    return into_turn(numbers_of(angles, "angles"), math.pi)


@checks_arguments
def angles_from_times(times: Numbers, period: float) -> Tensor:
    r"""Turn times that come round again into angles.

    .. math:: \theta = 2\pi t / T \pmod{2\pi}

    Args:
        times: :math:`t` of shape (*), in units of the period: hours of the day, days of the year.
        period: :math:`T > 0`: 24 for hours, 7 for days of the week, 365.25 for days of the year.

    Returns:
        Angles :math:`\theta` of the same shape in radians, in :math:`[-\pi, \pi)`; zero is the
        start of the period.

    Raises:
        OptionError: If the period is not positive.
        NonFiniteError: If a value is NaN or infinite.

    References:
        Mardia and Jupp, Directional Statistics, 2000.

    Examples:
        >>> angles_from_times([0, 6, 18, 30], period=24)
        tensor([ 0.0000,  1.5708, -1.5708,  1.5708])
    """
    half = check_positive(period, "period") / 2
    return into_turn(numbers_of(times, "times"), half) / half * math.pi


@checks_arguments
def times_from_angles(angles: Numbers, period: float) -> Tensor:
    r"""Turn angles into times of a period.

    .. math:: t = T \theta / 2\pi \pmod T

    Args:
        angles: :math:`\theta` of shape (*) in radians.
        period: :math:`T > 0`, the length of the period, whose units those of the times are.

    Returns:
        Times :math:`t` of the same shape in :math:`[0, T)`.

    Raises:
        OptionError: If the period is not positive.
        NonFiniteError: If a value is NaN or infinite.

    References:
        Mardia and Jupp, Directional Statistics, 2000.

    Examples:
        >>> times_from_angles([-torch.pi / 2, torch.pi / 2], period=24)
        tensor([18.,  6.])
    """
    period = check_positive(period, "period")
    times = into_turn(numbers_of(angles, "angles"), math.pi) / math.pi * (period / 2)
    times = torch.where(times < 0, times + period, times)
    # A negative time too small to be seen beside the period is the start of the next.
    return torch.where(times >= period, times - period, times)


def _cos_sin(values: Tensor, turn: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (*) of parts of a turn, exact at its quarters and accurate near them."""
    values = into_turn(values, turn / 2)
    quarters = (values.detach() / (turn / 4)).round()
    rest = (values - quarters * (turn / 4)) * (2 * math.pi / turn)
    cosines, sines = rest.cos(), rest.sin()
    is_odd, is_back = quarters.abs() == 1, quarters.abs() == 2
    signs = torch.where(quarters < 0, -1.0, 1.0).to(values.dtype)
    # By a quarter to the left or right the pair (c, s) becomes (-s, c) or (s, -c). The sum with
    # zero leaves no negative zeros.
    turned = torch.where(is_odd, -signs * sines, torch.where(is_back, -cosines, cosines)) + 0.0
    return turned, torch.where(is_odd, signs * cosines, torch.where(is_back, -sines, sines)) + 0.0


def _polar(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Radius and angle (*) of points of the plane, both zero at the origin, without gradient."""
    is_origin = (x == 0) & (y == 0)
    x, y = torch.where(is_origin, 1, x), torch.where(is_origin, 0, y)
    # The derivative of the angle takes squares, which would underflow near the origin.
    scale = torch.maximum(x.detach().abs(), y.detach().abs())
    return torch.where(is_origin, 0, torch.hypot(x, y)), torch.atan2(y / scale, x / scale)

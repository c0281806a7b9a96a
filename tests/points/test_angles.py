"""Columns of angles, places and times come to unit vectors, and back to rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.points import double
from support.seeds import properties, seeded_generator

from normflows_injective import points
from normflows_injective.errors import (
    DtypeError,
    NonFiniteError,
    OffManifoldError,
    OptionError,
    ShapeError,
)

DTYPES = [torch.float32, torch.float64]
# Poles, date line, equator, quarters, and their neighbourhoods.
LATITUDES = [90.0, -90.0, 89.99999, -89.99999, 0.0, 0.0, 0.0, 0.0, 45.0, -60.0, 1e-20, 12.5]
LONGITUDES = [0.0, 0.0, 17.0, -170.0, -180.0, 179.9999, 90.0, -90.0, 135.0, -45.0, 1e-20, 77.7]


def near(found, expected, ulps):
    """Within some rounding errors of the larger one of each pair."""
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, expected, rtol=ulps * eps, atol=1e-300)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("degrees", [True, False])
def test_places_come_back(dtype, degrees):
    latitude, longitude = double(LATITUDES), double(LONGITUDES)
    if not degrees:
        latitude, longitude = latitude.deg2rad(), longitude.deg2rad()
    latitude, longitude = latitude.to(dtype), longitude.to(dtype)
    x = points.directions_from_lat_lon(latitude, longitude, degrees)
    assert x.dtype == dtype
    found = points.lat_lon_from_directions(x, degrees)
    near(found[0], latitude, 4)
    # In radians float32 has no pole: a place beyond it by rounding lies on the other side.
    inner = latitude.abs() < (89.999999 if degrees else math.radians(89.999999))
    near(found[1][inner], longitude[inner], 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_places_come_back_in_any_shape(dtype):
    generator = seeded_generator(0)
    latitude = 180 * torch.rand(7, 5, generator=generator, dtype=dtype) - 90
    longitude = 1080 * torch.rand(7, 5, generator=generator, dtype=dtype) - 540
    x = points.directions_from_lat_lon(latitude, longitude)
    assert x.shape == (7, 5, 3)
    found = points.lat_lon_from_directions(x)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found[0], latitude, rtol=0, atol=300 * eps)
    turns = (found[1] - longitude) / 360
    torch.testing.assert_close(turns, turns.round(), rtol=0, atol=10 * eps)
    assert bool(((found[1] >= -180) & (found[1] < 180)).all())


def test_directions_are_those_of_the_formula():
    latitude, longitude = double([12.0, -70.0, 33.3]), double([100.0, -5.0, 359.0])
    phi, lam = np.deg2rad(latitude.numpy()), np.deg2rad(longitude.numpy())
    expected = np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], 1)
    found = points.directions_from_lat_lon(latitude, longitude)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quarters_of_a_turn_are_exact(dtype):
    quarters = torch.arange(-8, 9, dtype=dtype)
    x = points.directions_from_lat_lon(0 * quarters, 90 * quarters)
    assert set(x.flatten().tolist()) == {-1.0, 0.0, 1.0}
    poles = points.directions_from_lat_lon(torch.tensor([90, -90], dtype=dtype), quarters[:2])
    assert poles.tolist() == [[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]


def test_a_distance_from_the_pole_keeps_its_digits():
    """Next to a pole the plane part is the distance from it, which a cosine would round away."""
    distance = 2.0 ** -torch.arange(6, 17, dtype=torch.float32)  # degrees, exact beside 90
    x = points.directions_from_lat_lon(90 - distance, 0 * distance)
    near(x[:, 0], distance.double().deg2rad().sin().float(), 3)
    assert bool((x[:, 2] <= 1).all())


def test_columns_of_any_kind_are_taken():
    pairs = [
        ([48.0, 52.0], [11.0, 13.0]),
        ([48, 52], [11, 13]),
        (np.array([48.0, 52.0], "float32"), np.array([11.0, 13.0], "float32")),
        (torch.tensor([48, 52]), torch.tensor([11, 13])),
    ]
    expected = points.directions_from_lat_lon(*map(torch.tensor, pairs[0]))
    for latitude, longitude in pairs:
        torch.testing.assert_close(points.directions_from_lat_lon(latitude, longitude), expected)
    assert points.directions_from_lat_lon(48.0, 11.0).shape == (3,)
    frozen = np.array([48.0, 52.0])
    frozen.flags.writeable = False  # as columns of data frames may be
    assert points.directions_from_lat_lon(frozen, frozen).dtype == torch.float64


class _Column:
    """What a data frame gives for one name."""

    def to_numpy(self):
        return np.array([48.0, 52.0])


def test_columns_of_data_frames_are_taken():
    assert points.wrap(_Column()).shape == (2,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_points_of_the_torus_come_back(dtype):
    special = [-math.pi, -3.0, -math.pi / 2, -1e-30, 0.0, 1e-30, math.pi / 2, 3.14159]
    angles = double(special).to(dtype)[None].expand(3, 8)
    x = points.unit_vectors_from_angles(angles)
    assert x.shape == (3, 16)
    torch.testing.assert_close(x[:, 0::2], angles.cos())
    torch.testing.assert_close(x[:, 1::2], angles.sin())
    found = points.angles_from_unit_vectors(x)
    # At the cut the sign of a rounding error decides for one end.
    assert bool((found.abs()[:, 0] >= math.pi * (1 - 1e-6)).all())
    near(found[:, 1:], angles[:, 1:], 4)


@properties(200)
@given(st.floats(-1e6, 1e6), st.sampled_from(DTYPES))
def test_wrapped_angles_lie_in_one_turn(value, dtype):
    angle = torch.tensor(value, dtype=dtype)
    pi = float(torch.tensor(math.pi, dtype=dtype))
    wrapped = points.wrap(angle)
    assert -pi <= float(wrapped) < pi
    assert torch.equal(points.wrap(wrapped), wrapped)
    if -pi <= float(angle) < pi:
        assert torch.equal(wrapped, angle)
    turns = (float(angle) - float(wrapped)) / (2 * pi)
    assert abs(turns - round(turns)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_of_a_turn_are_one(dtype):
    for end in (math.pi, -math.pi):
        assert float(points.wrap(torch.tensor(end, dtype=dtype))) == pytest.approx(-math.pi)
    # Of more turns a rounding error decides for one end.
    assert abs(float(points.wrap(torch.tensor(3 * math.pi, dtype=dtype)))) > math.pi - 1e-6
    just_below = torch.nextafter(torch.tensor(math.pi, dtype=dtype), torch.zeros((), dtype=dtype))
    assert torch.equal(points.wrap(just_below), just_below)


@pytest.mark.parametrize("period", [24, 7.0, 365.25, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_times_come_back(period, dtype):
    shares = double([0.0, 1e-12, 0.25, 0.4999999, 0.5, 0.75, 0.999999])
    times = (shares * period).to(dtype)
    angles = points.angles_from_times(times, period)
    assert bool(((angles >= -math.pi) & (angles < math.pi)).all())
    found = points.times_from_angles(angles, period)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, times, rtol=4 * eps, atol=period * eps)
    later = points.angles_from_times(times + 3 * period, period)
    assert float(points.wrap(later - angles).abs().max()) < 60 * eps
    assert bool(((found >= 0) & (found < period)).all())


def test_a_time_just_before_the_start_is_no_whole_period():
    times = points.times_from_angles(torch.tensor([-1e-30, -1e-12, 0.0]), 24)
    assert bool(((times >= 0) & (times < 24)).all())


def test_gradients_are_those_of_the_maps_and_finite_at_special_points():
    places = [double([12.0, -70.0, 89.999]), double([100.0, -179.99, 5.0])]
    places = [place.requires_grad_() for place in places]
    assert torch.autograd.gradcheck(points.directions_from_lat_lon, places)

    def back(x):
        x = x / x.norm(dim=-1, keepdim=True)
        return points.lat_lon_from_directions(x)

    assert torch.autograd.gradcheck(
        back, double([[0.2, -0.3, 0.9], [-1, 1e-3, 0]]).requires_grad_()
    )
    angles = double([[0.3, -2.0, 40.0]]).requires_grad_()
    assert torch.autograd.gradcheck(points.unit_vectors_from_angles, angles)
    assert torch.autograd.gradcheck(points.wrap, angles)
    assert torch.autograd.gradcheck(lambda a: points.angles_from_times(a, 24), angles)
    assert torch.autograd.gradcheck(lambda a: points.times_from_angles(a, 24), angles)
    special = torch.cat([torch.eye(3), -torch.eye(3), torch.tensor([[1e-30, 0.0, 1.0]])])
    x = special.requires_grad_()
    sum(part.sum() for part in points.lat_lon_from_directions(x)).backward()
    assert bool(x.grad.isfinite().all())
    place = torch.tensor(LATITUDES).requires_grad_()
    points.directions_from_lat_lon(place, torch.tensor(LONGITUDES)).sum().backward()
    assert bool(place.grad.isfinite().all())


def test_the_longitude_has_its_derivative_next_to_a_pole():
    x = torch.tensor([1e-30, 0.0, 1.0], requires_grad=True)  # whose square is no number
    points.lat_lon_from_directions(x, degrees=False)[1].backward()
    assert x.grad.tolist() == [0.0, pytest.approx(1e30), 0.0]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: points.directions_from_lat_lon([10.0, 91.0], [0.0, 0.0]), OffManifoldError,
         r"from -90 to 90, got 91 at index \[1\], and 1 of 2 .* swapped"),
        (lambda: points.directions_from_lat_lon(45.0, 0.0, degrees=False), OffManifoldError,
         "from -1.5708 to 1.5708, got 45, "),
        (lambda: points.directions_from_lat_lon([1.0, 2.0], [0.0]), ShapeError,
         r"longitude and latitude must have one value for every point, of shape \(2,\), got"),
        (lambda: points.directions_from_lat_lon([math.nan], [0.0]), NonFiniteError, "latitude"),
        (lambda: points.directions_from_lat_lon(["a"], [0.0]), OptionError, "latitude must be"),
        (lambda: points.directions_from_lat_lon(0.0, b"1"), OptionError, "longitude must be"),
        (lambda: points.wrap(torch.eye(2).to_sparse()), DtypeError, "angles must be a dense"),
        (lambda: points.wrap([True]), OptionError, "angles must hold numbers"),
        (lambda: points.lat_lon_from_directions([1.0, 0.0]), ShapeError, r"shape \(\*, 3\)"),
        (lambda: points.lat_lon_from_directions([[1.0, 1.0, 0.0]]), OffManifoldError,
         r"norm one, got 1.41421 at index \[0\]"),
        (lambda: points.lat_lon_from_directions([0.0, 0.0, 0.0]), OffManifoldError, "got 0"),
        (lambda: points.unit_vectors_from_angles(1.0), ShapeError, r"angles\[:, None\]"),
        (lambda: points.angles_from_unit_vectors([[1.0, 0.0, 1.0]]), ShapeError, r"2 d"),
        (lambda: points.angles_from_unit_vectors([1.0, 0.0, 2.0, 0.0]), OffManifoldError,
         r"pairs of x must have norm one, got 2 at index \[1\]"),
        (lambda: points.angles_from_times([1.0], 0), OptionError, "period must be a positive"),
        (lambda: points.times_from_angles([1.0], math.inf), OptionError, "period must be"),
    ],
)  # fmt: skip
def test_what_is_no_point_is_refused_by_name(call, error, text):
    with pytest.raises(error, match=text):
        call()

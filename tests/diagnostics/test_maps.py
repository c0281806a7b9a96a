"""Maps show points and densities where they are, and say what they cannot draw."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from support.points import double, on_sphere

from normflows_injective import distributions, points
from normflows_injective.diagnostics import plot_globe, plot_rotations, plot_torus
from normflows_injective.diagnostics.maps import _pixels, _projected
from normflows_injective.errors import NonFiniteError, OffManifoldError, OptionError, ShapeError

figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
EDGE = 2 * math.sqrt(2)


def dots(axes):
    """Places (N, 2) of the points on a map."""
    return np.asarray(axes.collections[-1].get_offsets())


def height_at_45():
    """Height of the parallel of 45 degrees, in widths from the middle to the edge."""

    def of_parallel(angle):
        return 2 * angle + math.sin(2 * angle) - math.pi * math.sin(math.pi / 4)

    return math.sin(brentq(of_parallel, 0, math.pi / 2)) / 2


def pixels(axes):
    """The log-densities of a map from the lower left, NaN outside."""
    return np.ma.filled(axes.images[0].get_array(), np.nan)


def test_the_projection_and_its_inverse_agree():
    directions, inside = _pixels(torch.float64)
    flat = _projected(directions)
    height, width = inside.shape
    rows, columns = inside.nonzero().T.numpy()
    expected = np.stack([(columns + 0.5) / width - 0.5, ((rows + 0.5) / height - 0.5) / 2], 1)
    np.testing.assert_allclose(flat / (2 * EDGE), expected, atol=2e-6)


def test_areas_are_true():
    """The sum over pixels of a density is one, wherever its mass lies."""
    for pole in ([0.0, 0.0, 1.0], [-1.0, 0.1, 0.0], [0.0, 0.6, -0.8]):
        law = distributions.VonMisesFisher(
            torch.nn.functional.normalize(torch.tensor(pole), dim=0), 20.0
        )
        image = pixels(plot_globe(log_prob=law.log_prob))
        # Log-densities are cut at the lower end of the colours.
        mass = np.nanmean(np.exp(image)) * 4 * math.pi
        assert abs(mass - 1) < 0.01


def test_north_is_up_and_east_is_right():
    x = points.directions_from_lat_lon([0, 90, -90, 0, 0, 45], [0, 0, 0, 90, -179.9, 0])
    places = dots(plot_globe(x)) / EDGE
    expected = [[0, 0], [0, 0.5], [0, -0.5], [0.5, 0], [-1, 0]]
    np.testing.assert_allclose(places[:5], expected, atol=1e-3)
    assert places[5, 1] == pytest.approx(height_at_45(), abs=1e-6)


def test_density_and_points_agree_on_the_globe():
    for pole in on_sphere(4, 3).float():
        law = distributions.VonMisesFisher(pole, 50.0)
        axes = plot_globe(pole[None], law.log_prob)
        image = pixels(axes)
        row, column = np.unravel_index(np.nanargmax(image), image.shape)
        height, width = image.shape
        place = np.array([(column + 0.5) / width * 2 - 1, (row + 0.5) / height - 0.5])
        assert np.abs(place - dots(axes)[0] / EDGE).max() < 0.02


def test_density_and_points_agree_on_the_torus():
    mode = double([[-2.0, 1.0 + 2 * math.pi]])
    axes = plot_torus(mode, lambda a: (a - mode).cos().sum(1), names=("phi", "psi"))
    image = pixels(axes)
    row, column = np.unravel_index(image.argmax(), image.shape)
    place = (np.array([column, row]) + 0.5) / len(image) * 360 - 180
    expected = np.rad2deg([-2.0, 1.0])
    np.testing.assert_allclose(place, expected, atol=1.0)
    np.testing.assert_allclose(dots(axes)[0], expected)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("phi, degrees", "psi, degrees")
    assert axes.get_xlim() == axes.get_ylim() == (-180, 180)
    assert "uniform: -3.68" in axes.figure.axes[1].get_ylabel()


def test_rotations_stand_where_they_take_z_with_their_turn():
    z = [0.0, 0.0, 1.0]
    axes_of = [z, z, [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    q = points.quaternions_from_axis_angle(axes_of, [0.0, math.pi / 2, math.pi / 2, -math.pi / 4])
    # About x it goes to -y, and by minus 45 degrees about y to the north of -x.
    for quaternions in (q, -q):
        axes = plot_rotations(quaternions)
        places = dots(axes) / EDGE
        np.testing.assert_allclose(places[:3], [[0, 0.5], [0, 0.5], [-0.5, 0]], atol=1e-3)
        assert abs(places[3, 0]) > 0.5
        assert places[3, 1] == pytest.approx(height_at_45(), abs=1e-6)
        turns = np.asarray(axes.collections[0].get_array())
        np.testing.assert_allclose(turns, [0, 90, 0, 0], atol=1e-4)
    assert axes.figure.axes[1].get_ylabel() == "turned about z before by, degrees"


def test_a_rotation_is_the_turn_and_then_the_shortest_one():
    q = torch.nn.functional.normalize(torch.randn(50, 4, dtype=torch.float64), dim=1)
    turns = double(np.asarray(plot_rotations(q).collections[0].get_array())).deg2rad()
    z = double([[0.0, 0.0, 1.0]]).expand(50, 3)
    matrices = points.matrices_from_quaternions(q)
    ends = matrices[:, :, 2]
    shortest = torch.linalg.cross(z, ends)
    axes = shortest / shortest.norm(dim=1, keepdim=True)
    swing = points.quaternions_from_axis_angle(axes, ends[:, 2].acos())
    turn = points.quaternions_from_axis_angle(z, turns)
    product = points.matrices_from_quaternions(swing) @ points.matrices_from_quaternions(turn)
    torch.testing.assert_close(product, matrices)


def test_maps_are_drawn_on_axes_that_are_given():
    page = figure.Figure()
    left, right = page.subplots(1, 2)
    assert plot_globe(torch.eye(3), ax=left) is left
    assert plot_torus(torch.zeros(1, 2), ax=right) is right
    assert plot_torus(torch.zeros(1, 2)).figure is not page
    assert "matplotlib.pyplot" not in vars(sys.modules["normflows_injective.diagnostics.maps"])


def test_densities_without_mass_somewhere_are_drawn():
    half = plot_globe(log_prob=lambda x: torch.where(x[:, 2] > 0, 0.0, -math.inf))
    assert half.figure.axes[1].get_ylabel() == "log-density, nats (uniform: -2.53)"
    plot_torus(log_prob=lambda a: torch.full((len(a),), -math.inf))
    for axes in (half, plot_globe(torch.eye(3).bfloat16())):
        axes.figure.canvas.draw()


POLAR = figure.Figure().subplots(subplot_kw={"projection": "mollweide"})


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: plot_torus(), OptionError, "nothing to draw"),
        (lambda: plot_globe(), OptionError, "nothing to draw"),
        (lambda: plot_globe(torch.eye(3), ax=POLAR), OptionError, "plain matplotlib axes"),
        (lambda: plot_globe(torch.eye(3), ax=3), OptionError, "plain matplotlib axes"),
        (lambda: plot_globe(torch.ones(1, 3)), OffManifoldError, "norm one"),
        (lambda: plot_globe(torch.ones(3)), ShapeError, r"points must have shape \(N, 3\)"),
        (lambda: plot_torus(torch.ones(4, 3)), ShapeError, r"angles must have shape \(N, 2\)"),
        (lambda: plot_torus([[math.nan, 0.0]]), NonFiniteError, "angles"),
        (lambda: plot_torus([[0.0, 0.0]], names=("phi",)), OptionError, "two texts"),
        (lambda: plot_rotations(torch.eye(3)), ShapeError, r"quaternions must have shape"),
        (lambda: plot_globe(log_prob=lambda x: x), ShapeError,
         r"log_prob must give one log-density for each of 8192 points, .* got \(8192, 3\)"),
        (lambda: plot_torus(log_prob=lambda x: 1.0), ShapeError, "got float"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused_by_name(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_maps_need_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for call in (plot_globe, plot_rotations):
        with pytest.raises(OptionError, match=r"normflows-injective\[plot\]"):
            call(torch.eye(4)[:, : 3 if call is plot_globe else 4][:3])

"""Points on manifolds from the columns of a table, and back.

Latitudes and longitudes, angles, times of day and of year, rotations, shares and counts become
unit vectors, unit quaternions and compositions, where densities live. Functions take tensors, with
their graph, arrays, data frames' columns and lists, of any batch shape ``*``.
"""

from .angles import (
    angles_from_times,
    angles_from_unit_vectors,
    directions_from_lat_lon,
    lat_lon_from_directions,
    times_from_angles,
    unit_vectors_from_angles,
    wrap,
)
from .compositions import compositions_from_counts, compositions_without_zeros
from .rotations import (
    axis_angle_from_quaternions,
    matrices_from_quaternions,
    quaternions_from_axis_angle,
    quaternions_from_matrices,
)

__all__ = [
    "angles_from_times",
    "angles_from_unit_vectors",
    "axis_angle_from_quaternions",
    "compositions_from_counts",
    "compositions_without_zeros",
    "directions_from_lat_lon",
    "lat_lon_from_directions",
    "matrices_from_quaternions",
    "quaternions_from_axis_angle",
    "quaternions_from_matrices",
    "times_from_angles",
    "unit_vectors_from_angles",
    "wrap",
]


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)

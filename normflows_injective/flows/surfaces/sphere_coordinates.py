r"""Coordinates of the unit sphere :math:`S^{D-1}`, as pure functions in both directions.

With :math:`n_i = D - i` and :math:`u_i = \cos\theta_i \prod_{j<i} \sin\theta_j`, the surface
measure of the sphere is :math:`d\omega = \prod_i \sin^{n_i - 1}\theta_i\, d\theta`. Angles are
never found by an arc cosine, which loses all digits near the poles, but as ratios of a coordinate
to the norm of those after it; products of sines are sums of logarithms, which do not underflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import is_readable
from ...errors import OffManifoldError
from .off_manifold import refuse_off_orthant

Direction = Callable[[Tensor], tuple[Tensor, Tensor]]


class Coordinates(NamedTuple):
    """One kind of coordinates, as two functions and the part of the sphere that they reach."""

    # Coordinates (B, D - 1) to points (B, D) and the log-volume (B,).
    to_sphere: Direction
    # Points (B, D) to coordinates (B, D - 1) and minus the log-volume (B,).
    from_sphere: Direction
    # "sphere" or "orthant".
    codomain: str
    # Whether the last coordinate is an angle in (-pi, pi].
    has_azimuth: bool


def _degrees(count: int, dim: int, like: Tensor) -> Tensor:
    """The degrees of freedom n_i = D - i of the first coordinates."""
    return torch.arange(dim - 1, dim - 1 - count, -1, dtype=like.dtype, device=like.device)


def _log_volume_of_cotangents(log_squares: Tensor, degrees: Tensor) -> Tensor:
    r"""Log-volume by :math:`z_i = \sqrt{n_i}\cot\theta_i`, given :math:`\log(1 + z_i^2/n_i)`."""
    # From dtheta = n^(-1/2) sin^2(theta) dz and sin^(-2)(theta) = 1 + z^2/n.
    return -0.5 * (degrees.log() + (degrees + 1) * log_squares).sum(1)


def _tail_norms(u: Tensor) -> Tensor:
    """Norms |u_{i+1:}| (B, D - 1) of the coordinates after each one, above zero."""
    squares = u[:, 1:].square().flip(1).cumsum(1).flip(1)
    # Below the clamp, at a pole, the square root would have an infinite derivative.
    return squares.clamp_min(torch.finfo(u.dtype).tiny).sqrt()


def _shells(cosines: Tensor, log_sines: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates cos(theta_i) prod_{j<i} sin(theta_j), and the radius (B, 1) that is left."""
    log_radii = log_sines.cumsum(1)
    before = torch.nn.functional.pad(log_radii, (1, 0))
    return cosines * before[:, :-1].exp(), before[:, -1:].exp()


def _from_cotangents(z: Tensor) -> tuple[Tensor, Tensor]:
    dim = z.shape[1] + 1
    cotangents, azimuth = z[:, :-1], z[:, -1:]
    _check_azimuth(azimuth)
    degrees = _degrees(dim - 2, dim, z)
    scaled = cotangents / degrees.sqrt()
    log_squares = scaled.square().log1p()
    head, radius = _shells(scaled * (-0.5 * log_squares).exp(), -0.5 * log_squares)
    u = torch.cat([head, radius * azimuth.cos(), radius * azimuth.sin()], dim=1)
    return u, _log_volume_of_cotangents(log_squares, degrees)


def _to_cotangents(u: Tensor) -> tuple[Tensor, Tensor]:
    dim = u.shape[1]
    degrees = _degrees(dim - 2, dim, u)
    scaled = u[:, :-2] / _tail_norms(u)[:, :-1]
    azimuth = torch.atan2(u[:, -1:], u[:, -2:-1])
    z = torch.cat([scaled * degrees.sqrt(), azimuth], dim=1)
    return z, -_log_volume_of_cotangents(scaled.square().log1p(), degrees)


def _from_log_cotangents(z: Tensor) -> tuple[Tensor, Tensor]:
    dim = z.shape[1] + 1
    degrees = _degrees(dim - 1, dim, z)
    log_scaled = z - 0.5 * degrees.log()
    # log(1 + cot^2), which does not overflow.
    log_squares = torch.nn.functional.softplus(2 * log_scaled)
    head, radius = _shells((log_scaled - 0.5 * log_squares).exp(), -0.5 * log_squares)
    log_volume = _log_volume_of_cotangents(log_squares, degrees) + z.sum(1)
    # Far coordinates lead to parts below the least number, but the orthant has no zeros.
    least = torch.finfo(z.dtype).tiny
    return torch.cat([head, radius], dim=1).clamp_min(least), log_volume


def _to_log_cotangents(u: Tensor) -> tuple[Tensor, Tensor]:
    refuse_off_orthant(u, "x")
    dim = u.shape[1]
    degrees = _degrees(dim - 1, dim, u)
    log_scaled = u[:, :-1].log() - _tail_norms(u).log()
    z = log_scaled + 0.5 * degrees.log()
    log_squares = torch.nn.functional.softplus(2 * log_scaled)
    return z, -(_log_volume_of_cotangents(log_squares, degrees) + z.sum(1))


def _from_angles(angles: Tensor) -> tuple[Tensor, Tensor]:
    polar, azimuth = angles[:, :-1], angles[:, -1:]
    _check_polar(polar)
    _check_azimuth(azimuth)
    log_sines = polar.sin().log()
    head, radius = _shells(polar.cos(), log_sines)
    u = torch.cat([head, radius * azimuth.cos(), radius * azimuth.sin()], dim=1)
    dim = angles.shape[1] + 1
    return u, ((_degrees(dim - 2, dim, angles) - 1) * log_sines).sum(1)


def _to_angles(u: Tensor) -> tuple[Tensor, Tensor]:
    dim = u.shape[1]
    tails = _tail_norms(u)[:, :-1]
    polar = torch.atan2(tails, u[:, :-2])
    azimuth = torch.atan2(u[:, -1:], u[:, -2:-1])
    # sin(theta_i) = |u_{i+1:}| / |u_{i:}|
    log_sines = tails.log() - torch.hypot(tails, u[:, :-2]).log()
    log_volume = ((_degrees(dim - 2, dim, u) - 1) * log_sines).sum(1)
    return torch.cat([polar, azimuth], dim=1), -log_volume


def _from_stereographic(z: Tensor) -> tuple[Tensor, Tensor]:
    num = z.shape[1]
    scaled = z / math.sqrt(num)
    squares = scaled.square().sum(1, keepdim=True)
    u = torch.cat([2 * scaled, squares - 1], dim=1) / (squares + 1)
    log_volume = num * (math.log(2.0 / math.sqrt(num)) - squares[:, 0].log1p())
    return u, log_volume


def _to_stereographic(u: Tensor) -> tuple[Tensor, Tensor]:
    num = u.shape[1] - 1
    head, last = u[:, :-1], u[:, -1:]
    _refuse_pole(head, last)
    # 1 - u_D cancels on the upper half, where |head|^2 = (1 - u_D)(1 + u_D) serves. The norm is
    # taken of a scaled vector, so that its square stays in range next to the pole.
    upper = last > 0
    scale = head.detach().abs().amax(1, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny)
    # On the lower half the length is not used. At the centre it is zero, and without a gradient.
    length = torch.linalg.vector_norm(torch.where(upper, head / scale, 1), dim=1, keepdim=True)
    log_above = 2 * (length.log() + scale.log()) - torch.where(upper, last, 0).log1p()
    log_height = torch.where(upper, log_above, (1 - torch.where(upper, 0, last)).log())
    direction = head / scale
    # 1 + |z|^2 = 2 / (1 - u_D)
    log_volume = num * (log_height[:, 0] - math.log(math.sqrt(num)))
    return direction * (scale.log() - log_height).exp() * math.sqrt(num), -log_volume


def _refuse_pole(head: Tensor, last: Tensor) -> None:
    if not is_readable(head):
        return
    # Nearer than this the derivatives of the coordinates are beyond the range of the dtype.
    nearest = math.sqrt(torch.finfo(head.dtype).tiny)
    pole = ((head.detach().abs() < nearest).all(1) & (last.detach()[:, 0] > 0)).nonzero()
    if len(pole):
        raise OffManifoldError(
            f"{len(pole)} points are the pole that the stereographic chart misses, or within "
            f"{nearest:.2g} of it, the first at index {int(pole[0])}. Use "
            "SphereChart(kind='cot'), rotate the data, or start elsewhere."
        )


def _check_azimuth(azimuth: Tensor) -> None:
    if not is_readable(azimuth):
        return
    limit = math.pi * (1 + 1e-5)
    if bool((azimuth.detach().abs() > limit).any()):
        worst = float(azimuth.detach().abs().max())
        raise OffManifoldError(
            f"The last coordinate of this chart is an angle within [-pi, pi], and {worst:.6g} "
            "came: another turn would count its points twice. Use a base that is uniform there "
            "(nfi.distributions.Pullback) and circular splines, as nfi.flows.star_like_flow does; "
            "kind='stereographic' takes any real number."
        )


def _check_polar(polar: Tensor) -> None:
    if not is_readable(polar) or polar.numel() == 0:
        return
    least, most = float(polar.detach().min()), float(polar.detach().max())
    if not (least > 0 and most < math.pi):
        raise OffManifoldError(
            f"Polar angles must lie within (0, pi), got {least:.6g} to {most:.6g}. Outside they "
            "name points of the sphere for a second time. kind='cot' takes any real number "
            "instead."
        )


COORDINATES = {
    "cot": Coordinates(_from_cotangents, _to_cotangents, "sphere", True),
    "stereographic": Coordinates(_from_stereographic, _to_stereographic, "sphere", False),
    "angles": Coordinates(_from_angles, _to_angles, "sphere", True),
    "orthant": Coordinates(_from_log_cotangents, _to_log_cotangents, "orthant", False),
}

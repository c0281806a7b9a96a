"""The loss that no volume-preserving flow can beat."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import as_floating, check_finite, checks_arguments
from ..errors import NonFiniteError, OptionError, ShapeError
from ..modules.precision import as_factored

_LEAST_SAMPLES = 100
_CHUNK = 65_536


class VolumePreservingFloor(NamedTuple):
    r"""The floor under the loss of volume-preserving flows, as float64 numbers of shape ().

    .. math:: \mathrm{floor} = \inf_q \mathrm{KL}(p \| q)
              = \tfrac D2 (1 + \log 2 \pi s^2) - H(p)

    Attributes:
        floor: Least :math:`\mathrm{KL}(p \| q)` in nats.
        standard_error: Standard error of ``floor`` in nats; 0 for a floor from a grid.
        scale: Standard deviation :math:`s` of the best Gaussian base, in units of the data.
        entropy: Entropy :math:`H(p)` in nats. ``entropy + floor`` is the least negative
            log-likelihood.

    References:
        Draxler et al., arXiv 2402.06578; the formula is derived in
        :func:`volume_preserving_floor`.

    Examples:
        >>> result = volume_preserving_floor(torch.zeros(4000), 2)  # uniform on any unit volume
        >>> round(float(result.floor), 4), round(float(result.entropy + result.floor), 4)
        (0.3069, 0.3069)
    """

    floor: Tensor
    standard_error: Tensor
    scale: Tensor
    entropy: Tensor


@checks_arguments
def volume_preserving_floor(log_prob: Tensor, dim: int) -> VolumePreservingFloor:
    r"""Floor under the loss of volume-preserving flows, from log-densities at samples.

    A flow of constant :math:`|\det|` moves the values of its base density about and changes none
    of them. The best flow gives the values of a Gaussian of free scale to the level sets of
    :math:`p`, the greatest value to the highest level:

    .. math:: \inf_q \mathrm{KL}(p \| q) = \mathrm{KL}(p^* \| g^*)
              = \tfrac D2 (1 + \log 2 \pi s^2) - H(p), \qquad
              s^2 = \tfrac1D \, \mathbb E_p\, r^2(v(x))

    with :math:`v(x)` the volume of the set where :math:`p` exceeds :math:`p(x)` and :math:`r(v)`
    the radius of the ball of that volume.

    The volumes come from the samples too, :math:`v(x) = \mathbb E_p[1\{p > p(x)\} / p]`. The
    outermost volumes come from few samples, which raises the estimate by less than its standard
    error. Do not pass log-densities that are only estimated from the samples: their noise mixes
    the level sets and raises the floor. Data alone therefore give no floor: train a flow that is
    not volume preserving, sample it, and hand in its own log-densities.

    Args:
        log_prob: Log-densities :math:`\log p(x_i)` in nats at samples from :math:`p`, (N,),
            N at least 100. The density must be normalised.
        dim: Number of dimensions :math:`D` of the samples.

    Returns:
        :class:`VolumePreservingFloor`.

    Raises:
        ShapeError: If ``log_prob`` is not a vector.
        OptionError: If there are too few samples.
        NonFiniteError: If it holds NaN or infinity, or a result is out of the range of float64.

    References:
        Draxler et al., arXiv 2402.06578, on the limits of volume-preserving flows and the
        densities they learn. The formula is derived here from the rearrangement inequality, and
        the standard error from the influence of a sample on both expectations.

    Examples:
        >>> floor = volume_preserving_floor(torch.zeros(4000), 2)  # uniform on any unit volume
        >>> round(float(floor.floor), 4), round(1 - math.log(2), 4)
        (0.3069, 0.3069)
    """
    if log_prob.dim() != 1:
        shape = tuple(log_prob.shape)
        raise ShapeError(f"log_prob must be a tensor of shape (N,), one per sample, got {shape}.")
    if len(log_prob) < _LEAST_SAMPLES:
        raise OptionError(
            f"volume_preserving_floor needs at least {_LEAST_SAMPLES} samples, got "
            f"{len(log_prob)}. Draw more, or give the density on a box."
        )
    check_finite(log_prob, "log_prob", "Samples have a positive density: were these drawn by p?")
    ordered = as_factored(log_prob.detach()).sort(descending=True).values
    count = len(ordered)
    entropy = -ordered.mean()
    # The shares of volume 1/(N p) span more than float64 in many dimensions, so only their
    # logarithms are used. Scaled by the entropy they are of order one where most samples are.
    log_cells = -ordered - entropy - math.log(count)
    log_inner = torch.cat([ordered.new_tensor([-math.inf]), log_cells.logcumsumexp(0)[:-1]])
    log_volumes = torch.logaddexp(log_inner, log_cells - math.log(2))  # to the middle of a share
    log_radii = _log_square_radii(log_volumes, dim)
    log_shares = torch.full_like(ordered, -math.log(count))
    floor, log_scale_square = _floor(log_radii, log_shares, dim)
    # A sample j moves the floor by log p_j and, through s^2, by its own radius and by the volume
    # 1/p_j that it adds below every sample of less density: d r^2 / d v = (2/D) r^2 / v. Both are
    # at most N D s^2, so their ratios to s^2 are within range.
    log_below = (log_radii - log_volumes).flip(0).logcumsumexp(0).flip(0) + math.log(2 / dim)
    own = (log_radii - log_scale_square).exp()
    others = (log_cells + log_below - log_scale_square).exp()
    influence = ordered + 0.5 * (own + others)
    error = influence.std() / count**0.5
    return _checked(floor, error, log_scale_square, entropy, dim)


@checks_arguments
def volume_preserving_floor_on_box(
    log_prob: Callable[[Tensor], Tensor],
    low: Sequence[float],
    high: Sequence[float],
    num_cells: int = 1000,
) -> VolumePreservingFloor:
    r"""Floor under the loss of volume-preserving flows, from a density on a box, by quadrature.

    The density is evaluated at the centres of :math:`n^D` cells and normalised on the box. See
    :func:`volume_preserving_floor` for the formula.

    Args:
        log_prob: Log-density in nats, from points (B, D), float64, to (B,); :math:`-\infty` is
            allowed. An additive constant may be missing.
        low: Lower ends of the box, D numbers.
        high: Upper ends of the box.
        num_cells: Number n of cells along every axis.

    Returns:
        :class:`VolumePreservingFloor`, with a standard error of zero.

    Raises:
        ShapeError: If the ends differ in number, or ``log_prob`` returns another shape.
        OptionError: If the box is empty, the density is zero on it, or the grid has more than
            :math:`10^8` cells.
        NonFiniteError: If ``log_prob`` is NaN or infinite above, or a result is out of range.

    References:
        See :func:`volume_preserving_floor`.

    Examples:
        >>> def normal(x: Tensor) -> Tensor:
        ...     return -0.5 * (x.square().sum(1))
        >>> floor = volume_preserving_floor_on_box(normal, [-7, -7], [7, 7], 200)
        >>> abs(round(float(floor.floor), 3)), round(float(floor.scale), 3)
        (0.0, 1.0)
    """
    low, high = _ends(low, "low"), _ends(high, "high")
    dim = len(low)
    if dim == 0 or len(high) != dim:
        raise ShapeError(f"low and high must have D ends each, got {dim} and {len(high)}.")
    if any(not b > a for a, b in zip(low, high, strict=True)):
        raise OptionError(f"high must exceed low along every axis, got {list(low)}, {list(high)}.")
    if num_cells**dim > 10**8:
        raise OptionError(
            f"{num_cells} cells along {dim} axes are too many. Take fewer, or samples: "
            "volume_preserving_floor."
        )
    values = _on_grid(log_prob, low, high, num_cells)
    ordered = values[values > -math.inf].sort(descending=True).values
    if not len(ordered):
        raise OptionError("The density is zero at every centre of a cell. Move the box.")
    cell = math.prod(b - a for a, b in zip(low, high, strict=True)) / num_cells**dim
    log_shares = ordered - ordered.logsumexp(0)
    shares = log_shares.exp()
    entropy = -(shares * (log_shares - math.log(cell))).sum()
    ranks = torch.arange(len(ordered), dtype=ordered.dtype, device=ordered.device)
    log_volumes = (ranks + 0.5).log() + math.log(cell) - entropy
    floor, log_scale_square = _floor(_log_square_radii(log_volumes, dim), log_shares, dim)
    return _checked(floor, torch.zeros_like(floor), log_scale_square, entropy, dim)


def uniform_floor(dim: int) -> float:
    r"""Floor in nats for the uniform law on a set of any shape.

    .. math:: \log \Gamma(\tfrac D2 + 1) + \tfrac D2 (1 + \log 2 - \log(D + 2))
    """
    # The rearrangement is uniform on a ball of radius R, for which s^2 = R^2 / (D + 2).
    return math.lgamma(dim / 2 + 1) + dim / 2 * (1 + math.log(2) - math.log(dim + 2))


def _log_square_radii(log_volumes: Tensor, dim: int) -> Tensor:
    """Logarithms of the squared radii of balls with given volumes."""
    log_unit_ball = 0.5 * dim * math.log(math.pi) - math.lgamma(dim / 2 + 1)
    return (2 / dim) * (log_volumes - log_unit_ball)


def _floor(log_radii: Tensor, log_shares: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The floor, and log s^2 in the unit of length in which the entropy is zero."""
    log_scale_square = (log_radii + log_shares).logsumexp(0) - math.log(dim)
    # In that unit the entropy cancels: it only rescales, and the base follows.
    return 0.5 * dim * (1 + math.log(2 * math.pi) + log_scale_square), log_scale_square


def _checked(
    floor: Tensor, error: Tensor, log_scale_square: Tensor, entropy: Tensor, dim: int
) -> VolumePreservingFloor:
    scale = (0.5 * log_scale_square + entropy / dim).exp()
    result = VolumePreservingFloor(floor, error, scale, entropy)
    for name, value in result._asdict().items():
        if not bool(torch.isfinite(value)):
            raise NonFiniteError(
                f"The {name} is {float(value)}, out of the range of float64. Log-densities must "
                "be in nats, at samples of their own density. Another unit of length adds a "
                "constant to them and leaves the floor as it is."
            )
    return result


def _ends(values: Sequence[float], name: str) -> list[float]:
    """The ends of a box as plain numbers."""
    ends = as_floating(values, name)
    if ends.dim() != 1:
        raise ShapeError(f"{name} must hold D numbers, got shape {tuple(ends.shape)}.")
    return [float(end) for end in ends.double()]


def _on_grid(
    log_prob: Callable[[Tensor], Tensor],
    low: Sequence[float],
    high: Sequence[float],
    num_cells: int,
) -> Tensor:
    centres = (torch.arange(num_cells, dtype=torch.float64) + 0.5) / num_cells
    axes = [a + (b - a) * centres for a, b in zip(low, high, strict=True)]
    total, chunks = num_cells ** len(axes), []
    for start in range(0, total, _CHUNK):
        cells = torch.arange(start, min(start + _CHUNK, total))
        places = torch.unravel_index(cells, (num_cells,) * len(axes))
        points = torch.stack([axis[at] for axis, at in zip(axes, places, strict=True)], dim=1)
        with torch.no_grad():
            values = log_prob(points)
        if values.shape != (len(points),):
            raise ShapeError(
                f"log_prob must return shape ({len(points)},) for points {tuple(points.shape)}, "
                f"got {tuple(values.shape)}."
            )
        chunks.append(as_factored(values))
    values = torch.cat(chunks)
    above = torch.where(values == -math.inf, 0.0, values)
    check_finite(above, "log_prob", "A density that is unbounded has no value on a grid.")
    return values

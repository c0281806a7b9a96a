"""Numbers of principal components, of all rows and of neighbourhoods."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from .neighbours import nearest
from .rows import PreparedRows

_SHARES = (0.90, 0.95, 0.99)
# Relative to the largest standard deviation; a covariance in float64 keeps eight digits of them.
_RESOLUTION = 1e-7
_ANCHORS = 200
_SIZES = (16, 32, 64, 128, 256)
# A neighbourhood is a small part of the data, or it is not local.
_LARGEST_PART = 0.1
# Standard deviations below this part of the largest one count as zero in a neighbourhood.
_FLAT = 1e-3
# Least ratio of two successive local variances, beyond chance, that ends the tangent space.
_GAP = 3.0
# Share of the variance of a neighbourhood that its tangent space holds, if there is a gap.
_TANGENT = 0.9
_DRAWS = 16


class PrincipalComponents(NamedTuple):
    """Spectrum of the covariance of all rows.

    Attributes:
        variances: Variances along the components, descending, (C,) with C the lesser of the
            numbers of rows and columns.
        for_shares: Numbers of components that hold 90, 95 and 99 % of the variance.
        rank: Numerical linear rank, an upper bound of every dimension: a linear map with so many
            coordinates reconstructs the rows.
        basis: The components as orthonormal columns, (D, C).
    """

    variances: Tensor
    for_shares: tuple[int, int, int]
    rank: int
    basis: Tensor


class LocalComponents(NamedTuple):
    """Dimension of tangent spaces from neighbourhoods of one size.

    Attributes:
        size: Number of neighbours.
        radius: Median distance of the farthest neighbour.
        median: Median of the estimates over anchors.
        low: Their 16 % quantile.
        high: Their 84 % quantile.
        gap: Median ratio of the variances on both sides of the gap, beyond chance.
        without_gap: Share of anchors without a gap, whose estimate is the linear rank.
    """

    size: int
    radius: float
    median: float
    low: float
    high: float
    gap: float
    without_gap: float


def principal_components(prepared: PreparedRows) -> PrincipalComponents:
    """Eigenvalues of the covariance, and how many of them matter."""
    rows = prepared.rows
    variances, basis = _wide(rows) if len(rows) < rows.shape[1] else _tall(rows)
    shares = variances.cumsum(0) / variances.sum()
    counts = [int((shares < share).sum()) + 1 for share in _SHARES]
    smallest = max(_RESOLUTION * float(variances[0].sqrt()), 2 * prepared.rounding)
    rank = max(1, int((variances.sqrt() > smallest).sum()))
    counts = [min(count, rank) for count in counts]
    return PrincipalComponents(variances, (counts[0], counts[1], counts[2]), rank, basis)


def _tall(rows: Tensor) -> tuple[Tensor, Tensor]:
    variances, basis = torch.linalg.eigh(rows.mT @ rows / (len(rows) - 1))
    return variances.flip(0).clamp(min=0), basis.flip(1)


def _wide(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The same from the matrix of inner products of the rows, which is smaller."""
    variances, vectors = torch.linalg.eigh(rows @ rows.mT / (len(rows) - 1))
    # QR makes the columns orthonormal where variances vanish.
    basis = torch.linalg.qr(rows.mT @ vectors.flip(1)).Q
    return variances.flip(0).clamp(min=0), basis


def local_components(rows: Tensor, generator: Generator) -> tuple[LocalComponents, ...]:
    r"""Dimensions of tangent spaces, from gaps in the spectra of neighbourhoods of several sizes.

    The variances :math:`\lambda_i` of a neighbourhood are divided by those of a normal of the
    same number of rows and columns (parallel analysis), so that chance alone makes no gap. The
    estimate is the index of the largest ratio :math:`\lambda_i / \lambda_{i+1}` if that exceeds
    3, or else all columns. Noise makes the small neighbourhoods isotropic, curvature fills the
    large ones: the size of the clearest gap lies between.
    """
    count, width = rows.shape
    sizes = [size for size in _SIZES if size <= max(_SIZES[0], _LARGEST_PART * count)]
    if width == 1:
        return tuple(LocalComponents(size, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0) for size in sizes[:1])
    anchors = torch.randperm(count, generator=generator, device=generator.device)[:_ANCHORS]
    anchors = anchors.to(rows.device)
    distances, indices = nearest(rows, rows[anchors], min(sizes[-1], count - 1))
    return tuple(
        _at_size(rows, indices[:, :size], distances[:, size - 1], generator)
        for size in sizes
        if size <= indices.shape[1]
    )


def _at_size(
    rows: Tensor, indices: Tensor, radii: Tensor, generator: Generator
) -> LocalComponents:
    size, width = indices.shape[1], rows.shape[1]
    logs = torch.stack([_log_variances(rows[index]) for index in indices])
    shape = (_DRAWS, size, width)
    normal = torch.randn(shape, generator=generator, device=generator.device, dtype=rows.dtype)
    chance = torch.stack([_log_variances(draw) for draw in normal]).mean(0).to(logs)
    # Beyond the number of rows there are no variances to compare.
    used = min(width, size - 1)
    above = (logs - chance)[:, :used]
    ratios = above[:, :-1] - above[:, 1:]
    variances = logs[:, :used].exp()
    held = (variances.cumsum(1) / variances.sum(1, keepdim=True))[:, :-1]
    # The first gap behind most of the variance: curvature has gaps of its own further on.
    ends = (ratios > math.log(_GAP)) & (held > _TANGENT)
    largest = ratios.argmax(1)
    positions = torch.where(ends.any(1), ends.double().argmax(1), largest)
    gaps = ratios.gather(1, positions[:, None]).squeeze(1)
    found = gaps > math.log(_GAP)
    estimates = torch.where(found, positions + 1, used).to(rows.dtype)
    levels = torch.tensor([0.16, 0.5, 0.84], dtype=rows.dtype, device=rows.device)
    low, median, high = torch.quantile(estimates, levels).tolist()
    return LocalComponents(
        size=size,
        radius=float(radii.median()),
        median=median,
        low=low,
        high=high,
        gap=float(gaps.exp().median()),
        without_gap=float((~found).double().mean()),
    )


def _log_variances(rows: Tensor) -> Tensor:
    """Logarithms of the variances along the components of rows, (D,), those near zero alike."""
    centred = rows - rows.mean(0)
    variances = centred.new_zeros(rows.shape[1])
    values = torch.linalg.svdvals(centred).square()
    variances[: len(values)] = values
    return variances.clamp(min=_FLAT**2 * float(values[0])).log()

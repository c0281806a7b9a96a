"""Nearest neighbours, and the dimension that the ratio of their distances tells."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor

_CHUNK = 512
_QUERIES = 2500
_LEAST_PER_BLOCK = 100
_SCALES = 6
# The largest ratios are censored: noise and boundaries act on them most.
_KEPT = 0.9


class NeighbourRatio(NamedTuple):
    """Dimension by the ratio of the distances to the two nearest neighbours, at one density.

    Attributes:
        rows: Number of rows among which neighbours were sought.
        distance: Median distance of the nearest neighbour.
        dim: Maximum-likelihood estimate.
        standard_error: Its standard error.
    """

    rows: int
    distance: float
    dim: float
    standard_error: float


def nearest(rows: Tensor, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Distances and indices (Q, count) of the nearest rows that do not equal the queries."""
    distances, indices = [], []
    squares = rows.square().sum(1)
    for chunk in queries.split(_CHUNK):
        approximate = squares - 2 * chunk @ rows.mT
        candidates = approximate.topk(min(count + 1, len(rows)), largest=False).indices
        # Differences once more, because the squares above cancel where neighbours are close.
        exact = (rows[candidates] - chunk[:, None]).square().sum(2).sqrt()
        ordered, order = exact.sort(1)
        distances.append(ordered[:, 1:])
        indices.append(candidates.gather(1, order)[:, 1:])
    return torch.cat(distances), torch.cat(indices)


def two_nearest(rows: Tensor, generator: Generator) -> tuple[NeighbourRatio, ...]:
    r"""Dimension from ratios :math:`\mu = r_2 / r_1`, at several densities of the rows.

    Where the density is constant over the ball of the second neighbour, :math:`\log \mu` is
    exponential with rate :math:`d`. With the :math:`n - m` largest of :math:`n` ratios censored,

    .. math:: \hat d = \frac{m}{\sum_{i \le m} \log \mu_{(i)} + (n - m) \log \mu_{(m)}},
              \qquad \text{standard error } \hat d / \sqrt m.

    Halving the rows again and again looks at larger distances, which noise does not rule.
    """
    scales = []
    for halvings in range(_SCALES):
        blocks = rows.tensor_split(2**halvings)
        if halvings and len(blocks[0]) < _LEAST_PER_BLOCK:
            break
        share = max(1, _QUERIES // len(blocks))
        # Rows are in random order, so the first ones are a sample.
        found = [nearest(block, block[:share], 2)[0] for block in blocks]
        distances = torch.cat([pairs for pairs in found if pairs.shape[1] == 2])
        distances = distances[distances[:, 0] > 0]
        if len(distances) >= 10:
            dim, error = _by_ratios((distances[:, 1] / distances[:, 0]).log())
            median = float(distances[:, 0].median())
            scales.append(NeighbourRatio(len(blocks[0]), median, dim, error))
    return tuple(scales)


def _by_ratios(logs: Tensor) -> tuple[float, float]:
    """Censored maximum likelihood of the rate of exponential numbers, and its standard error."""
    ordered = logs.sort().values
    kept = max(1, int(_KEPT * len(ordered)))
    total = ordered[:kept].sum() + (len(ordered) - kept) * ordered[kept - 1]
    dim = kept / max(float(total), 1e-12)
    return dim, dim / kept**0.5

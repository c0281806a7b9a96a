"""Distances between two sets of rows, and a classifier that tells them apart."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import StratifiedKFold, cross_val_score
from torch import Tensor

__all__ = ["classifier_two_sample", "energy_distance", "sliced_wasserstein"]

NUM_DIRECTIONS = 500
CHUNK = 512


def classifier_two_sample(samples: Tensor, reference: Tensor, seed: int = 0) -> float:
    """Accuracy of a gradient boosting classifier between two sets of rows (N, D), over five folds.

    Equal numbers of rows make 0.5 the score of equal distributions.
    """
    rows = torch.cat([samples, reference]).numpy()
    labels = np.repeat([0, 1], [len(samples), len(reference)])
    folds = StratifiedKFold(n_splits=5, shuffle=True, random_state=seed)
    classifier = HistGradientBoostingClassifier(random_state=seed)
    return float(cross_val_score(classifier, rows, labels, cv=folds).mean())


def sliced_wasserstein(
    samples: Tensor, reference: Tensor, num_directions: int = NUM_DIRECTIONS, seed: int = 0
) -> float:
    r"""Root of the mean squared 2-Wasserstein distance of projections onto random directions.

    .. math:: \Big( \frac1K \sum_k \int_0^1 \big( F_k^{-1}(u) - G_k^{-1}(u) \big)^2 du \Big)^{1/2}

    with the exact quantile functions of (N, D) and (M, D) rows, in units of the data.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (samples.shape[1], num_directions)
    directions = torch.randn(shape, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    first, second = (
        (rows.double() @ directions).sort(dim=0).values for rows in (samples, reference)
    )
    # Both quantile functions are constant between neighbouring levels of either.
    levels = torch.cat([_levels(len(first)), _levels(len(second))]).sort().values
    widths = levels.diff(prepend=levels.new_zeros(1))
    middles = levels - widths / 2
    moved = first[_ranks(middles, len(first))] - second[_ranks(middles, len(second))]
    return float((widths @ moved.square()).mean().sqrt())


def energy_distance(samples: Tensor, reference: Tensor) -> float:
    r"""Energy distance of two sets of rows (N, D) and (M, D), without bias.

    .. math:: 2\, \mathrm E \lVert X - Y \rVert - \mathrm E \lVert X - X' \rVert
              - \mathrm E \lVert Y - Y' \rVert

    It may be slightly negative where the laws are equal.

    References:
        Székely and Rizzo, Energy statistics, J. Statist. Plann. Inference 143 (2013).
    """
    first, second = samples.double(), reference.double()
    n, m = len(first), len(second)
    between = _sum_of_distances(first, second) / (n * m)
    within = _sum_of_distances(first, first) / (n * (n - 1))
    within_reference = _sum_of_distances(second, second) / (m * (m - 1))
    return 2 * between - within - within_reference


def _levels(number: int) -> Tensor:
    return torch.arange(1, number + 1, dtype=torch.float64) / number


def _ranks(levels: Tensor, number: int) -> Tensor:
    return (levels * number).long().clamp(0, number - 1)


def _sum_of_distances(first: Tensor, second: Tensor) -> float:
    exact = "donot_use_mm_for_euclid_dist"
    chunks = first.split(CHUNK)
    return sum(float(torch.cdist(rows, second, compute_mode=exact).sum()) for rows in chunks)

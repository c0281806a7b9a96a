"""Random-walk Metropolis chains in the space of coefficients, to check a flow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Chains", "metropolis"]

Array = NDArray[np.float64]


class Chains(NamedTuple):
    """Points (S, C, D) that C independent chains were at, S of each."""

    points: Array

    def mean(self) -> tuple[Array, Array]:
        """Means (D,) and their standard errors (D,), from the spread between chains."""
        means = self.points.mean(0)
        return means.mean(0), means.std(0, ddof=1) / math.sqrt(len(means))

    def mean_near(
        self, level: float, tolerance: float, values: Callable[[Array], Array]
    ) -> tuple[Array, Array, int]:
        """Mean (K,) of a function (N, D) -> (N, K) of the points whose l_1 norm is near a level.

        Points with a norm within a relative tolerance move along their rays to the level. The mean
        comes with standard errors by the delta method over chains, and with the number of points.
        """
        norms = np.abs(self.points).sum(2)
        near = np.abs(norms / level - 1) < tolerance
        on_level = values(self.points[near] / norms[near][:, None] * level)
        total = len(on_level)
        mean = on_level.mean(0)
        # Sums over each chain of what differs from the mean; chains are independent.
        chain = np.nonzero(near)[1]
        sums = np.zeros((self.points.shape[1], len(mean)))
        np.add.at(sums, chain, on_level - mean)
        return mean, np.sqrt(np.square(sums).sum(0)) / total, total


def metropolis(
    log_density: Callable[[Array], Array],
    start: Array,
    rng: np.random.Generator,
    burn_in: int,
    steps: int,
    thin: int = 10,
) -> Chains:
    """Run one chain from each row of start (C, D), all with the same step.

    The step has the covariance of the chains at the time, renewed until half of the burn-in and
    then left alone.
    """
    points, values = start.copy(), log_density(start)
    num, dim = points.shape
    scale, factor = 2.38 / math.sqrt(dim), np.eye(dim)
    visited = []
    for step in range(burn_in + steps):
        if step % 20 == 0 and step < burn_in // 2:
            factor = np.linalg.cholesky(np.cov(points.T) + 1e-12 * np.eye(dim))
        # Now and then a short step, for chains in a corner.
        lengths = scale * rng.choice([0.3, 1.0], (num, 1))
        proposed = points + lengths * (rng.standard_normal((num, dim)) @ factor.T)
        new_values = log_density(proposed)
        taken = np.log(rng.random(num)) < new_values - values
        points = np.where(taken[:, None], proposed, points)
        values = np.where(taken, new_values, values)
        if step >= burn_in and (step - burn_in) % thin == 0:
            visited.append(points)
    return Chains(np.stack(visited))

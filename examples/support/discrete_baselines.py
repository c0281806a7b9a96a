"""Baselines of assignment flows: independent columns, a tree, counts and neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

__all__ = ["Tree", "mutual_informations", "nearest"]

# A prior count for every class, so that no class has probability zero.
PRIOR = 0.5


def mutual_informations(rows: Tensor, num_classes: Sequence[int]) -> Tensor:
    """Mutual informations (n, n) of pairs of columns in nats, from counts.

    The bias of counts is taken off to first order, by the numbers of cells that occur (Miller and
    Madow). The diagonal holds entropies.
    """
    cells = [one_hot(x, c).float() for x, c in zip(rows.T, num_classes, strict=True)]
    blocks = torch.block_diag(*(torch.ones(1, c, dtype=torch.float64) for c in num_classes))
    joined = torch.cat(cells, 1)
    # Counts are whole numbers, exact in single precision up to 16 million.
    counts = (joined.T @ joined).double()
    shares = counts / len(rows)
    sums = blocks @ torch.special.entr(shares) @ blocks.T
    joint = sums + (blocks @ (counts > 0).double() @ blocks.T - 1) / (2 * len(rows))
    entropies = joint.diag()
    out = entropies.unsqueeze(1) + entropies - joint
    return out.diagonal_scatter(entropies)


def nearest(images: Tensor, others: Tensor, leave_out_self: bool = False) -> tuple[Tensor, Tensor]:
    """Numbers of pixels (B,) that differ from the nearest of other images, and which it is."""
    least, index = [], []
    right = others.float()
    for place, rows in enumerate(images.float().split(500)):
        distances = rows.sum(1, keepdim=True) + right.sum(1) - 2 * rows @ right.T
        if leave_out_self:
            own = torch.arange(len(rows))
            distances[own, 500 * place + own] = torch.inf
        closest = distances.min(1)
        least.append(closest.values)
        index.append(closest.indices)
    return torch.cat(least), torch.cat(index)


class Tree:
    """Columns that depend on one other each, by the tree of largest mutual information.

    Chow and Liu, IEEE Transactions on Information Theory 14 (1968). With ``independent`` no column
    depends on any other.
    """

    def __init__(
        self, rows: Tensor, num_classes: Sequence[int], independent: bool = False
    ) -> None:
        count = len(num_classes)
        self.num_classes = list(num_classes)
        self.edges: list[tuple[int, int | None]] = [(j, None) for j in range(count)]
        if not independent:
            self.edges = _maximum_tree(mutual_informations(rows, num_classes))
        self.tables = {}
        for child, parent in self.edges:
            condition = torch.zeros_like(rows[:, 0]) if parent is None else rows[:, parent]
            size = 1 if parent is None else num_classes[parent]
            cells = one_hot(rows[:, child], num_classes[child]).double()
            counts = one_hot(condition, size).double().T @ cells
            self.tables[child] = (counts + PRIOR) / (counts + PRIOR).sum(1, keepdim=True)

    def log_prob(self, rows: Tensor) -> Tensor:
        """Log-probabilities (B,) of rows (B, n), in nats."""
        total = torch.zeros(len(rows), dtype=torch.float64)
        for child, parent in self.edges:
            condition = 0 if parent is None else rows[:, parent]
            total += self.tables[child][condition, rows[:, child]].log()
        return total

    def sample(self, num: int) -> Tensor:
        """Rows (num, n)."""
        rows = torch.zeros(num, len(self.num_classes), dtype=torch.long)
        for child, parent in self.edges:
            condition = torch.zeros_like(rows[:, 0]) if parent is None else rows[:, parent]
            rows[:, child] = torch.multinomial(self.tables[child][condition], 1)[:, 0]
        return rows


def _maximum_tree(weights: Tensor) -> list[tuple[int, int | None]]:
    """Pairs of child and parent, the parent first seen, by the algorithm of Prim."""
    edges: list[tuple[int, int | None]] = [(0, None)]
    best, parents = weights[0].clone(), torch.zeros(len(weights), dtype=torch.long)
    best[0] = -torch.inf
    left = torch.ones(len(weights), dtype=torch.bool)
    left[0] = False
    for _ in range(len(weights) - 1):
        child = int(best.argmax())
        edges.append((child, int(parents[child])))
        left[child] = False
        closer = left & (weights[child] > best)
        parents[closer] = child
        best = torch.where(closer, weights[child], best).masked_fill(~left, -torch.inf)
    return edges

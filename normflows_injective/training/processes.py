"""Means over the processes of a training; in one process everything is its own mean."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ShapeError
from .rows import Rows


@final
class Processes:
    """The processes of torch's default group, and the place of this one among them.

    Args:
        device: Device of the model, on which the processes exchange numbers.
    """

    def __init__(self, device: torch.device) -> None:
        is_one = not (dist.is_available() and dist.is_initialized())
        self.device = device
        self.rank, self.count = (0, 1) if is_one else (dist.get_rank(), dist.get_world_size())

    def share(self, rows: Rows) -> Rows:
        """Every ``count``-th row, from this process's rank on."""
        if rows.count < 2 * self.count and self.count > 1:
            raise ShapeError(
                f"{rows.count} rows are too few for {self.count} processes, each of which needs "
                "two. Give more data, or start fewer processes."
            )
        return rows if self.count == 1 else rows.take(slice(self.rank, None, self.count))

    def mean(self, *numbers: float) -> list[float]:
        """Means of numbers over all processes."""
        if self.count == 1:
            return [*numbers]
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self.average([values])
        return values.tolist()

    def errors_above_zero(self, values: Tensor) -> float:
        r"""How many standard errors numbers (N,) of all processes lie above zero.

        .. math:: \max\Big(\frac{\bar v}{s / \sqrt N},\; \frac{2 k - N}{\sqrt N}\Big)

        of their mean, and of the number :math:`k` of those above zero, which a few large ones do
        not decide. It is infinite for none.
        """
        sums = (float(len(values)), float(values.sum()), float(values.square().sum()))
        above = float((values > 0).sum()) + 0.5 * float((values == 0).sum())
        count, total, squares, above = (self.count * mean for mean in self.mean(*sums, above))
        if count == 0:
            return math.inf
        mean = total / count
        variance = max(0.0, squares / count - mean**2) / max(1.0, count - 1)
        by_mean = mean / math.sqrt(variance) if variance > 0 else math.inf * (mean > 0 or -1)
        return max(by_mean, (2 * above - count) / math.sqrt(count))

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their means over all processes."""
        if self.count == 1:
            return
        values = list(tensors)
        pending = [dist.all_reduce(value, async_op=True) for value in values]
        for value, work in zip(values, pending, strict=True):
            work.wait()
            value.div_(self.count)

    @torch.no_grad()
    def copy_from_first(self, module: nn.Module) -> None:
        """Give parameters and buffers the values that they have in the process of rank 0."""
        if self.count == 1:
            return
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, src=0)

"""Means over the processes of a training; in one process everything is its own mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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

    def standard_error(self, values: Tensor) -> float:
        """Standard error of the mean of numbers (N,) in all processes; zero for none."""
        if len(values) == 0:
            return 0.0
        moments = (float(len(values)), float(values.sum()), float(values.square().sum()))
        count, total, squares = (self.count * mean for mean in self.mean(*moments))
        variance = max(0.0, squares / count - (total / count) ** 2)
        return math.sqrt(variance / max(1.0, count - 1))

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
    def copy_from_first(self, modules: Sequence[nn.Module]) -> None:
        """Give parameters and buffers the values that they have in the process of rank 0."""
        if self.count == 1:
            return
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, src=0)

"""Convolutions over variables on a grid."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from ...checks import check_count
from ...errors import OptionError
from ..mlp import start_at_zero
from .conditions import FieldNetwork


@final
class ConvField(FieldNetwork):
    """Residual convolutions at two resolutions, for images of labels.

    Variables are the pixels of a grid, row by row. Blocks at full resolution are followed by
    blocks at half of it with twice the channels, and by blocks at full resolution again, which a
    skip joins to the first. Time and context scale and shift the channels of every block.

    Args:
        height: Rows of the grid.
        width: Columns of the grid.
        num_classes: Largest number of classes c of a pixel.
        channels: Channels at full resolution, a multiple of 8.
        num_blocks: Blocks at each of the three places.
        context_dim: Number of context features C; 0 for none.
        missing: Whether there is one more feature, which is one where a pixel is missing.

    Raises:
        OptionError: If a number is not positive, or channels not a multiple of 8.
        ShapeError: If the features have another shape.
        ContextError: If a context is missing, superfluous or too wide.

    Examples:
        >>> ConvField(7, 6, 2, channels=8)(torch.zeros(5, 42, 2), torch.zeros(5)).shape
        torch.Size([5, 42, 2])
    """

    def __init__(
        self,
        height: int,
        width: int,
        num_classes: int,
        channels: int = 32,
        num_blocks: int = 1,
        context_dim: int = 0,
        missing: bool = False,
    ) -> None:
        check_count(num_blocks, "num_blocks")
        if channels % 8:
            raise OptionError(f"channels must be a positive multiple of 8, got {channels!r}.")
        super().__init__(height * width, num_classes, context_dim, missing)
        self.grid = (height, width)
        self.height, self.width = height, width
        self.channels, self.num_blocks = channels, num_blocks
        conditions = 4 * channels
        self.embedding = nn.Sequential(nn.Linear(self.num_conditions, conditions), nn.SiLU())
        self.input = nn.Conv2d(self.num_features, channels, 3, padding=1)
        self.fine = _blocks(num_blocks, channels, conditions)
        self.down = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.coarse = _blocks(num_blocks, 2 * channels, conditions)
        self.up = nn.Conv2d(2 * channels, channels, 1)
        self.skip = nn.Conv2d(2 * channels, channels, 1)
        self.last = _blocks(num_blocks, channels, conditions)
        self.output = nn.Conv2d(channels, num_classes, 3, padding=1)

    def forward(self, features: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Features (B, n, c) at times (B,), with an optional context (B, C), to (B, n, c)."""
        conditions = self.embedding(self.conditions(features, t, context))
        image = features.transpose(1, 2).contiguous().unflatten(2, self.grid)
        fine = _run(self.fine, self.input(image), conditions)
        coarse = self.up(_run(self.coarse, self.down(fine), conditions))
        coarse = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
        coarse = coarse[:, :, : self.grid[0], : self.grid[1]]
        joined = self.skip(torch.cat([fine, coarse], 1))
        out: Tensor = self.output(_run(self.last, joined, conditions))
        return out.flatten(2).transpose(1, 2)


class _Block(nn.Module):
    """Two convolutions with a residual, the last of which starts at zero."""

    def __init__(self, channels: int, conditions: int) -> None:
        super().__init__()
        self.normalisation = nn.ModuleList([nn.GroupNorm(8, channels) for _ in range(2)])
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.conditions = nn.Linear(conditions, 2 * channels)
        start_at_zero(self.second)

    def forward(self, h: Tensor, conditions: Tensor) -> Tensor:
        scale, shift = self.conditions(conditions)[:, :, None, None].chunk(2, 1)
        inner = self.first(nn.functional.silu(self.normalisation[0](h)))
        inner = self.normalisation[1](inner) * (1 + scale) + shift
        inner = self.second(nn.functional.silu(inner))
        return h + inner


def _blocks(num: int, channels: int, conditions: int) -> nn.ModuleList:
    return nn.ModuleList([_Block(channels, conditions) for _ in range(num)])


def _run(blocks: nn.ModuleList, h: Tensor, conditions: Tensor) -> Tensor:
    for block in blocks:
        h = block(h, conditions)
    return h

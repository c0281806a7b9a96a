"""Angles, times and other numbers that come round again."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def into_turn(values: Tensor, half: float = math.pi) -> Tensor:
    """Values (*) brought into [-half, half) by whole turns, with a gradient of one."""
    # The remainder is exact, and so are the differences.
    rest = torch.fmod(values, 2 * half)
    rest = torch.where(rest >= half, rest - 2 * half, rest)
    return torch.where(rest < -half, rest + 2 * half, rest)

"""Parts of rows of 12 numbers, for functions of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH = 12
Rowwise = Callable[[Tensor], Tensor]


def fixed(*shape: int) -> Tensor:
    """A constant that does not depend on the random state."""
    count = torch.Size(shape).numel()
    return torch.sin(1.7 * torch.arange(1, count + 1, dtype=torch.float64) ** 1.1).view(shape)


def positive(h: Tensor) -> Tensor:
    return F.softplus(h) + 0.2


def unit(h: Tensor) -> Tensor:
    return 0.1 + 0.8 * torch.sigmoid(h)


def matrix(h: Tensor) -> Tensor:
    """Well conditioned matrices (B, 3, 3)."""
    return h[:, :9].tanh().view(-1, 3, 3) / 2 + torch.diag(torch.tensor([1.5, 2.5, 4.0])).to(h)


def symmetric(h: Tensor) -> Tensor:
    m = matrix(h)
    return (m + m.mT) / 2


def definite(h: Tensor) -> Tensor:
    m = matrix(h)
    return m @ m.mT + torch.eye(3, dtype=h.dtype)


def tall(h: Tensor) -> Tensor:
    return h.tanh().view(-1, 4, 3) + 2 * torch.eye(4, 3, dtype=h.dtype)


def triangular(h: Tensor) -> Tensor:
    return matrix(h).tril()


def side(h: Tensor) -> Tensor:
    """Right-hand sides (B, 3, 1)."""
    return h[:, 9:].unsqueeze(2)


def image(h: Tensor) -> Tensor:
    return h.view(-1, 1, 3, 4)


def signal(h: Tensor) -> Tensor:
    return h.view(-1, 2, 6)


def volume(h: Tensor) -> Tensor:
    return h.view(-1, 1, 2, 2, 3)


def tokens(h: Tensor) -> Tensor:
    return h.view(-1, 3, 4)


def real(h: Tensor) -> Tensor:
    return torch.view_as_real(h).flatten(1) if h.is_complex() else h


def parts(*parts: Tensor) -> Tensor:
    return torch.cat([part.flatten(1) for part in parts], 1)

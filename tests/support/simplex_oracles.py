"""Points of charts of the simplex."""

from __future__ import annotations

import torch

DOUBLE = torch.float64


def directions(num, dim, dtype=DOUBLE):
    """Uniform points of the positive orthant of the sphere."""
    u = torch.randn(num, dim, dtype=dtype).abs()
    return u / u.norm(dim=1, keepdim=True)

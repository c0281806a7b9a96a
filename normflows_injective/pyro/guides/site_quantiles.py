"""Quantiles of a latent variable from draws of its unconstrained coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import ComposeTransform, IndependentTransform, Transform

from ...checks import is_number
from ...errors import OptionError

# torch.quantile takes no more elements at once.
_LIMIT = 2**24


def check_levels(levels: object) -> Tensor:
    """Levels of quantiles, a list or vector of numbers between 0 and 1, as a tensor (q,)."""
    advice = "quantiles must be a list or vector of numbers between 0 and 1"
    vector = levels.detach().cpu() if isinstance(levels, Tensor) else _vector(levels)
    if vector.dim() != 1 or len(vector) == 0 or vector.is_complex() or vector.dtype == torch.bool:
        raise OptionError(f"{advice}, got {levels!r}. Write e.g. [0.05, 0.5, 0.95].")
    if not bool(((vector >= 0) & (vector <= 1)).all()):
        raise OptionError(f"{advice}, got {levels!r}. Give percentages as fractions.")
    return vector


def site_quantiles(transform: Transform, draws: Tensor, levels: Tensor) -> Tensor:
    r"""Quantiles of every component of :math:`y = t(u)` from draws u (n, *), of shape (q, *)."""
    if not acts_by_component(transform):
        # Components of y mix those of u: simplices, spheres, ordered vectors, Cholesky factors.
        return _quantile(transform(draws), levels)
    # Each is monotone: its quantile at p is the image of that of u at p, or at 1 - p if it falls.
    rising = transform(_quantile(draws, levels))
    falling = transform(_quantile(draws, 1 - levels))
    ends = transform(torch.stack([draws.amin(0), draws.amax(0)]))
    return torch.where(ends[1] >= ends[0], rising, falling)


def _vector(levels: Any) -> Tensor:
    listed = isinstance(levels, Sequence) and not isinstance(levels, str | bytes)
    numbers = list(levels) if listed or getattr(levels, "shape", None) else []
    if not all(map(is_number, numbers)):
        numbers = []
    return torch.tensor([float(number) for number in numbers], dtype=torch.float64)


def acts_by_component(transform: Transform) -> bool:
    """Whether a transform maps every component by itself."""
    if isinstance(transform, IndependentTransform):
        return acts_by_component(transform.base_transform)
    if isinstance(transform, ComposeTransform):
        return all(map(acts_by_component, transform.parts))
    return bool(transform.domain.event_dim == transform.codomain.event_dim == 0)


def _quantile(values: Tensor, levels: Tensor) -> Tensor:
    flat = values.reshape(len(values), math.prod(values.shape[1:]))
    width = max(1, _LIMIT // len(values))
    parts = [torch.quantile(part, levels.to(part), dim=0) for part in flat.split(width, dim=1)]
    return torch.cat(parts, dim=1).view(len(levels), *values.shape[1:])

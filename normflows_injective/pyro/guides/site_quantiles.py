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

__all__ = ["check_levels", "site_quantiles"]

# torch.quantile takes no more elements at once.
_LIMIT = 2**24


def check_levels(levels: object) -> Tensor:
    """Levels of quantiles as a tensor (q,).

    Args:
        levels: A list or tensor of numbers between 0 and 1.

    Raises:
        OptionError: If they are anything else.

    Examples:
        >>> check_levels([0.25, 0.75]).tolist()
        [0.25, 0.75]
    """
    advice = "quantiles must be a list or vector of numbers between 0 and 1"
    given: Any = levels
    if isinstance(given, Tensor):
        found = given.detach().cpu()
    else:
        listed = isinstance(given, Sequence) and not isinstance(given, str | bytes)
        numbers = list(given) if listed or getattr(given, "shape", None) else []
        if not all(map(is_number, numbers)):
            numbers = []
        found = torch.tensor([float(number) for number in numbers], dtype=torch.float64)
    if found.dim() != 1 or len(found) == 0 or found.is_complex() or found.dtype == torch.bool:
        raise OptionError(f"{advice}, got {levels!r}. Write e.g. [0.05, 0.5, 0.95].")
    if not bool(((found >= 0) & (found <= 1)).all()):
        raise OptionError(f"{advice}, got {levels!r}. Give percentages as fractions.")
    return found


def site_quantiles(transform: Transform, draws: Tensor, levels: Tensor) -> Tensor:
    r"""Quantiles of every component of :math:`y = t(u)` from draws of u.

    Where t acts on every component by itself it is monotone, and the quantile at level p of a
    component is the image of the quantile of u at level p, or at :math:`1 - p` where t falls.
    Otherwise components of y mix those of u (simplices, spheres, ordered vectors, Cholesky
    factors), and the quantiles are those of the images of the draws. Each is a quantile of its own
    component: together they are in general no point of the support.

    Args:
        transform: t, from unconstrained coordinates to values.
        draws: Draws u (n, *).
        levels: Levels (q,).

    Returns:
        Quantiles (q, *).

    Examples:
        >>> from torch.distributions import biject_to, constraints
        >>> draws = torch.linspace(-3, 3, 301).unsqueeze(1)
        >>> levels = torch.tensor([0.1, 0.9])
        >>> site_quantiles(biject_to(constraints.less_than(0.0)), draws, levels).exp()[:, 0]
        tensor([1.6319e-05, 9.1328e-01])
    """
    if not _acts_by_component(transform):
        return _quantile(transform(draws), levels)
    rising = transform(_quantile(draws, levels))
    falling = transform(_quantile(draws, 1 - levels))
    ends = transform(torch.stack([draws.amin(0), draws.amax(0)]))
    return torch.where(ends[1] >= ends[0], rising, falling)


def _acts_by_component(transform: Transform) -> bool:
    if isinstance(transform, IndependentTransform):
        return _acts_by_component(transform.base_transform)
    if isinstance(transform, ComposeTransform):
        return all(map(_acts_by_component, transform.parts))
    return bool(transform.domain.event_dim == transform.codomain.event_dim == 0)


def _quantile(values: Tensor, levels: Tensor) -> Tensor:
    flat = values.reshape(len(values), math.prod(values.shape[1:]))
    width = max(1, _LIMIT // len(values))
    parts = [torch.quantile(part, levels.to(part), dim=0) for part in flat.split(width, dim=1)]
    return torch.cat(parts, dim=1).view(len(levels), *values.shape[1:])

r"""Importance weights, smoothed by a Pareto law, and how far to trust them.

The weights above a threshold u are compared with a generalised Pareto law

.. math:: P(w - u > x) = (1 + k x / \sigma)^{-1/k},

whose shape k says how many moments they have: below 0.5 the variance is finite; up to 0.7 means
of smoothed weights are still reliable; above they are not, however many draws there are (Vehtari
et al., Pareto smoothed importance sampling, arXiv 1507.02646). The fit is that of Zhang and
Stephens (Technometrics 51, 2009): a posterior mean of :math:`\theta = -k / \sigma` over a grid,
shrunk to 0.5 by ten observations.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Fewest draws in the tail, of which a fit is made, and the observations of its prior.
_LEAST_TAIL, _PRIOR = 5, 10
# Part of the largest weight by which weights may differ, as by rounding, and still be equal.
_EQUAL = 1e-3


class SmoothedWeights(NamedTuple):
    """Normalised log-weights (n,) with a smoothed tail, the shape k, and the effective number."""

    log_weights: Tensor
    shape: float
    effective: float


def smoothed(log_weights: Tensor) -> SmoothedWeights:
    """Smooth the largest of log-weights (n,); k is inf with few draws, -inf of equal weights."""
    values = log_weights.detach().double().cpu()
    values = values - values.max()
    count = len(values)
    tail = min(count // 5, math.ceil(3 * count**0.5))
    shape = math.inf
    if tail >= _LEAST_TAIL:
        order = values.argsort()
        largest, threshold = order[-tail:], values[order[-tail - 1]].exp()
        excess = values[largest].exp() - threshold
        if float(excess[-1]) <= _EQUAL:
            shape = -math.inf
        else:
            shape, scale = _pareto(excess.clamp(min=1e-300))
            levels = (torch.arange(tail, dtype=torch.float64) + 0.5) / tail
            quantiles = threshold + scale * torch.expm1(-shape * torch.log1p(-levels)) / shape
            values[largest] = quantiles.log().clamp(max=0.0)
    normalised = values - values.logsumexp(0)
    effective = float((-(2 * normalised).logsumexp(0)).exp())
    return SmoothedWeights(normalised.to(log_weights), shape, effective)


def _pareto(excess: Tensor) -> tuple[float, float]:
    """Shape k and scale of a generalised Pareto law, from ordered values (m,)."""
    count = len(excess)
    grid = 30 + math.isqrt(count)
    numbers = torch.arange(1, grid + 1, dtype=torch.float64)
    quarter = excess[int(count / 4 + 0.5) - 1]
    thetas = 1 / excess[-1] + (1 - (grid / (numbers - 0.5)).sqrt()) / (3 * quarter)
    shapes = torch.log1p(-thetas.unsqueeze(1) * excess).mean(1)
    profile = count * ((-thetas / shapes).log() - shapes - 1)
    theta = float((profile.softmax(0) * thetas).sum())
    shape = float(torch.log1p(-theta * excess).mean())
    scale = -shape / theta
    return (shape * count + 0.5 * _PRIOR) / (count + _PRIOR), scale

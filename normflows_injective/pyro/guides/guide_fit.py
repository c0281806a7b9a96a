"""The normal law of another guide's draws, at which a guide can start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from torch.distributions import biject_to

from ...errors import OptionError
from ...flows.guides.normal_fit import LARGEST_COVARIANCE, NormalFit
from ...modules.random_numbers import OwnRandomNumbers

# Fewest draws of another guide, and draws for each latent.
_DRAWS, _DRAWS_EACH = 500, 4
# Part of the largest variance below which a direction counts as flat.
_LEAST_VARIANCE = 1e-10


@torch.no_grad()
def fit_of_guide(
    other: Callable[..., Any], guide: AutoContinuous, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> NormalFit:
    """Mean and covariance, or variances, of draws of another guide of the same sites."""
    trace: Any = guide.prototype_trace
    dim = guide.latent_dim
    count = max(_DRAWS, _DRAWS_EACH * min(dim, LARGEST_COVARIANCE))
    rows = []
    with poutine.block(), OwnRandomNumbers():
        for _ in range(count):
            drawn = poutine.trace(other).get_trace(*args, **kwargs)
            parts = []
            for name, site in trace.iter_stochastic_nodes():
                if name not in drawn:
                    raise OptionError(
                        f"The guide given as warm_start does not draw {name!r}, a latent variable "
                        "of this one. Give a guide of the same model."
                    )
                value = drawn.nodes[name]["value"]
                parts.append(biject_to(site["fn"].support).inv(value).reshape(-1))
            rows.append(torch.cat(parts))
    draws = torch.stack(rows)
    variances, source = draws.var(0), type(other).__name__
    least = _LEAST_VARIANCE * float(variances.max())
    if dim > LARGEST_COVARIANCE:
        return NormalFit(draws.mean(0), variances + least, source=source)
    covariance = draws.mT.cov()
    # Correlations of few draws are partly chance.
    shrunk = covariance + (dim / count) * (covariance.diagonal().diag() - covariance)
    shrunk.diagonal().add_(least)
    return NormalFit(draws.mean(0), shrunk, source=source)

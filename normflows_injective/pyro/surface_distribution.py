"""Laws on surfaces as Pyro distributions."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ..errors import OffManifoldError, OptionError

__all__ = ["OnSurface", "SurfaceDistribution"]


class OnSurface(constraints.Constraint):
    """Points where a law on a surface has a density.

    Args:
        law: A distribution of ``nfi.distributions`` with ``on_manifold = True``.

    Examples:
        >>> from normflows_injective.distributions import UniformSphere
        >>> OnSurface(UniformSphere(2)).check(torch.tensor([[0.6, 0.8], [1.0, 1.0]]))
        tensor([ True, False])
    """

    is_discrete = False
    event_dim = 1

    def __init__(self, law: Any) -> None:
        self._law = law
        super().__init__()

    def __repr__(self) -> str:
        return f"the surface of {type(self._law).__name__}"

    def check(self, value: Tensor) -> Tensor:
        """Whether points (*, D) lie on the surface, of shape (*)."""
        rows = value.reshape(-1, value.shape[-1])
        if self._holds(rows):
            return torch.ones(value.shape[:-1], dtype=torch.bool, device=value.device)
        each = [self._holds(row) for row in rows.unsqueeze(1)]
        return torch.tensor(each, device=value.device).view(value.shape[:-1])

    def _holds(self, rows: Tensor) -> bool:
        try:
            self._law.log_prob(rows)
        except OffManifoldError:
            return False
        return True


@final
class SurfaceDistribution(TorchDistribution):
    r"""A law on a surface as a Pyro distribution: a prior, or a likelihood.

    Its density is the law's, against the surface's own measure. Score it with guides whose density
    is against the same: mixing measures shifts the evidence, and on most surfaces the posterior.

    Args:
        law: A distribution of ``nfi.distributions`` with ``on_manifold = True``, built with
            ``off_manifold="reject"``, without a context.
        validate_args: As in torch.

    Raises:
        OptionError: If the law is no density on a surface.

    Examples:
        >>> import pyro
        >>> from normflows_injective.distributions import UniformOnSurface
        >>> from normflows_injective.flows.gauges import LpGauge
        >>> prior = SurfaceDistribution(UniformOnSurface(LpGauge(1.0), dim=3))
        >>> with pyro.plate("draws", 4):
        ...     beta = pyro.sample("beta", prior)
        >>> bool(torch.allclose(beta.abs().sum(1), torch.ones(4)))
        True
    """

    has_rsample = False
    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, law: Any, validate_args: bool | None = None) -> None:
        if not getattr(law, "on_manifold", False) or getattr(law, "needs_context", False):
            raise OptionError(
                f"law must be a density on a surface without a context, got {type(law).__name__}. "
                "Use one of nfi.distributions whose on_manifold is true."
            )
        self.law = law
        super().__init__(torch.Size(), torch.Size(law.shape), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The surface."""
        return OnSurface(self.law)

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draw points of shape (*sample_shape, D)."""
        with torch.no_grad():
            x: Tensor = self.law(max(1, math.prod(sample_shape)))[0]
        return x[: math.prod(sample_shape)].view(*sample_shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of points (*, D), of shape (*), in nats."""
        if self._validate_args:
            self._validate_sample(value)
        rows = value.reshape(-1, *self.event_shape)
        scores: Tensor = self.law.log_prob(rows)
        return scores.view(value.shape[:-1])

"""The contract of a law: a base distribution, or a target on a surface."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import ShapeError
from .oracles import require, require_close


class LawCase(NamedTuple):
    """A law, and the number of samples with which its contract is checked."""

    law: nn.Module
    num_samples: int = 5


def check_law(law: nn.Module, num_samples: int = 5) -> None:
    r"""Check the whole contract of a law without a context.

    Args:
        law: Distribution of normflows, of this package or your own, which can draw.
        num_samples: Number :math:`n \ge 2` of samples.

    Raises:
        AssertionError: If the contract is broken, saying where.

    References:
        The contract of normflows' ``BaseDistribution``.

    Examples:
        >>> import normflows as nf
        >>> check_law(nf.distributions.DiagGaussian(2))
    """
    for check in LAW_CHECKS:
        check(LawCase(law, num_samples))


def check_draws(case: LawCase) -> None:
    """A call gives n samples with their log-densities, which are those of log_prob."""
    law: Any = case.law
    x, log_prob = law(case.num_samples)
    require(x.shape[0] == case.num_samples, "a call gives as many samples as were asked for")
    require(log_prob.shape == x.shape[:1], "a call gives one log-density per sample")
    require(bool(log_prob.isfinite().all()), "samples have finite densities")
    scored = law.log_prob(x.detach())
    require(scored.shape == x.shape[:1], "log_prob gives one value per point")
    require(scored.dtype == x.dtype, "log_prob keeps the dtype of its argument")
    require_close(scored, log_prob, "log_prob of samples is the density of the draw", x.float())


def check_points_are_independent(case: LawCase) -> None:
    """The density at a point does not depend on its batch, which is left alone."""
    law: Any = case.law
    x = law(case.num_samples)[0].detach()
    before = x.clone()
    together = law.log_prob(x)
    require(torch.equal(x, before), "log_prob does not change its argument")
    alone = torch.cat([law.log_prob(x[i : i + 1]) for i in range(case.num_samples)])
    require_close(together, alone, "densities do not depend on the batch", x.float())


def check_wrong_shape(case: LawCase) -> None:
    """Points of another width are refused by a named error, where the law says its shape."""
    law: Any = case.law
    if getattr(law, "shape", None) is None:
        return
    x = law(case.num_samples)[0].detach()
    try:
        law.log_prob(torch.cat([x, x], dim=1))
    except (ShapeError, RuntimeError):
        return
    require(False, "points of another width are refused")


def check_copies(case: LawCase) -> None:
    """A deep copy is the same law."""
    law: Any = case.law
    x = law(case.num_samples)[0].detach()
    contract = "a deep copy is the same law"
    require_close(copy.deepcopy(law).log_prob(x), law.log_prob(x), contract, x.float())


LAW_CHECKS: tuple[Callable[[LawCase], None], ...] = (
    check_draws,
    check_points_are_independent,
    check_wrong_shape,
    check_copies,
)
"""The checks of :func:`check_law`, each of a :class:`LawCase`, to be called one by one."""

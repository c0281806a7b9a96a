"""Divergences of fields on coordinates: exact, by probes, or in closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check_choice
from .forward_mode import refuse_tangents
from .jacobians import basis_of
from .products import jvp
from .reverse import reverse
from .settings import as_written

__all__ = ["DIVERGENCES", "check_divergence", "trace_of_jacobian"]

DIVERGENCES = ("exact", "hutchinson")
# Numbers of all tangents at one time, so that memory stays bounded where no graph is kept.
_TANGENT_NUMBERS = 2**22


def check_divergence(divergence: str) -> None:
    """Raise unless a way to take divergences is known.

    Raises:
        OptionError: If it is not ``"exact"`` or ``"hutchinson"``.

    Examples:
        >>> check_divergence("exact")
    """
    check_choice(divergence, DIVERGENCES, "divergence")


@as_written
def trace_of_jacobian(
    function: Callable[[Tensor], Tensor], m: Tensor, probes: Tensor | None
) -> tuple[Tensor, Tensor]:
    r"""Value of a map and the trace of its Jacobian, or estimates of it.

    Forward mode gives it without gradients, and :math:`v^\top J`, whose derivative torch has
    right, with them.

    Args:
        function: Map of a batch (B, d) to a batch (B, d), acting on each sample alone.
        m: Where, (B, d).
        probes: Directions (K, B, d) with :math:`\mathbb E[v v^\top] = I`, which give the unbiased
            estimates :math:`v_k^\top J v_k`, or None for the sum over a basis.

    Returns:
        Value (B, d), and estimates (B, K) or the trace (B, 1).

    Raises:
        ForwardModeError: If a caller takes a forward-mode derivative.
        UnsupportedLayerError: If the trace has no right derivative, and gradients are enabled.

    Examples:
        >>> with torch.no_grad():
        ...     trace_of_jacobian(lambda m: m**2, torch.ones(1, 3), None)
        (tensor([[1., 1., 1.]]), tensor([[6.]]))
    """
    if torch.is_grad_enabled():
        taken = reverse(function, m)
        value, directions = taken.value, basis_of(m) if probes is None else probes
        terms = (taken.pull(directions) * directions).sum(2)
        trace = terms.T if probes is not None else terms.sum(0).unsqueeze(1)
        if taken.is_constant:
            value, trace = value.detach(), trace.detach()
    elif probes is not None:
        value, products = jvp(function, m, probes)
        trace = (products * probes).sum(2).T
    else:
        value, trace = _sum_over_basis(function, m)
    refuse_tangents("A divergence", m, value)
    return value, trace


def _sum_over_basis(function: Callable[[Tensor], Tensor], m: Tensor) -> tuple[Tensor, Tensor]:
    """Value (B, d) and trace (B, 1), without a graph and in bounded memory."""
    trace, value = torch.zeros_like(m[:, 0]), m
    for tangents in basis_of(m).split(max(1, _TANGENT_NUMBERS // m.numel())):
        value, products = jvp(function, m, tangents)
        trace = trace + (products * tangents).sum((0, 2))
    return value, trace.unsqueeze(1)

"""Divergences of fields on coordinates: exact, by probes, or in closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...checks import check_choice
from ...volume.products import jvp
from ...volume.settings import as_written

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
    r"""Value of a map and the trace of its Jacobian, or estimates of it, in forward mode.

    Args:
        function: Map of a batch (B, d) to a batch (B, d), acting on each sample alone.
        m: Where, (B, d).
        probes: Directions (K, B, d) with :math:`\mathbb E[v v^\top] = I`, which give the unbiased
            estimates :math:`v_k^\top J v_k`, or None for the sum over a basis.

    Returns:
        Value (B, d), and estimates (B, K) or the trace (B, 1).

    Examples:
        >>> trace_of_jacobian(lambda m: m**2, torch.ones(1, 3), None)
        (tensor([[1., 1., 1.]]), tensor([[6.]]))
    """
    recording = torch.is_grad_enabled()
    if probes is not None:
        value, products = jvp(function, m, probes, create_graph=recording)
        return value, (products * probes).sum(2).T
    dim = m.shape[1]
    basis = torch.eye(dim, dtype=m.dtype, device=m.device)
    rows = dim if recording else max(1, min(dim, _TANGENT_NUMBERS // m.numel()))
    trace = torch.zeros_like(m[:, 0])
    value = m
    for chunk in basis.split(rows):
        tangents = chunk.unsqueeze(1).expand(-1, *m.shape)
        value, products = jvp(function, m, tangents, create_graph=recording)
        trace = trace + (products * tangents).sum((0, 2))
    return value, trace.unsqueeze(1)

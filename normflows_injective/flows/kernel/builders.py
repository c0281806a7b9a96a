"""Flows of kernelised couplings."""

from __future__ import annotations

from typing import Any

import normflows as nf

from ...checks import check_count, renamed
from ..coupling.act_norm import ActNorm
from ..coupling.linear import LULinear, Permutation
from .coupling import KernelCoupling


@renamed(n_auxiliary="num_auxiliary")
def ferumal_realnvp(
    dim: int, num_layers: int = 8, num_auxiliary: int = 150, **options: Any
) -> list[nf.flows.Flow]:
    r"""Kernelised couplings that keep the first and the last half in turn.

    A random permutation follows every two of them, so that all pairs of coordinates meet, also
    where the halves differ in size.

    Args:
        dim: Number of coordinates :math:`D`.
        num_layers: Number of couplings :math:`L`.
        num_auxiliary: Number of auxiliary points :math:`N` of each.
        **options: Further options of :class:`KernelCoupling`.

    Returns:
        Flows for a model of normflows, with :math:`L [2N(D - d) + Nd + d]` parameters by default,
        :math:`d = \lfloor D/2 \rfloor`.

    Raises:
        ShapeError: If ``dim`` is one and there is no context.
        OptionError: If an option is wrong.

    References:
        English, Kirchler and Lippert, arXiv 2307.14839, FF-RealNVP.

    Examples:
        >>> flows = ferumal_realnvp(6, num_layers=12)
        >>> sum(p.numel() for flow in flows for p in flow.parameters())
        16236
    """
    check_count(num_layers, "num_layers")
    flows: list[nf.flows.Flow] = []
    for layer in range(num_layers):
        if layer and layer % 2 == 0:
            flows.append(Permutation(dim))
        flows.append(KernelCoupling(dim, num_auxiliary, reverse=layer % 2 == 1, **options))
    return flows


@renamed(n_auxiliary="num_auxiliary")
def ferumal_glow(
    dim: int, num_steps: int = 8, num_auxiliary: int = 150, **options: Any
) -> list[nf.flows.Flow]:
    """Steps of normalisation, a dense linear map and a kernelised coupling, from data to latents.

    Args:
        dim: Number of coordinates D.
        num_steps: Number of steps.
        num_auxiliary: Number of auxiliary points of each coupling.
        **options: Further options of :class:`KernelCoupling`.

    Returns:
        Flows for a model of normflows.

    Raises:
        ShapeError: If ``dim`` is one and there is no context.
        OptionError: If an option is wrong.

    References:
        English, Kirchler and Lippert, arXiv 2307.14839, FF-Glow; Kingma and Dhariwal, Glow, arXiv
        1807.03039, section 3.

    Examples:
        >>> [type(flow).__name__ for flow in ferumal_glow(3, num_steps=1)]
        ['KernelCoupling', 'LULinear', 'ActNorm']
    """
    flows: list[nf.flows.Flow] = []
    for _ in range(num_steps):
        flows += [KernelCoupling(dim, num_auxiliary, **options), LULinear(dim), ActNorm(dim)]
    return flows

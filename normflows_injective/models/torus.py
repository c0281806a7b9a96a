"""A whole model on a torus: uniform base, couplings of angles, chart."""

from __future__ import annotations

import math
from typing import Any

import normflows as nf
import torch

from ..checks import check_count, checks_arguments
from ..distributions import UniformTorus
from ..flows.coupling.circular import MobiusMixture
from ..flows.surfaces.angular_spline import AngularSpline
from ..flows.surfaces.torus import TorusChart
from .injective import InjectiveNormalizingFlow


@checks_arguments
def torus_flow(
    dim: int,
    *,
    form: str = "angles",
    period: float = 2 * math.pi,
    start: float | None = None,
    num_layers: int = 8,
    width: int = 64,
    num_blocks: int = 2,
    num_components: int = 12,
    num_frequencies: int = 3,
    context_dim: int = 0,
    off_manifold: str = "reject",
    p: Any = None,
) -> InjectiveNormalizingFlow:
    r"""Build a flow on the torus :math:`(S^1)^d`, which starts from the uniform law.

    .. math:: \theta_0 \sim U[-\pi, \pi)^d \;\to\; \text{coupling of angles} \times \text{layers}
              \;\to\; \theta \;\to\; x

    A coupling transforms half of the angles, drawn at random, and the next one the other half, by
    :class:`~normflows_injective.flows.coupling.MobiusMixture`; the networks see sines and cosines.
    So density and all its derivatives are continuous on the whole torus. ``flows`` of the model is
    an ordinary list: add to it, or write your own.

    Args:
        dim: :math:`d`, the number of circles.
        form: ``"angles"``, in units of ``period``, or ``"vectors"`` in :math:`\mathbb R^{2d}`, see
            :class:`~normflows_injective.flows.TorusChart`.
        period: Period of angles, 360 for degrees.
        start: Where the period begins; None for half of it below zero.
        num_layers: Number of couplings.
        width: Width of their networks.
        num_blocks: Number of residual blocks of each network.
        num_components: Number of Möbius maps of an angle.
        num_frequencies: Number of multiples of every angle that the networks see.
        context_dim: Number of context features; 0 for none.
        off_manifold: ``"reject"`` or ``"project"``, for vectors off the torus.
        p: Target density for ``reverse_kld``.

    Returns:
        An :class:`~normflows_injective.InjectiveNormalizingFlow`.

    Raises:
        OptionError: If an option is unknown or out of range.

    References:
        Rezende et al., Normalizing flows on tori and spheres, arXiv 2002.02428.

    Examples:
        >>> model = torus_flow(2, period=360.0, num_layers=2)
        >>> model.log_prob(torch.tensor([[0.0, 90.0]])).detach()  # -2 log 360
        tensor([-11.7722])
    """
    check_count(num_layers, "num_layers")
    flows: list[nf.flows.Flow] = [
        AngularSpline(
            dim,
            range(dim),
            width=width,
            num_blocks=num_blocks,
            num_frequencies=num_frequencies,
            context_dim=context_dim,
            circle=MobiusMixture(num_components),
            transformed=half,
        )
        for half in random_halves(dim, num_layers)
    ]
    chart = TorusChart(dim, form, period, start, off_manifold)
    return InjectiveNormalizingFlow(UniformTorus(dim), [*flows, chart], p=p)


def random_halves(dim: int, count: int) -> list[list[int]]:
    """Halves of the coordinates in an order like a random one, each followed by the other one."""
    # The same in every process: a state_dict fits all models that were built alike.
    generator = torch.Generator().manual_seed(0)
    halves: list[list[int]] = []
    while len(halves) < count:
        order = torch.randperm(dim, generator=generator, device="cpu").tolist()
        # A single coordinate is moved by every layer.
        halves += [order[: (dim + 1) // 2], order[(dim + 1) // 2 :] or order]
    return halves[:count]

"""A whole model of rotations: the uniform law, couplings and linear maps of unit quaternions."""

from __future__ import annotations

from typing import Any

import normflows as nf

from ..checks import checks_arguments
from ..distributions import Pullback, UniformRotation
from ..flows.composite import InjectiveComposite
from ..flows.surfaces.hopf_coupling import HopfCoupling
from ..flows.surfaces.rotations import AsRotation, HopfChart
from ..flows.surfaces.sphere import SphereLinear
from .injective import InjectiveNormalizingFlow


@checks_arguments
def rotation_flow(
    *,
    num_layers: int = 6,
    context_dim: int = 0,
    form: str = "quaternion",
    width: int = 64,
    num_blocks: int = 2,
    num_orders: int = 3,
    off_manifold: str = "reject",
    p: Any = None,
) -> InjectiveNormalizingFlow:
    r"""Build a flow on SO(3), which starts from the uniform law of rotations.

    .. math:: q \sim \text{uniform} \;\to\; (\text{Hopf coupling, linear map of the sphere})
              \times \text{layers} \;\to\; \{q, -q\} \in SO(3)

    Densities are against Haar measure, normalised to total mass one: the uniform density is one.
    Against the area of :math:`S^3`, :math:`2\pi^2`, of which SO(3) is the half of area
    :math:`\pi^2`, the log-density of a rotation is lower by :math:`\log\pi^2`; that of a unit
    quaternion whose sign is left to chance is lower by :math:`\log 2\pi^2`.

    Every layer acts on :math:`S^3` itself and commutes with :math:`q \mapsto -q` to the last bit,
    so that ``log_prob(q)`` and ``log_prob(-q)`` are equal, and is an analytic map without poles
    and without a seam (:class:`~normflows_injective.flows.HopfCoupling`,
    :class:`~normflows_injective.flows.SphereLinear`). Splines in a chart by axis and angle, by
    the hemisphere or by Hopf coordinates would be quicker to write, but give densities that jump
    where a point has several names. All inverses and log-dets are closed forms.

    Args:
        num_layers: Number of couplings with a linear map each.
        context_dim: Number of context features; 0 for none.
        form: ``"quaternion"`` for data (B, 4), :math:`(w, x, y, z)` of either sign, of which
            samples have :math:`w \ge 0`; ``"matrix"`` for (B, 3, 3).
        width: Width of the networks.
        num_blocks: Number of residual blocks of each network.
        num_orders: Degrees of the couplings, see :class:`HopfCoupling`.
        off_manifold: ``"reject"`` or ``"project"``, for data that are no rotations.
        p: Target density for ``reverse_kld``, against Haar measure.

    Returns:
        An :class:`~normflows_injective.InjectiveNormalizingFlow`. Its ``reconstruction_error``
        compares numbers, so it is 4 for a quaternion with :math:`w < 0`, whose density is right.

    Raises:
        OptionError: If an option is unknown.

    References:
        Liu et al., arXiv 2304.03937; Falorsi et al., Reparameterizing distributions on Lie groups,
        arXiv 1903.02958. The chain is ours.

    Examples:
        >>> import torch
        >>> model = rotation_flow(num_layers=2, width=8, form="matrix")
        >>> x, log_q = model.sample(4)
        >>> x.shape, log_q.abs().max() < 1e-5  # uniform, at first
        (torch.Size([4, 3, 3]), tensor(True))
    """
    flows: list[nf.flows.Flow] = [HopfChart()]
    for layer in range(num_layers):
        # Six layers keep every column and every row once.
        coupling = HopfCoupling(
            num_orders, width, num_blocks, context_dim, axis=layer % 3, rows=layer % 2 == 1
        )
        flows += [coupling, SphereLinear(4)]
    base = Pullback(
        UniformRotation(), InjectiveComposite([HopfChart(), AsRotation(off_manifold="project")])
    )
    return InjectiveNormalizingFlow(base, [*flows, AsRotation(form, off_manifold)], p=p)

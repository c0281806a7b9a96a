"""Densities of codes in one call: layers that stand between the base and the injection."""

from __future__ import annotations

from collections.abc import Sequence

import normflows as nf
from torch import nn

from ..checks import check_choice, checks_arguments
from .coupling import Affine, Autoregressive, ElementTransform, LULinear, NetworkCoupling, Spline
from .flow_matching import FlowMatching

_KINDS = ("mixed", "spline", "affine", "autoregressive", "matching")
# Of affine maps: with wider bounds a few samples in a thousand lie far outside the data.
_MAX_LOG_SCALE = 1.0
_NUM_BINS, _BOUND = 8, 5.0
# Couplings of a mixed block that are splines, next to the base.
_NUM_SPLINES = 2


@checks_arguments
def latent_block(
    dim: int,
    kind: str = "mixed",
    *,
    num_layers: int = 8,
    hidden: Sequence[int] = (128, 128),
    context_dim: int = 0,
) -> list[nf.flows.Flow]:
    r"""Layers that model the density of codes of unit scale, next to the base.

    * ``"mixed"``: couplings, two splines next to the base and then affine ones. Splines bend what
      affine maps cannot, and affine maps pass the tails on.
    * ``"spline"``, ``"affine"``: couplings of one kind. Splines are the identity beyond 5, and
      log-scales of affine maps are at most 1.
    * ``"autoregressive"``: autoregressive splines, which sample in :math:`d` passes.
    * ``"matching"``: one :class:`FlowMatching`, which over-fits few rows less, and takes longer to
      sample and to evaluate.

    Every coupling and every autoregressive layer is followed by a
    :class:`~normflows_injective.flows.coupling.LULinear`, which mixes the coordinates. In one
    dimension without a context couplings see nothing: these kinds are then one spline.

    Args:
        dim: Number of coordinates :math:`d`.
        kind: One of these.
        num_layers: Number of couplings or autoregressive layers.
        hidden: Hidden widths of their networks; the first is that of autoregressive layers, and
            a flow of matching has three layers of twice the first.
        context_dim: Number of context features; 0 for none.

    Returns:
        Layers for ``flows``, which start as permutations of the coordinates.

    Raises:
        OptionError: If an option is unknown or out of range.

    References:
        Which kind serves where: ``docs/training.md``.

    Examples:
        >>> import torch
        >>> block = latent_block(3, "spline", num_layers=2, hidden=(8,))
        >>> model = nf.NormalizingFlow(nf.distributions.DiagGaussian(3, trainable=False), block)
        >>> model.forward_kld(torch.randn(5, 3)).shape
        torch.Size([])
    """
    check_choice(kind, _KINDS, "kind")
    if kind == "matching":
        return [FlowMatching(dim, hidden=[2 * hidden[0]] * 3, context_dim=context_dim)]
    if kind == "autoregressive" or (dim == 1 and context_dim == 0):
        layers = num_layers if dim > 1 else 1
        return _mixed_up(
            dim,
            [
                Autoregressive(
                    dim,
                    Spline(_NUM_BINS, _BOUND),
                    width=max(hidden[0], dim),
                    context_dim=context_dim,
                    reverse=bool(index % 2),
                )
                for index in range(layers)
            ],
        )
    num_splines = {"mixed": _NUM_SPLINES, "spline": num_layers, "affine": 0}[kind]
    return _mixed_up(
        dim,
        [
            NetworkCoupling(
                dim,
                _transform(is_spline=index < num_splines),
                hidden=hidden,
                context_dim=context_dim,
                reverse=bool(index % 2),
                activation=nn.SiLU,
            )
            for index in range(num_layers)
        ],
    )


def _transform(is_spline: bool) -> ElementTransform:
    return Spline(_NUM_BINS, _BOUND) if is_spline else Affine(_MAX_LOG_SCALE)


def _mixed_up(dim: int, layers: Sequence[nf.flows.Flow]) -> list[nf.flows.Flow]:
    return [part for layer in layers for part in (layer, LULinear(dim))]

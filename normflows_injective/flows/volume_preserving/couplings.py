"""Couplings that keep volumes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import final

from torch import nn

from ...checks import level_of_caller
from ...errors import ReducedLayerWarning
from ..coupling.coupling import PerceptronCoupling, coupling_sizes
from ..coupling.transforms import Additive, CentredAffine, ElementTransform


@final
class NICECoupling(PerceptronCoupling):
    r"""Additive coupling, of log-det zero; it starts as the identity.

    With :math:`x = (u, v)`, where :math:`u` holds the coordinates that are kept, the map from data
    to latents is

    .. math:: u' = u, \qquad v' = v + t(u, c)

    A flow of such layers only moves the values of its base density about;
    :func:`~normflows_injective.diagnostics.volume_preserving_floor` measures the cost of that.

    Args:
        dim: Number of coordinates :math:`D`.
        hidden: Widths of the hidden layers of :math:`t`.
        context_dim: Number of context features; 0 for none.
        reverse: Whether the last rather than the first coordinates are kept.
        activation: Constructor of the activation.

    Raises:
        ShapeError: If ``dim`` is one and there is no context.

    References:
        Dinh et al., NICE, arXiv 1410.8516, equation 11.

    Examples:
        >>> import torch
        >>> NICECoupling(3, hidden=(8,)).inverse(torch.ones(1, 3))[1]
        tensor([0.])
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (64, 64),
        context_dim: int = 0,
        reverse: bool = False,
        activation: Callable[[], nn.Module] = nn.GELU,
    ) -> None:
        super().__init__(dim, Additive(), hidden, context_dim, reverse, activation)


@final
class GINCoupling(PerceptronCoupling):
    r"""Affine coupling whose log-scales have mean zero, of log-det zero.

    With :math:`x = (u, v)`, where :math:`u` holds the coordinates that are kept and :math:`v` the
    :math:`A` others, the map from data to latents is

    .. math:: u' = u, \qquad
              v'_i = v_i \exp\Big(s_i(u, c) - \tfrac1A \sum_j s_j(u, c)\Big) + t_i(u, c)

    If :math:`A = 1`, as in two dimensions, the scale is one, and the layer is
    :class:`NICECoupling`. A warning says so. The layer starts as the identity.

    Args:
        dim: Number of coordinates :math:`D`.
        hidden: Widths of the hidden layers.
        context_dim: Number of context features; 0 for none.
        reverse: Whether the last rather than the first coordinates are kept.
        max_log_scale: Soft bound of the log-scales before their mean is subtracted, or None.
        activation: Constructor of the activation.

    Raises:
        ShapeError: If ``dim`` is one and there is no context.
        OptionError: If the bound is not positive.

    References:
        Sorrenson et al., GIN, arXiv 2001.04872. The mean over the moved coordinates alone, and
        the case of a single one, are derived here.

    Examples:
        >>> import torch
        >>> GINCoupling(4, hidden=(8,)).inverse(torch.ones(1, 4))[1]
        tensor([0.])
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (64, 64),
        context_dim: int = 0,
        reverse: bool = False,
        max_log_scale: float | None = 2.0,
        activation: Callable[[], nn.Module] = nn.GELU,
    ) -> None:
        _, num_moved = coupling_sizes(dim, context_dim > 0, type(self).__name__)
        transform: ElementTransform = CentredAffine(max_log_scale)
        if num_moved == 1:
            warnings.warn(
                f"GINCoupling of dim={dim} moves one coordinate, whose log-scale minus its own "
                "mean is zero: the layer is NICECoupling. Take that, or more dimensions.",
                ReducedLayerWarning,
                stacklevel=level_of_caller(),
            )
            transform = Additive()
        super().__init__(dim, transform, hidden, context_dim, reverse, activation)
        self.max_log_scale = max_log_scale

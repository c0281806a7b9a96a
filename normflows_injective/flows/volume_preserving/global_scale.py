"""One scale for all coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from ...checks import check_shape
from ..layer import Layer


@final
class GlobalScale(Layer):
    r"""Multiply every element by one learned factor; it starts as the identity.

    .. math:: x = e^{a} z, \qquad \log\det = D a

    The log-det is the same for all samples, so that a flow of volume-preserving layers and this
    one still has a constant log-det.

    Args:
        shape: Number of coordinates :math:`D`, or an event shape of :math:`D` elements.

    Raises:
        OptionError: If a size is not a positive integer.

    References:
        Draxler et al., arXiv 2402.06578, use one scale beside volume-preserving couplings. It is
        kept as a logarithm here, so that no step of an optimiser can make it negative.

    Examples:
        >>> scale = GlobalScale(3)
        >>> _ = scale.log_scale.data.fill_(math.log(2))
        >>> x, log_det = scale(torch.ones(1, 3))
        >>> x.tolist(), log_det.exp().tolist()
        ([[2.0, 2.0, 2.0]], [8.0])
    """

    takes_context = False

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__()
        self.shape = check_shape(shape, "shape")
        self.size = math.prod(self.shape)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents (B, *shape) to data, with the log-det (B,) in nats."""
        return z * self.log_scale.exp(), self.size * self.log_scale + z.new_zeros(z.shape[0])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (B, *shape) to latents, with the log-det (B,) in nats."""
        return x * (-self.log_scale).exp(), x.new_zeros(x.shape[0]) - self.size * self.log_scale

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"shape={self.shape}"

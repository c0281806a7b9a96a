"""A layer for some of the coordinates, which leaves the others as they are."""

from __future__ import annotations

from collections.abc import Collection
from typing import final

import normflows as nf
import torch
from torch import Tensor, nn

from ..errors import OptionError, UnsupportedLayerError
from ..host.calls import summed_forward, summed_inverse
from ..host.context import needs_context, takes_context
from .injection import Injection
from .layer import Layer


@final
class OnCoordinates(Layer):
    r"""A layer :math:`f` of some coordinates I, and the identity of the others.

    .. math:: x_I = f(z_I), \quad x_i = z_i\ (i \notin I), \qquad \log\det = \log\det f'

    Args:
        layer: :math:`f`, from :math:`|I|` coordinates to as many.
        indices: I, in the order in which the layer takes them.
        dim: Number of all coordinates.

    Raises:
        OptionError: If an index occurs twice or is none of the coordinates.
        UnsupportedLayerError: If the layer raises the dimension.

    References:
        A block of the Jacobian is that of the layer, the rest the identity.

    Examples:
        >>> from normflows_injective.flows.coupling import LULinear
        >>> layer = OnCoordinates(LULinear(2), [0, 2], 3)
        >>> z = torch.randn(4, 3)
        >>> bool((layer(z)[0][:, 1] == z[:, 1]).all())
        True
    """

    def __init__(self, layer: nf.flows.Flow, indices: Collection[int], dim: int) -> None:
        super().__init__()
        chosen = list(indices)
        if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(dim)):
            raise OptionError(
                f"indices must be different numbers from 0 to {dim - 1}, one at least, got "
                f"{chosen}."
            )
        if isinstance(layer, Injection):
            raise UnsupportedLayerError(
                f"{type(layer).__name__} raises the dimension, so the coordinates would not keep "
                "their places. Use nfi.flows.ProductSurface."
            )
        self.layer, self.indices, self.dim, self.shape = layer, tuple(chosen), dim, (dim,)
        others = [i for i in range(dim) if i not in set(chosen)]
        order = torch.tensor(chosen + others)
        self._order = nn.Buffer(order, persistent=False)
        self._back = nn.Buffer(order.argsort(), persistent=False)
        self.takes_context = takes_context(layer)
        self.needs_context = needs_context(layer)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coordinates (B, d) to coordinates (B, d), with the log-det (B,) in nats."""
        return self._apply_to(z, context, inverse=False)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coordinates (B, d) back to coordinates (B, d), with the log-det (B,) in nats."""
        return self._apply_to(x, context, inverse=True)

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"indices={self.indices}, dim={self.dim}"

    def _apply_to(
        self, value: Tensor, context: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        sizes = [len(self.indices), self.dim - len(self.indices)]
        chosen, others = value.index_select(1, self._order).split(sizes, dim=1)
        through = summed_inverse if inverse else summed_forward
        chosen, log_det = through([self.layer], chosen, context)
        return torch.cat([chosen, others], 1).index_select(1, self._back), log_det

"""Autoregressive layers: every element is transformed, given those before it."""

from __future__ import annotations

from typing import final

from normflows.nets.made import MADE
from torch import Tensor, nn

from ...checks import check_count
from ...errors import OptionError
from ...host.context import expect_context
from ..layer import Layer
from .transforms import Affine, ElementTransform, check_transform


@final
class Autoregressive(Layer):
    r"""Masked autoregressive layer with any element transform; it starts as the identity.

    .. math:: z_i = h_{\theta_i(x_{1:i-1}, c)}(x_i), \qquad
              \log\det = \sum_i \log h'_{\theta_i}(x_i)

    One pass of the masked network of normflows gives all parameters, so data go to latents at
    once; sampling takes :math:`D` passes. The layer of normflows does it the other way round.

    Args:
        dim: Number of coordinates :math:`D`.
        transform: Map of one element, ``Affine()`` by default.
        width: Width of the network, at least :math:`D - 1` to see all elements; by default the
            larger of 64 and :math:`D`.
        num_blocks: Number of residual blocks of the network.
        context_dim: Number of context features; 0 for none.
        reverse: Whether an element is transformed given those after it.

    Raises:
        OptionError: If a number is not a positive integer, or the transform is no
            :class:`ElementTransform` of single elements.
        ContextError: When called, if a context is missing or of another width.

    References:
        Papamakarios et al., Masked autoregressive flow, arXiv 1705.07057.

    Examples:
        >>> import torch
        >>> flow = Autoregressive(3, width=8)
        >>> x = torch.randn(2, 3)
        >>> z, log_det = flow.inverse(x)
        >>> bool(torch.allclose(flow(z)[0], x, atol=1e-6))
        True
    """

    def __init__(
        self,
        dim: int,
        transform: ElementTransform | None = None,
        width: int | None = None,
        num_blocks: int = 1,
        context_dim: int = 0,
        reverse: bool = False,
    ) -> None:
        super().__init__()
        width = max(64, dim) if width is None else width
        check_count(width, "width")
        check_count(num_blocks, "num_blocks")
        if width < dim - 1:
            # The masks give every hidden unit the number of elements that it may see.
            raise OptionError(
                f"width must be at least dim - 1 = {dim - 1}, or elements would not see all "
                f"before them, got {width}. Widen the network."
            )
        self.dim, self.width, self.num_blocks = dim, width, num_blocks
        self.shape, self.reverse, self.context_dim = (dim,), reverse, context_dim
        self.transform = check_transform(Affine() if transform is None else transform)
        if not self.transform.is_elementwise:
            raise OptionError(
                f"Autoregressive needs a transform of single elements, got {self.transform}, "
                "which looks at the parameters of all. Use Additive() to keep volumes."
            )
        self.net = MADE(
            dim,
            width,
            context_features=context_dim or None,
            num_blocks=num_blocks,
            output_multiplier=self.transform.num_parameters,
            activation=nn.functional.silu,
        )
        nn.init.zeros_(self.net.final_layer.weight)
        nn.init.zeros_(self.net.final_layer.bias)
        self.takes_context = self.needs_context = context_dim > 0

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents (B, D) to data (B, D), one after the other, with the log-det (B,) in nats."""
        z = z.flip(1) if self.reverse else z
        # After i passes the first i elements are those of the data.
        x = z
        for _ in range(self.shape[0]):
            x, log_det = self.transform.forward(z, self._conditions(x, context))
        return (x.flip(1) if self.reverse else x), log_det

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (B, D) to latents (B, D) at once, with the log-det (B,) in nats."""
        x = x.flip(1) if self.reverse else x
        z, log_det = self.transform.inverse(x, self._conditions(x, context))
        return (z.flip(1) if self.reverse else z), log_det

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"dim={self.shape[0]}, transform={self.transform}, reverse={self.reverse}"

    def _conditions(self, x: Tensor, context: Tensor | None) -> Tensor:
        context = context if self.context_dim else None
        expect_context(context, x.shape[0], self.context_dim, "Autoregressive")
        parameters: Tensor = self.net(x, None if context is None else context.to(x.dtype))
        return parameters.reshape(*x.shape, self.transform.num_parameters)

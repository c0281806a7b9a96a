"""Independent laws side by side, as the base of a product of surfaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from ..checks import describe
from ..errors import OptionError
from ..host.bases import base_log_prob
from ..host.context import context_arguments, needs_context, takes_context
from .law import Law


@final
class ProductLaw(Law):
    r"""Independent laws of consecutive coordinates.

    .. math:: \log p(z_1, \dots, z_m) = \sum_j \log p_j(z_j)

    Args:
        laws: Laws of vectors, of this package or of normflows, that tell their ``shape``.

    Raises:
        OptionError: If there is no law, or one has no shape (d,).

    References:
        The density of independent variables.

    Examples:
        >>> from normflows_injective.distributions import DiagGaussian, UniformSphere
        >>> base = ProductLaw([DiagGaussian(2, trainable=False), UniformSphere(3)])
        >>> z, log_p = base(5)
        >>> z.shape, log_p.shape
        (torch.Size([5, 5]), torch.Size([5]))
    """

    def __init__(self, laws: Sequence[Any]) -> None:
        super().__init__()
        shapes = [tuple(getattr(law, "shape", ()) or ()) for law in laws]
        for law, shape in zip(laws, shapes, strict=True):
            if len(shape) != 1 or not isinstance(law, nn.Module):
                raise OptionError(
                    f"laws must be distributions of vectors with a shape (d,), got {describe(law)}"
                    ". Give laws of nfi.distributions or of normflows."
                )
        if not shapes:
            raise OptionError("A product needs one law at least, got none.")
        self.laws = nn.ModuleList(laws)
        self._sizes = [shape[0] for shape in shapes]
        self.shape = (sum(self._sizes),)
        self.takes_context = any(map(takes_context, laws))
        self.needs_context = any(map(needs_context, laws))

    def forward(
        self, num_samples: int = 1, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw samples (n, d) with their log-density (n,) in nats."""
        draws = [law(num_samples, **context_arguments(law, context)) for law in self.laws]
        return torch.cat([z for z, _ in draws], 1), torch.stack([p for _, p in draws]).sum(0)

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density (B,) in nats of points (B, d)."""
        terms = [
            base_log_prob(law, part, context)
            for law, part in zip(self.laws, z.split(self._sizes, 1), strict=True)
        ]
        return torch.stack(terms).sum(0)

"""A learned star-like surface, its radius given by a network of the direction."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

from ...errors import OptionError
from ...host.context import needs_context, takes_context
from .gauge import Gauge, one_each


@final
class NetworkRadius(Gauge):
    r"""A surface whose radius is a network of the direction.

    .. math:: \log r = \log t + \log r_{\min}
              + \sigma(g(u)) \log\frac{r_{\max}}{r_{\min}}

    The network takes the direction :math:`u` rather than angles, which have a seam and poles where
    the surface would tear. Use smooth activations, because the volume contains the gradient of the
    network and training differentiates it. With ``even=True`` the surface is symmetric about the
    centre. Train with a reconstruction term, ``nfi.ExactLikelihood(beta=100.0)``, and with
    ``off_manifold="project"``: by likelihood alone the surface wrinkles without limit.

    Args:
        net: Module of directions :math:`(B, D)` to :math:`(B,)` or :math:`(B, 1)`. With a context
            it is called ``net(u, context=context)`` if it has that keyword.
        r_min: Least radius at level 1.
        r_max: Greatest radius at level 1.
        even: Whether :math:`g(u)` is replaced by :math:`(g(u) + g(-u))/2`.

    Raises:
        OptionError: Unless :math:`0 < r_{\min} < r_{\max}`.

    References:
        Learned star-like manifolds: arXiv 2406.09116, there by networks of angles.

    Examples:
        >>> gauge = NetworkRadius(nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1)))
        >>> gauge.log_radius(torch.eye(3), torch.tensor(1.0)).shape
        torch.Size([3])
    """

    def __init__(
        self, net: nn.Module, r_min: float = 0.1, r_max: float = 10.0, even: bool = False
    ) -> None:
        super().__init__()
        if not 0 < r_min < r_max < math.inf:
            raise OptionError(f"Give radii with 0 < r_min < r_max, got {r_min!r} and {r_max!r}.")
        self.net, self.r_min, self.r_max, self.even = net, r_min, r_max, even
        self.takes_context, self.needs_context = takes_context(net), needs_context(net)

    def log_radius(self, u: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-radius along directions."""
        rule = "The network of NetworkRadius must return one value per direction"
        height = one_each(self.net, u, context, rule)
        if self.even:
            height = 0.5 * (height + one_each(self.net, -u, context, rule))
        share = height.sigmoid() * math.log(self.r_max / self.r_min)
        return torch.as_tensor(level).log() + math.log(self.r_min) + share

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"r_min={self.r_min:g}, r_max={self.r_max:g}, even={self.even}"

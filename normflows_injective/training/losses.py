"""Losses of the phases before the joint one: functions of rows, and the module of their mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, final

from torch import Tensor, nn

from ..flows.stack import joint_decode, joint_encode, training_inverse
from ..host.bases import base_log_prob
from ..host.calls import Flows
from ..models.loss_terms import mean_loss
from ..volume.reconstruction import squared_error


def errors_of(layers: Flows, x: Tensor, context: Tensor | None) -> Tensor:
    r"""Squared errors :math:`\lVert x - g(f(x)) \rVert^2` (B,), as the training term has them."""
    return squared_error(x, joint_decode(layers, joint_encode(layers, x, context), context))


def nll_of(q0: Any, layers: Flows, codes: Tensor, context: Tensor | None) -> Tensor:
    r"""Negative log-densities :math:`-\log p(c)` (B,) of codes, in nats."""
    z, log_det = training_inverse(layers, codes, context)
    return -base_log_prob(q0, z, context) - log_det


@final
class MeanLoss(nn.Module):
    """The mean over a batch of a function of its rows, as a module that can be wrapped.

    Args:
        function: Data (B, *) and context to losses (B,).
        parts: Modules that the function calls, whose parameters are trained.
    """

    def __init__(
        self, function: Callable[[Tensor, Tensor | None], Tensor], parts: Iterable[nn.Module]
    ) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(
        self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """The mean, 0-dimensional, with weights (B,) if there are any."""
        return mean_loss(self.function(x, context), weights)

"""Averages of weights over a training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor

from ..errors import OptionError

_POWER = 8


@final
class AveragedWeights:
    r"""Average of the weights that a training passes, in which late ones count most.

    .. math:: e \leftarrow e + \big(1 - (1 - 1/k)^8\big)\,(w - e), \qquad k = 1, 2, \dots

    The weights of step j enter in proportion to :math:`j^8 - (j-1)^8`, so the average reaches over
    about the last ninth of the training, however long it is.

    Args:
        parameters: Parameters to average.

    Raises:
        OptionError: If there are none, or they are no tensors.

    References:
        The power function profile of Karras et al., arXiv 2312.02696, section 3.1.

    Examples:
        >>> weight = torch.zeros(1, requires_grad=True)
        >>> averages = AveragedWeights([weight])
        >>> for value in (0.0, 1.0):
        ...     _ = weight.data.fill_(value)
        ...     averages.update()
        >>> with averages.applied():
        ...     round(weight.item(), 4)
        0.9961
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        values: Any = parameters
        self.parameters: list[Tensor] = list(values) if isinstance(values, Iterable) else []
        if not self.parameters or not all(isinstance(p, Tensor) for p in self.parameters):
            raise OptionError(
                "parameters must be the parameters of a model, such as list(model.parameters())."
            )
        self.values = [parameter.detach().clone() for parameter in self.parameters]
        self.count = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights into the average."""
        self.count += 1
        share = 1 - (1 - 1 / self.count) ** _POWER
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter, share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the parameters their averages for a while."""
        before = [parameter.detach().clone() for parameter in self.parameters]
        write(self.parameters, self.values)
        try:
            yield
        finally:
            write(self.parameters, before)

    def state_dict(self) -> dict[str, Any]:
        """Values and their number."""
        return {"values": self.values, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from values and their number."""
        write(self.values, state["values"])
        self.count = state["count"]


@torch.no_grad()
def write(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write values into parameters, in place."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)

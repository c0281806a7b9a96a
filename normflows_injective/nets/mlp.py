"""Fully connected networks with smooth activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import final

from torch import Tensor, nn

from ..checks import check_count
from ..errors import OptionError
from .joining import ContextNetwork

Activation = Callable[[], nn.Module]


@final
class SmoothMLP(ContextNetwork):
    """Multilayer perceptron with a smooth activation.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        hidden: Widths of the hidden layers.
        context_dim: Number of context features C concatenated to the input; 0 for none.
        activation: Constructor of the activation. It should be smooth: a surrogate learns
            curvature through second derivatives, which vanish for ReLU.

    Raises:
        OptionError: If there is neither an input nor a context.
        ContextError: When called, if a context is missing, superfluous or of another width.

    Examples:
        >>> import torch
        >>> SmoothMLP(5, 2, hidden=(8,), context_dim=3)(torch.ones(4, 5), torch.ones(4, 3)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: Sequence[int] = (256, 256),
        context_dim: int = 0,
        activation: Activation = nn.SiLU,
    ) -> None:
        # A coupling of one coordinate has no input and sees the context alone.
        if in_features + context_dim == 0:
            raise OptionError(
                "in_features must be a positive integer without a context, got 0. Give the width "
                "of the input."
            )
        super().__init__((in_features,), context_dim)
        self.in_features, self.out_features = in_features, out_features
        self.hidden = tuple(hidden)
        self.layers = _perceptron([in_features + context_dim, *hidden, out_features], activation)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map (B, in_features), with an optional context (B, C), to (B, out_features)."""
        out: Tensor = self.layers(self.join(x, context))
        return out


@final
class ResidualMLP(ContextNetwork):
    r"""Residual perceptron: a linear map in, blocks :math:`h + \mathrm{MLP}(h)`, a linear map out.

    The last layer of every block starts at zero, so the network starts linear, and a deep stack is
    as well conditioned as a shallow one.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        width: Width of the blocks.
        num_blocks: Number of blocks.
        context_dim: Number of context features C, given to every block; 0 for none.
        activation: Constructor of a smooth activation.

    Raises:
        OptionError: If ``in_features`` is not positive.
        ContextError: When called, if a context is missing, superfluous or of another width.

    References:
        He et al., Deep residual learning, arXiv 1512.03385.

    Examples:
        >>> import torch
        >>> ResidualMLP(5, 2, width=8, num_blocks=2)(torch.ones(4, 5)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        width: int = 256,
        num_blocks: int = 4,
        context_dim: int = 0,
        activation: Activation = nn.SiLU,
    ) -> None:
        check_count(in_features, "in_features")
        super().__init__((in_features,), context_dim)
        self.in_features, self.out_features = in_features, out_features
        self.width, self.num_blocks = width, num_blocks
        self.input = nn.Linear(in_features, width)
        blocks = [
            _perceptron([width + context_dim, width, width], activation) for _ in range(num_blocks)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.output = nn.Linear(width, out_features)
        for block in blocks:
            start_at_zero(block[-1])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map (B, in_features), with an optional context (B, C), to (B, out_features)."""
        self._check_axes(x)
        h = self.input(x)
        for block in self.blocks:
            h = h + block(self.join(h, context))
        out: Tensor = self.output(h)
        return out


def _perceptron(widths: Sequence[int], activation: Activation) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


def start_at_zero(layer: nn.Module) -> None:
    """Set the parameters of a network's last layer to zero, so that its outputs start there."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)

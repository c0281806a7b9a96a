"""Coupling layers: a part of the coordinates is transformed, given the other part."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from ...checks import check_count, check_counts, check_event_shape
from ...errors import ShapeError
from ...host.context import needs_context, takes_context, with_context
from ...nets.mlp import SmoothMLP
from ..layer import Layer
from .transforms import Affine, ElementTransform, check_transform

__all__ = ["Coupling", "NetworkCoupling", "coupling_sizes"]


def coupling_sizes(dim: int, takes_context: bool, name: str) -> tuple[int, int]:
    r"""How many of :math:`D` coordinates a coupling keeps, :math:`\lfloor D/2 \rfloor`, and moves.

    Args:
        dim: :math:`D`.
        takes_context: Whether there is a context, given which a single coordinate can be moved.
        name: What the message calls the layer.

    Raises:
        ShapeError: If no coordinate is left to find the parameters from.
        OptionError: If it is not a positive integer.

    Examples:
        >>> coupling_sizes(5, False, "Coupling")
        (2, 3)
    """
    check_count(dim, "dim")
    if dim == 1 and not takes_context:
        raise ShapeError(
            f"{name} needs at least two coordinates, one that is kept and one that is moved, got "
            f"dim={dim}. Leave the layer out, or build it with a context."
        )
    return dim // 2, dim - dim // 2


class Coupling(Layer):
    r"""A coupling of vectors with any conditioner and any element transform; a base class.

    With :math:`x = (u, v)`, :math:`u` the first :math:`\lfloor D/2 \rfloor` coordinates (the last,
    if ``reverse``), from data to latents

    .. math:: u' = u, \qquad v' = h_{\theta(u, c)}(v), \qquad
              \log\det = \sum_i \log h'_{\theta_i}(v_i)

    Args:
        dim: Number of coordinates :math:`D`.
        conditioner: Module from :math:`u` of shape (B, :math:`\lfloor D/2 \rfloor`), and a context
            if it was built for one, to parameters (B, A P) of the
            :math:`A = \lceil D/2 \rceil` coordinates :math:`v`.
        transform: :math:`h`, with :math:`P` parameters for every element.
        reverse: Whether the last rather than the first coordinates are kept.

    Raises:
        ShapeError: If no coordinate is left to find the parameters from, or when called, if the
            conditioner answers with another number of parameters.
        OptionError: If the transform is no :class:`ElementTransform`.
    """

    def __init__(
        self, dim: int, conditioner: nn.Module, transform: ElementTransform, reverse: bool = False
    ) -> None:
        super().__init__()
        self.num_kept, self.num_moved = coupling_sizes(
            dim, takes_context(conditioner), type(self).__name__
        )
        self.dim, self.shape, self.reverse = dim, (dim,), reverse
        self.conditioner, self.transform = conditioner, check_transform(transform)
        self.takes_context, self.needs_context = (
            takes_context(conditioner),
            needs_context(conditioner),
        )

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents (B, D) to data (B, D), with the log-det (B,) in nats."""
        kept, moved = self.split(z, "z")
        x, log_det = self.transform.forward(moved, self.parameters_of(kept, context))
        return self._join(kept, x), log_det

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (B, D) to latents (B, D), with the log-det (B,) in nats."""
        kept, moved = self.split(x, "x")
        z, log_det = self.transform.inverse(moved, self.parameters_of(kept, context))
        return self._join(kept, z), log_det

    def split(self, value: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """The coordinates that are kept and those that are moved, of a batch (B, D)."""
        check_event_shape(value, self.shape, name)
        if self.reverse:
            moved, kept = value.split((self.num_moved, self.num_kept), dim=1)
            return kept, moved
        kept, moved = value.split((self.num_kept, self.num_moved), dim=1)
        return kept, moved

    def parameters_of(self, kept: Tensor, context: Tensor | None) -> Tensor:
        """Parameters (B, A, P) of the elements that are moved."""
        said = self.conditioner(kept, **with_context(self.conditioner, context))
        sizes = (self.num_moved, self.transform.num_parameters)
        check_event_shape(said.flatten(1), (math.prod(sizes),), "the conditioner's output")
        parameters: Tensor = said.reshape(kept.shape[0], *sizes)
        return parameters

    def extra_repr(self) -> str:
        """Options that are no modules."""
        return f"dim={self.shape[0]}, transform={self.transform}, reverse={self.reverse}"

    def _join(self, kept: Tensor, moved: Tensor) -> Tensor:
        return torch.cat([moved, kept] if self.reverse else [kept, moved], dim=1)


@final
class NetworkCoupling(Coupling):
    r"""A coupling whose parameters a smooth perceptron finds; it starts as the identity.

    Args:
        dim: Number of coordinates :math:`D`.
        transform: What is done to an element.
        hidden: Widths of the hidden layers.
        context_dim: Number of context features; 0 for none.
        reverse: Whether the last rather than the first coordinates are kept.
        activation: Constructor of the activation. A smooth one serves behind an injection.

    Raises:
        ShapeError: If ``dim`` is one and there is no context.
        OptionError: If a width or ``context_dim`` is out of range, or the transform is none.

    References:
        Dinh et al., arXiv 1605.08803.

    Examples:
        >>> coupling = NetworkCoupling(3, hidden=(8,))
        >>> coupling.inverse(torch.ones(1, 3))[1]
        tensor([0.], grad_fn=<SumBackward1>)
    """

    def __init__(
        self,
        dim: int,
        transform: ElementTransform | None = None,
        hidden: Sequence[int] = (64, 64),
        context_dim: int = 0,
        reverse: bool = False,
        activation: Callable[[], nn.Module] = nn.GELU,
    ) -> None:
        transform = check_transform(Affine() if transform is None else transform)
        net = network_for(type(self).__name__, dim, transform, hidden, context_dim, activation)
        super().__init__(dim, net, transform, reverse)
        self.hidden, self.context_dim = tuple(hidden), context_dim


def network_for(
    name: str,
    dim: int,
    transform: ElementTransform,
    hidden: Sequence[int],
    context_dim: int,
    activation: Callable[[], nn.Module],
) -> SmoothMLP:
    """A perceptron for the parameters of a coupling, whose last layer is zero.

    Args:
        name: What messages call the coupling.
        dim: Number of its coordinates.
        transform: What it does to an element.
        hidden: Widths of the hidden layers.
        context_dim: Number of context features; 0 for none.
        activation: Constructor of the activation.

    Raises:
        ShapeError: If no coordinate is left to find the parameters from.
        OptionError: If a number is not a positive integer.

    Examples:
        >>> net = network_for("Coupling", 2, Affine(), (4,), 0, nn.GELU)
        >>> net(torch.ones(1, 1)).abs().sum().item()
        0.0
    """
    hidden = check_widths(hidden)
    if context_dim:
        check_count(context_dim, "context_dim")
    num_kept, num_moved = coupling_sizes(dim, context_dim > 0, name)
    outputs = num_moved * transform.num_parameters
    net = SmoothMLP(num_kept, outputs, hidden, context_dim, activation)
    for parameter in net.layers[-1].parameters():
        nn.init.zeros_(parameter)
    return net


def check_widths(hidden: Sequence[int]) -> tuple[int, ...]:
    """Widths of hidden layers, each a positive integer, as a tuple.

    Raises:
        OptionError: If they are something else.

    Examples:
        >>> check_widths([64, 64])
        (64, 64)
    """
    return check_counts(hidden, "hidden", empty=True)

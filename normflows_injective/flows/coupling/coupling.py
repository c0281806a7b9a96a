"""Coupling layers: some coordinates are transformed, given the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from ...checks import check_event_shape
from ...errors import ShapeError
from ...host.context import context_arguments, needs_context, takes_context
from ...nets.mlp import SmoothMLP, start_at_zero
from ..layer import Layer
from .transforms import Affine, ElementTransform, check_transform


def coupling_sizes(dim: int, takes_context: bool, name: str) -> tuple[int, int]:
    r"""Numbers of coordinates that a coupling keeps, :math:`\lfloor D/2 \rfloor`, and moves."""
    if dim == 1 and not takes_context:
        raise ShapeError(
            f"{name} needs at least two coordinates, one that is kept and one that is moved, got "
            f"dim={dim}. Leave the layer out, or build it with a context."
        )
    return dim // 2, dim - dim // 2


class Coupling(Layer):
    r"""A coupling of vectors with any conditioner and any element transform; a base class.

    With :math:`x = (u, v)`, where :math:`u` holds the first :math:`\lfloor D/2 \rfloor`
    coordinates (the last, if ``reverse``), the map from data to latents is

    .. math:: u' = u, \qquad v' = h_{\theta(u, c)}(v), \qquad
              \log\det = \sum_i \log h'_{\theta_i}(v_i)

    Args:
        dim: Number of coordinates :math:`D`.
        conditioner: Module that maps :math:`u` of shape (B, :math:`\lfloor D/2 \rfloor`), and a
            context if it was built for one, to parameters (B, A P) of the
            :math:`A = \lceil D/2 \rceil` coordinates :math:`v`.
        transform: :math:`h`, with :math:`P` parameters for every element.
        reverse: Whether the last rather than the first coordinates are kept.

    Raises:
        ShapeError: If no coordinate is left for the conditioner to see, or, when called, if the
            conditioner returns a wrong number of parameters.
        OptionError: If the transform is no :class:`ElementTransform`.

    References:
        Dinh et al., Density estimation using Real NVP, arXiv 1605.08803.

    Examples:
        >>> coupling = Coupling(3, nn.Linear(1, 4), Affine())
        >>> x = torch.randn(2, 3)
        >>> bool(torch.allclose(coupling(coupling.inverse(x)[0])[0], x, atol=1e-5))
        True
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
        self.takes_context = takes_context(conditioner)
        self.needs_context = needs_context(conditioner)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents (B, D) to data (B, D), with the log-det (B,) in nats."""
        u, v = self.split(z, "z")
        v, log_det = self.transform.forward(v, self.parameters_of(u, context))
        return self._join(u, v), log_det

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (B, D) to latents (B, D), with the log-det (B,) in nats."""
        u, v = self.split(x, "x")
        v, log_det = self.transform.inverse(v, self.parameters_of(u, context))
        return self._join(u, v), log_det

    def split(self, value: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """The coordinates of a batch (B, D) that are kept, and those that are moved."""
        check_event_shape(value, self.shape, name)
        if self.reverse:
            return value[:, self.num_moved :], value[:, : self.num_moved]
        return value[:, : self.num_kept], value[:, self.num_kept :]

    def parameters_of(self, kept: Tensor, context: Tensor | None) -> Tensor:
        """Parameters (B, A, P) of the elements that are moved."""
        output: Tensor = self.conditioner(kept, **context_arguments(self.conditioner, context))
        sizes = (self.num_moved, self.transform.num_parameters)
        check_event_shape(output.flatten(1), (math.prod(sizes),), "the conditioner's output")
        return output.reshape(kept.shape[0], *sizes)

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"dim={self.shape[0]}, transform={self.transform}, reverse={self.reverse}"

    def _join(self, u: Tensor, v: Tensor) -> Tensor:
        return torch.cat([v, u] if self.reverse else [u, v], dim=1)


class PerceptronCoupling(Coupling):
    """A coupling with a perceptron as conditioner, with a last layer of zeros; a base class."""

    def __init__(
        self,
        dim: int,
        transform: ElementTransform,
        hidden: Sequence[int],
        context_dim: int,
        reverse: bool,
        activation: Callable[[], nn.Module],
    ) -> None:
        num_kept, num_moved = coupling_sizes(dim, context_dim > 0, type(self).__name__)
        num_outputs = num_moved * transform.num_parameters
        net = SmoothMLP(num_kept, num_outputs, hidden, context_dim, activation)
        start_at_zero(net.layers[-1])
        super().__init__(dim, net, transform, reverse)
        self.hidden, self.context_dim = tuple(hidden), context_dim


@final
class NetworkCoupling(PerceptronCoupling):
    r"""A coupling with a smooth perceptron as conditioner; it starts as the identity.

    Args:
        dim: Number of coordinates :math:`D`.
        transform: Map of one element, ``Affine()`` by default.
        hidden: Widths of the hidden layers.
        context_dim: Number of context features; 0 for none.
        reverse: Whether the last rather than the first coordinates are kept.
        activation: Constructor of the activation. A smooth one also serves after an injection.

    Raises:
        ShapeError: If ``dim`` is one and there is no context.
        OptionError: If a width or ``context_dim`` is out of range, or the transform is no
            :class:`ElementTransform`.

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
        super().__init__(dim, transform, hidden, context_dim, reverse, activation)

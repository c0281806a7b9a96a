"""Gradients of functions with one value per sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .forward_mode import refuse_tangents
from .proven import unproven_nodes
from .pulling import first_derivative_only
from .recording import record
from .settings import differentiable_attention

__all__ = ["out_of_inference", "value_and_gradient"]


def out_of_inference(tensor: Tensor) -> Tensor:
    """A tensor as it is or, if it was made in inference mode, a copy that autograd can save.

    Args:
        tensor: What a function that will be differentiated holds.

    Examples:
        >>> with torch.inference_mode():
        ...     made = torch.zeros(2)
        >>> made.is_inference(), out_of_inference(made).is_inference()
        (True, False)
    """
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def value_and_gradient(
    function: Callable[[Tensor], Tensor], point: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Values :math:`f(x_b)` and gradients :math:`\nabla f(x_b)` of a batch.

    Both are on the caller's graph, so that they can be differentiated again, by the point and by
    whatever the function holds; without gradients, and in inference mode, they are plain values.
    Where the function is not written with proven functions (see ``proven.py``), the gradients can
    be differentiated once.

    Args:
        function: Map of a batch :math:`(B, *)` to :math:`(B,)`, acting on each sample alone. What
            it holds must not be of inference mode, see :func:`out_of_inference`.
        point: :math:`x` of shape :math:`(B, *)`.

    Returns:
        Values of shape :math:`(B,)`, gradients of shape :math:`(B, *)`.

    Raises:
        UnsupportedLayerError: If the gradients have no right derivative.
        ForwardModeError: If a tangent comes in, and the function is not proven.

    Examples:
        >>> value_and_gradient(lambda x: x.square().sum(1), torch.ones(1, 2))
        (tensor([2.]), tensor([[2., 2.]]))
    """
    recording = torch.is_grad_enabled()
    point = out_of_inference(point)
    names: list[frozenset[str]] = []

    def noting(x: Tensor) -> Tensor:
        value = record(function, x).value
        names.append(unproven_nodes(value, [x]))
        return value

    # Fused kernels of attention have no second derivatives.
    with torch.inference_mode(False), differentiable_attention():
        value, pull = torch.func.vjp(noting, point)[:2]
        (gradient,) = pull(torch.ones_like(value))
        if names[0] and recording:
            (once,) = first_derivative_only([gradient], [point], names[0])
            gradient = gradient if once is None else once
    if names[0]:
        refuse_tangents("The gradient of a layer", value, gradient)
    if not recording:
        # The inner derivative has recorded what the function holds, such as parameters. A copy
        # leaves that behind; detaching would also drop the tangents of forward mode.
        value, gradient = value.clone(), gradient.clone()
    return value, gradient

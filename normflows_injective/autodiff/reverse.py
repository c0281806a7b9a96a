r"""A map evaluated once, with its vector-Jacobian products, also inside functional transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import NotInjectiveError, UnsupportedLayerError
from ..modules.contents import holds_script
from .proven import depends_on_others, unproven_nodes
from .pulling import DETACHED, first_derivative_only, pull_each, pull_together
from .recording import point_at, record
from .settings import differentiable_attention
from .transforms import open_transforms

__all__ = ["Reverse", "push_by_reverse", "reverse"]

Map = Callable[[Tensor], Tensor]

# The tensors that TorchScript saves for the backward pass are off the levels of torch.func.
_SCRIPTED = (
    "The map holds TorchScript, through which the transforms of torch.func get derivatives of "
    "derivatives wrong, and forward mode needs those transforms. Take the gradient by "
    "torch.autograd.grad or backward(), or put in the network from which the script was made."
)

# The node of the graph in which TorchScript hides what it has optimised.
_OPTIMISED = "DifferentiableGraphBackward"


class Reverse(NamedTuple):
    r"""Value of a map and its products.

    Attributes:
        value: :math:`f(x)` of shape (B, *).
        pull: :math:`u \mapsto u^\top f'(x)` of tensors (K, B, *), on a graph. Products through
            unproven functions can be differentiated once.
        unproven: Names of what has no proved derivatives beyond the second.
        is_constant: Whether nobody can differentiate the value, because neither the point nor what
            the map holds has gradients.
    """

    value: Tensor
    pull: Callable[[Tensor], Tensor]
    unproven: frozenset[str]
    is_constant: bool = False


def reverse(function: Map, point: Tensor) -> Reverse:
    r"""Evaluate a map so that differentiable products :math:`u^\top J` can be taken.

    Args:
        function: Map of a batch (B, *) to a batch, acting on each sample alone.
        point: Where to evaluate, shape (B, *).

    Returns:
        :class:`Reverse`; gradients must be enabled, and reach the point if it has some.

    Raises:
        NotInjectiveError: If the value does not depend on the point.
        UnsupportedLayerError: If the map holds TorchScript and runs inside ``torch.func``.

    Examples:
        >>> reverse(torch.square, torch.ones(1, 2)).pull(torch.ones(1, 1, 2))
        tensor([[[2., 2.]]], grad_fn=<UnsqueezeBackward0>)
    """
    with differentiable_attention():
        return _by_transform(function, point) if open_transforms() else _by_graph(function, point)


def push_by_reverse(taken: Reverse, tangents: Tensor) -> Tensor:
    r"""Jacobian-vector products :math:`J v = \partial_u (u^\top J) v`, on a graph.

    They can be differentiated again where all functions of the map are proven, and only there.

    Args:
        taken: The map.
        tangents: :math:`v` of shape (K, B, *).

    Returns:
        Products of shape (K, B, *).

    Examples:
        >>> taken = reverse(torch.square, torch.ones(1, 2))
        >>> push_by_reverse(taken, torch.ones(1, 1, 2)).detach()
        tensor([[[2., 2.]]])
    """
    # The product is linear in u, so that any u will do but zero, of which torch's derivative of
    # logcumsumexp takes the logarithm.
    u = torch.ones_like(taken.value.detach(), requires_grad=not open_transforms())
    if open_transforms():
        vjp: Any = torch.func.vjp
        pulled, push = vjp(lambda v: taken.pull(v.unsqueeze(0))[0], u)
        products: Tensor = torch.func.vmap(push)(tangents.to(pulled.dtype))[0]
        return products
    (found,) = pull_together(taken.pull(u.unsqueeze(0))[0], [u], tangents, create_graph=True)
    if found is None:
        raise NotInjectiveError(DETACHED)
    return found


def _by_graph(function: Map, point: Tensor) -> Reverse:
    leaf = point_at(point)
    value = record(function, leaf, by_cotangent=True).value
    if not value.requires_grad:
        raise NotInjectiveError(DETACHED)
    unproven = unproven_nodes(value, [leaf])

    def pull(cotangents: Tensor) -> Tensor:
        if unproven:
            pulled = pull_each(value, [leaf], cotangents, create_graph=True)
            (found,) = first_derivative_only(pulled, [leaf], unproven)
        else:
            (found,) = pull_together(value, [leaf], cotangents, create_graph=True)
        if found is None:
            raise NotInjectiveError(DETACHED)
        return found

    is_constant = not (point.requires_grad or depends_on_others(value, leaf))
    return Reverse(value, pull, unproven, is_constant)


def _by_transform(function: Map, point: Tensor) -> Reverse:
    if holds_script(function):
        raise UnsupportedLayerError(_SCRIPTED)
    names: list[frozenset[str]] = []

    def noting(x: Tensor) -> Tensor:
        value = record(function, x).value
        if not value.requires_grad:
            raise NotInjectiveError(DETACHED)
        unproven = unproven_nodes(value, [x])
        # A script that no look found. Until TorchScript optimises it, its nodes are torch's own,
        # and their derivatives are right.
        if any(_OPTIMISED in name for name in unproven):
            raise UnsupportedLayerError(_SCRIPTED)
        names.append(unproven)
        return value

    vjp: Any = torch.func.vjp
    value, pull_one = vjp(noting, point)
    unproven = names[0]

    def pull(cotangents: Tensor) -> Tensor:
        cotangents = cotangents.to(value.dtype)
        if not unproven:
            together: Tensor = torch.func.vmap(pull_one)(cotangents)[0]
            return together
        pulled = torch.stack([pull_one(cotangent)[0] for cotangent in cotangents])
        (found,) = first_derivative_only([pulled], [point], unproven)
        return pulled if found is None else found

    return Reverse(value, pull, unproven)

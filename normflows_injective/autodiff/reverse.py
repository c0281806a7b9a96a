r"""A map evaluated once, with its Jacobian products, also inside functional transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedLayerError
from ..modules.contents import holds_script
from .proven import depends_on_others, unproven_nodes
from .recording import Map, point_at, record
from .settings import differentiable_attention
from .transforms import open_transforms
from .vjps import attached, first_derivative_only, refuse_detached, vjps_one_by_one, vjps_together

# The tensors that TorchScript saves for the backward pass are off the levels of torch.func.
_SCRIPTED = (
    "The map holds TorchScript, through which the transforms of torch.func get derivatives of "
    "derivatives wrong, and forward mode needs those transforms. Take the gradient by "
    "torch.autograd.grad or backward(), or put in the network from which the script was made."
)

# The node of the graph in which TorchScript hides what it has optimised.
_OPTIMISED = "DifferentiableGraphBackward"

_vjp: Any = torch.func.vjp


class Reverse(NamedTuple):
    r"""Value :math:`f(x)`, (B, *), of a map, with products that are on a graph."""

    value: Tensor
    # Takes cotangents u (K, B, *) to u^T f'(x).
    vjp: Callable[[Tensor], Tensor]
    # Names of functions whose derivatives beyond the second are not proved. Products through them
    # can be differentiated once.
    unproven: frozenset[str]
    # Whether neither the point nor the map has gradients, so that nobody can differentiate.
    is_constant: bool = False

    def jvp(self, tangents: Tensor) -> Tensor:
        r"""Products :math:`J v_k = \partial_u (u^\top J) v_k`, (K, B, *), on a graph."""
        # They can be differentiated again where all functions of the map are proven, and only
        # there. The product is linear in u, so that any u will do but zero, of which torch's
        # derivative of logcumsumexp takes the logarithm.
        u = torch.ones_like(self.value.detach(), requires_grad=not open_transforms())
        if open_transforms():
            product, transposed = _vjp(lambda v: self.vjp(v.unsqueeze(0))[0], u)
            products: Tensor = torch.func.vmap(transposed)(tangents.to(product.dtype))[0]
            return products
        product = self.vjp(u.unsqueeze(0))[0]
        return attached(vjps_together(product, [u], tangents, create_graph=True)[0])


def reverse(function: Map, point: Tensor) -> Reverse:
    r"""Evaluate a map at a point (B, *) so that differentiable products can be taken."""
    with differentiable_attention():
        return _by_transform(function, point) if open_transforms() else _by_graph(function, point)


def _by_graph(function: Map, point: Tensor) -> Reverse:
    leaf = point_at(point)
    value = record(function, leaf, by_cotangent=True).value
    refuse_detached(value)
    unproven = unproven_nodes(value, [leaf])

    def vjp(cotangents: Tensor) -> Tensor:
        if unproven:
            products = vjps_one_by_one(value, [leaf], cotangents, create_graph=True)
            products = first_derivative_only(products, [leaf], unproven)
        else:
            products = vjps_together(value, [leaf], cotangents, create_graph=True)
        return attached(products[0])

    is_constant = not (point.requires_grad or depends_on_others(value, leaf))
    return Reverse(value, vjp, unproven, is_constant)


def _by_transform(function: Map, point: Tensor) -> Reverse:
    if holds_script(function):
        raise UnsupportedLayerError(_SCRIPTED)
    names: list[frozenset[str]] = []

    def noting(x: Tensor) -> Tensor:
        value = record(function, x).value
        refuse_detached(value)
        unproven = unproven_nodes(value, [x])
        # A script that no look found. Until TorchScript optimises it, its nodes are torch's own,
        # and their derivatives are right.
        if any(_OPTIMISED in name for name in unproven):
            raise UnsupportedLayerError(_SCRIPTED)
        names.append(unproven)
        return value

    value, vjp_of_one = _vjp(noting, point)
    unproven = names[0]

    def vjp(cotangents: Tensor) -> Tensor:
        cotangents = cotangents.to(value.dtype)
        if not unproven:
            together: Tensor = torch.func.vmap(vjp_of_one)(cotangents)[0]
            return together
        products = torch.stack([vjp_of_one(cotangent)[0] for cotangent in cotangents])
        (once,) = first_derivative_only([products], [point], unproven)
        return products if once is None else once

    return Reverse(value, vjp, unproven)

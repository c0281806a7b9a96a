r"""Reverse-mode products :math:`u^\top J` that may be differentiated again, or say why not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import is_readable
from ..errors import NotInjectiveError, UnsupportedLayerError
from .proven import ONCE, WRONG_TWICE, nodes_of, unproven_nodes

_DETACHED = (
    "The output of a map does not depend on its input, or the dependence was cut inside it, so it "
    "has no Jacobian. Remove detach(), no_grad() and .data from the network."
)

_NO_SECOND = (
    "A layer of the map has no second derivative in torch ({}), so the gradient of a Jacobian "
    "product does not exist. Replace the layer, write it with other functions, or evaluate "
    "without gradients. torch says: {}"
)

# Nodes in the graph of a derivative that cannot be differentiated.
_BROKEN = frozenset({"torch::autograd::Error", "torch::autograd::NotImplemented"})

Products = list[Tensor | None]


def refuse_detached(value: Tensor) -> None:
    """Raise if a value of a map is on no graph."""
    if not value.requires_grad:
        raise NotInjectiveError(_DETACHED)


def attached(product: Tensor | None) -> Tensor:
    """A product, which is None where the value does not depend on its end and is refused."""
    if product is None:
        raise NotInjectiveError(_DETACHED)
    return product


def vjps(value: Tensor, ends: list[Any], cotangents: Tensor, create_graph: bool) -> Products:
    r"""Products :math:`u_k^\top \partial \text{value} / \partial \text{end}`, or None, by end."""
    # Where a function stands between whose derivatives are not proved, the products are taken one
    # by one, and can be differentiated once.
    refuse_detached(value)
    if len(cotangents) == 1 and not create_graph:
        return vjps_one_by_one(value, ends, cotangents, create_graph)
    unproven = unproven_nodes(value, ends)
    if not unproven:
        return vjps_together(value, ends, cotangents, create_graph)
    products = vjps_one_by_one(value, ends, cotangents, create_graph)
    return first_derivative_only(products, ends, unproven) if create_graph else products


def vjps_one_by_one(
    value: Tensor, ends: list[Any], cotangents: Tensor, create_graph: bool
) -> Products:
    """As :func:`vjps`, one product at a time, of any functions."""
    cotangents = cotangents.to(value.dtype)
    products = [
        torch.autograd.grad(
            value, ends, one, create_graph=create_graph, retain_graph=True, allow_unused=True
        )
        for one in (cotangents if len(cotangents) > 1 else [cotangents[0]])
    ]
    return [None if parts[0] is None else _stacked(parts) for parts in zip(*products, strict=True)]


def _stacked(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(parts) if len(parts) > 1 else parts[0].unsqueeze(0)


def vjps_together(
    value: Tensor, ends: list[Any], cotangents: Tensor, create_graph: bool
) -> Products:
    """As :func:`vjps`, of functions whose batching rules are right."""
    if len(cotangents) == 1:
        return vjps_one_by_one(value, ends, cotangents, create_graph)
    cotangents = cotangents.to(value.dtype)
    reached: list[bool] = []

    def products_that_exist(cotangent: Tensor) -> list[Tensor]:
        products = torch.autograd.grad(
            value, ends, cotangent, create_graph=create_graph, retain_graph=True, allow_unused=True
        )
        reached[:] = [part is not None for part in products]
        return [part for part in products if part is not None]

    try:
        # The functional transform: autograd's own batching (is_grads_batched) confuses axes in
        # group normalisation when the result is to be differentiated again.
        parts = iter(torch.func.vmap(products_that_exist)(cotangents))
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        # A function that has no batching rule.
        return vjps_one_by_one(value, ends, cotangents, create_graph)
    return [next(parts) if there else None for there in reached]


def first_derivative_only(
    products: Products, ends: list[Any], unproven: frozenset[str]
) -> Products:
    """Products through unproven nodes, which can be differentiated once and raise at twice."""
    # Nothing proves that torch's derivatives of these functions are right beyond the second, and
    # for some there is no second one. A trial shows that here, where it can be named.
    names = ", ".join(sorted(unproven))
    # The derivative of such a node is that of a derivative which the network takes itself.
    if any("BackwardBackward" in name or name in WRONG_TWICE for name in unproven):
        raise UnsupportedLayerError(
            f"The map uses functions ({names}) whose further derivatives torch does not give, or "
            "gives wrongly. Replace those functions, or evaluate without gradients."
        )
    if any(name.endswith(ONCE) for name in unproven):
        # Torch would take its result for a constant, in silence.
        raise UnsupportedLayerError(_NO_SECOND.format(names, "A derivative is off the graph."))
    parts = [part for part in products if part is not None and part.requires_grad]
    points = [end for end in ends if isinstance(end, Tensor) and end.requires_grad]
    if parts and points:
        _try_to_differentiate(parts, points, names)
    return [
        None if part is None else _Once.apply(part, names)  # type: ignore[no-untyped-call]
        for part in products
    ]


def is_broken(product: Tensor) -> bool:
    """Whether part of a product has no derivative, which torch may drop in silence."""
    return not _BROKEN.isdisjoint(node.name() for node in nodes_of(product))


def _try_to_differentiate(parts: list[Tensor], ends: list[Tensor], names: str) -> None:
    try:
        gradients = torch.autograd.grad(
            parts,
            ends,
            [torch.ones_like(part) for part in parts],
            retain_graph=True,
            allow_unused=True,
        )
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UnsupportedLayerError(_NO_SECOND.format(names, error)) from error
    if not all(
        bool(torch.isfinite(gradient).all())
        for gradient in gradients
        if gradient is not None and is_readable(gradient)
    ):
        raise UnsupportedLayerError(
            f"A layer of the map ({names}) has a second derivative in torch that is not finite "
            "here. Replace the layer, write it with other functions, or evaluate without "
            "gradients."
        )


class _Once(torch.autograd.Function):
    """The identity; a derivative of its derivative raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, names: str) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.names = inputs[1]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            # A factor of one ties the derivative to the product.
            (x,) = ctx.saved_tensors
            return cotangent * _Never.apply(x, ctx.names), None  # type: ignore[no-untyped-call]
        return cotangent, None


class _Never(torch.autograd.Function):
    """Ones, whose derivative raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, names: str) -> Tensor:
        return torch.ones_like(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.names = inputs[1]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        raise UnsupportedLayerError(
            f"A second derivative of a Jacobian product was asked for through {ctx.names}, whose "
            "third derivatives in torch are not known to be right. Replace the layer by one that "
            "is written with elementary functions, or take first derivatives only."
        )

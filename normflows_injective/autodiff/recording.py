r"""One pass of a map, recorded so that products with its Jacobian can be differentiated.

The surrogate needs :math:`\langle v, f'(x) u \rangle` with a graph, for constant :math:`u`. For
all layers but the first the cheapest way is the product :math:`v^\top f'`. At a first layer
:math:`h = W x + b` it is the product :math:`W u` instead,

.. math:: \langle v, f'(x) u \rangle = \langle (\partial z / \partial h)^\top v, W u \rangle,

because the graph then ends at :math:`h`: no product takes a cotangent to the data, neither here
nor in the backward pass of the loss, which would throw it away. That saves two of six products
with :math:`W`. Where the data reach other layers too (a skip connection), the product with the
data is added, which is the chain rule for several first layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .activations import silu
from .convolutions import CONVOLUTIONS, convolve
from .normalisation import group_norm, layer_norm
from .tangents import AFFINE, DIFFERENTIATING, affine_arguments, is_in_place, is_plain
from .transforms import Function, Interception, open_transforms, saving_hooks
from .vjps import attached, vjps
from .written_out import WRITTEN_OUT

Map = Callable[[Tensor], Tensor]
Jvp = Callable[[Tensor], Tensor]

# Linear maps without parameters, which often stand before the first layer.
_RESHAPING: frozenset[Function] = frozenset(
    {
        Tensor.clone,
        Tensor.contiguous,
        Tensor.flatten,
        Tensor.reshape,
        Tensor.unflatten,
        Tensor.view,
        torch.clone,
        torch.flatten,
        torch.reshape,
        torch.unflatten,
    }
)

# Functions with replacements that are cheap to differentiate twice.
_TWICE: dict[Function, Function] = {
    F.silu: lambda x, inplace=False: silu(x),
    F.group_norm: group_norm,
    F.layer_norm: layer_norm,
}


class _FirstLayer(NamedTuple):
    """Where the graph of the value begins, and the product with the map from the data to there."""

    edge: GradientEdge
    jvp: Jvp


class Recorded(NamedTuple):
    """Value (B, *) of a map on a graph that reaches the point (B, *) or the first layers."""

    value: Tensor
    point: Tensor
    first_layers: tuple[_FirstLayer, ...] = ()

    def vjp(self, cotangents: Tensor, create_graph: bool) -> Tensor:
        r"""Vector-Jacobian products :math:`u_k^\top f'(x)`, (K, B, *)."""
        return attached(vjps(self.value, [self.point], cotangents, create_graph)[0])

    def contract(self, cotangents: Tensor, tangents: Tensor) -> Tensor:
        r"""Inner products :math:`\langle v_k, f'(x) u_k \rangle`, (K, B), for constant u."""
        ends = [*(layer.edge for layer in self.first_layers), self.point]
        jvps = [*(layer.jvp for layer in self.first_layers), None]
        products = [
            inner(product, tangents if jvp is None else _over_probes(jvp, tangents))
            for product, jvp in zip(
                vjps(self.value, ends, cotangents, create_graph=True), jvps, strict=True
            )
            if product is not None
        ]
        attached(products[0] if products else None)
        return torch.stack(products).sum(0) if len(products) > 1 else products[0]


def record(function: Map, point: Tensor, by_cotangent: bool = False) -> Recorded:
    """Evaluate a map so that products with its Jacobian at a point can be taken."""
    # By cotangent: if a product will be differentiated by its cotangent, along many directions.
    with _Recording(by_cotangent):
        # A copy goes in, because some layers of normflows shift their input in place.
        return Recorded(function(point.clone()), point)


def record_first_layers(function: Map, point: Tensor) -> Recorded:
    """As :func:`record`, for points without gradients: the graph ends at first affine layers."""
    copy = point.clone()
    try:
        with _RecordingFirstLayers(copy) as recording:
            value = function(copy)
    except _PointNeeded:
        return record(function, point)
    return Recorded(value, point, tuple(recording.first_layers))


def point_at(x: Tensor) -> Tensor:
    """A tensor that requires gradients, without marking the caller's: a view of its storage."""
    return x if x.requires_grad else x.detach().requires_grad_()


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products (K, B) of tensors (K, B, *), at least in float32."""
    product = a * b
    if product.dim() == 2:
        return product
    dtype = torch.promote_types(product.dtype, torch.float32)
    return product.sum(tuple(range(2, product.dim())), dtype=dtype)


def _over_probes(jvp: Jvp, tangents: Tensor) -> Tensor:
    if len(tangents) == 1:
        return jvp(tangents[0]).unsqueeze(0)
    products: Tensor = torch.func.vmap(jvp)(tangents)
    return products


class _PointNeeded(Exception):
    """The map takes gradients itself, for which its graph must reach the data."""


class _Recording(Interception):
    """Use activations and normalisations whose second derivatives are cheap."""

    # In a functional transform they have no rules, so that there functions stand in that are
    # written out. Nothing is replaced in checkpoints, which are computed a second time outside.

    def __init__(self, by_cotangent: bool = False) -> None:
        super().__init__()
        self._by_cotangent = by_cotangent
        self._transforms, self._hooks = open_transforms(), saving_hooks()

    def _intercept(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if saving_hooks() is not self._hooks:
            return func(*args, **kwargs)
        convolves = self._by_cotangent and func in CONVOLUTIONS and len(args) >= 2
        if convolves and is_plain(args[0]) and not open_transforms():
            x, weight, bias, rest, kwargs = affine_arguments(args, kwargs)
            return convolve(func, x, weight, bias, *rest, **kwargs)
        plain = func in _TWICE and is_plain(args[0]) and not is_in_place(kwargs)
        if plain and not open_transforms():
            return _TWICE[func](*args, **kwargs)
        return WRITTEN_OUT.get(func, func)(*args, **kwargs)

    def _is_outermost(self) -> bool:
        return open_transforms() == self._transforms and saving_hooks() is self._hooks


class _RecordingFirstLayers(_Recording):
    def __init__(self, point: Tensor) -> None:
        super().__init__()
        self.first_layers: list[_FirstLayer] = []
        # By identity, with the tensor held so that its identity is not taken over, and the
        # version at which its product was right.
        self._images: dict[int, tuple[Tensor, int, Jvp]] = {}
        self._batch = len(point)
        self._remember(point, lambda tangent: tangent)

    def _intercept(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in DIFFERENTIATING and self.first_layers and self._is_outermost():
            raise _PointNeeded
        jvp = self._jvp_to(args[0]) if args else None
        if jvp is None:
            return super()._intercept(func, args, kwargs)
        if func in _RESHAPING and not any(isinstance(arg, torch.dtype) for arg in args):
            image = func(*args, **kwargs)
            # A tangent need not lie in memory as the data do, which a view asks for.
            again = Tensor.reshape if func is Tensor.view else func
            self._remember(image, lambda tangent: again(jvp(tangent), *args[1:], **kwargs))
            return image
        if func in AFFINE and len(args) >= 2 and self._can_begin(args[0], args[1]):
            return self._first_layer(func, jvp, args, kwargs)
        return super()._intercept(func, args, kwargs)

    def _can_begin(self, x: Tensor, weight: Tensor) -> bool:
        # Its products are summed per sample, so the first axis must still be that of the batch.
        keeps_batch = len(x) == self._batch and x.dim() >= weight.dim()
        recorded = weight.requires_grad and torch.is_grad_enabled()
        return keeps_batch and recorded and self._is_outermost()

    def _first_layer(
        self, func: Function, jvp: Jvp, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        x, weight, bias, rest, kwargs = affine_arguments(args, kwargs)
        value: Tensor = func(x.detach(), weight, bias, *rest, **kwargs)
        dtype = value.dtype
        self.first_layers.append(
            _FirstLayer(
                # The edge rather than the tensor, which an activation may overwrite.
                get_gradient_edge(value),
                # Autocast knows no vmap, and may have ended with the layer.
                lambda tangent: func(
                    jvp(tangent).to(dtype), weight.to(dtype), None, *rest, **kwargs
                ),
            )
        )
        return value

    def _remember(self, image: Tensor, jvp: Jvp) -> None:
        self._images[id(image)] = (image, image._version, jvp)

    def _jvp_to(self, value: Any) -> Jvp | None:
        image, version, jvp = self._images.get(id(value), (None, 0, None))
        return jvp if image is not None and image._version == version else None

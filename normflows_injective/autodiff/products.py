r"""Jacobian products and gradients of whole batches.

The layers of normflows do not survive a per-sample ``vmap`` (boolean masks, in-place
accumulation), but all of them survive a Jacobian-vector product of the whole batch, and a ``vmap``
over *tangents* at a shared primal. Everything here is built on that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ..errors import ShapeError, UnsupportedLayerError
from ..modules.contents import holds_script
from .proven import unproven_nodes
from .recording import Map, Recorded, point_at, record
from .settings import FORWARD_MODE, differentiable_attention, uncompiled
from .tangents import SkipZeroProducts, TangentsWithoutGraph
from .transforms import refuse_tangents
from .vjps import attached, first_derivative_only, is_broken, refuse_detached, vjps_one_by_one

_RANDOM = (
    "The map gives another value at every call, so every tangent would belong to another network. "
    "Call .eval() on its dropout, or remove it."
)


class NoProductError(UnsupportedLayerError):
    """A map has no Jacobian-vector products, but may have the other ones."""


def vjp(output: Tensor, point: Tensor, cotangents: Tensor, create_graph: bool) -> Tensor:
    r"""Products :math:`u_k^\top J`, (K, B, *), of a map whose output's graph reaches the point."""
    return Recorded(output, point).vjp(cotangents, create_graph)


def jvp(function: Map, point: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    r"""Value (B, *) on the caller's graph, and products :math:`J v_k`, (K, B, *), on no graph."""
    # Several tangents go through torch.func.jvp with a vmap over them, so that the value is
    # computed once; layers that write into buffers or use an autograd.Function without a forward
    # rule (the Residual of normflows) make it fail loudly, and then raw dual numbers serve. A
    # single tangent tries the dual numbers first, which are faster. Two reverse passes come last,
    # and wherever the map calls a function whose tangent is not proved right.
    attempts = [_jvp_functional, _jvp_dual] if len(tangents) > 1 else [_jvp_dual, _jvp_functional]
    for attempt in [] if holds_script(function) else attempts:
        try:
            covered = _within(TangentsWithoutGraph(), function)
            with FORWARD_MODE:
                value, products = attempt(covered, point, tangents)
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, ShapeError):  # the latter if a layer has explained the former
            continue
        return value, products.detach()
    return jvp_by_reverse(function, point, tangents)


def _within(mode: SkipZeroProducts, function: Map) -> Map:
    def covered(point: Tensor) -> Tensor:
        with mode:
            # A copy goes in, because some layers shift their input in place.
            return function(point.clone())

    return covered


def _jvp_functional(function: Map, point: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    def product(tangent: Tensor) -> tuple[Tensor, Tensor]:
        value, out = torch.func.jvp(function, (point,), (tangent,), strict=True)[:2]
        return value, out

    if len(tangents) == 1:
        value, out = product(tangents[0])
        return value, out.unsqueeze(0)
    # The primal does not depend on the mapped tangent, so it is computed once.
    value, products = torch.func.vmap(product, out_dims=(None, 0))(tangents)  # type: ignore[arg-type]
    return value, products


def _jvp_dual(function: Map, point: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    values: list[Tensor] = []
    products: list[Tensor] = []
    for tangent in tangents:
        with uncompiled(), forward_ad.dual_level():
            out = function(forward_ad.make_dual(point, tangent.contiguous()))
            value, product = forward_ad.unpack_dual(out)
        if product is None:
            raise RuntimeError("Forward mode gave no tangent.")
        if values and not torch.equal(value, values[0]):
            raise UnsupportedLayerError(_RANDOM)
        values.append(value)
        products.append(product)
    return values[0], torch.stack(products)


def jvp_by_reverse(function: Map, point: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    r"""As :func:`jvp`, by two reverse passes, :math:`J v = \partial_u (u^\top J) v`."""
    recording = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        leaf = point_at(out_of_inference(point))
        value = record(function, leaf, by_cotangent=True).value
        refuse_detached(value)
        # Any number but zero, of which torch's derivative of logcumsumexp takes the logarithm.
        dummy = torch.ones_like(value.detach(), requires_grad=True)
        try:
            (product,) = torch.autograd.grad(
                value, leaf, dummy, create_graph=True, allow_unused=True
            )
            product = attached(product)
            (products,) = vjps_one_by_one(product, [dummy], tangents, create_graph=False)
            if products is None or is_broken(product):
                raise RuntimeError("The product is cut off the graph, as by once_differentiable.")
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise NoProductError(
                "A layer of the decoding map has neither a forward-mode derivative nor a second "
                "reverse-mode one, so its Jacobian cannot be applied to a vector. Replace the "
                f"layer, or give its autograd.Function a jvp. torch says: {error}"
            ) from error
    return value if recording else value.detach(), products.detach()


def value_and_gradient(
    function: Callable[[Tensor], Tensor], point: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Values :math:`f(x_b)`, (B,), and gradients :math:`\nabla f(x_b)` of a batch (B, *)."""
    # Both are on the caller's graph, so that they can be differentiated again, by the point and by
    # tensors that the function holds, which must not be of inference mode; without gradients they
    # are plain values. Where a function is not proven, its gradients can be differentiated once.
    recording = torch.is_grad_enabled()
    point = out_of_inference(point)
    names: list[frozenset[str]] = []

    def noting(x: Tensor) -> Tensor:
        value = record(function, x).value
        names.append(unproven_nodes(value, [x]))
        return value

    # Fused kernels of attention have no second derivatives.
    with torch.inference_mode(False), differentiable_attention():
        value, vjp_of_value = torch.func.vjp(noting, point)[:2]
        (gradient,) = vjp_of_value(torch.ones_like(value))
        if names[0] and recording:
            (once,) = first_derivative_only([gradient], [point], names[0])
            gradient = gradient if once is None else once
    if names[0]:
        refuse_tangents("The gradient of a layer", value, gradient)
    if not recording:
        # The inner derivative has recorded the parameters of the function. A copy is on no graph;
        # detaching would also drop the tangents of forward mode.
        value, gradient = value.clone(), gradient.clone()
    return value, gradient


def out_of_inference(tensor: Tensor) -> Tensor:
    """A tensor as it is or, if it was made in inference mode, a copy that autograd can save."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def event_rows(batches: Tensor) -> Tensor:
    """Tensors (K, B, *) as rows (K, B, n), also of batches (B,) of numbers."""
    return batches.unsqueeze(2) if batches.dim() == 2 else batches.flatten(2)

r"""Jacobian products of whole batches, in reverse and in forward mode.

The host's layers do not survive a per-sample ``vmap`` (boolean masks, in-place accumulation), but
all of them survive a Jacobian-vector product of the whole batch, and a ``vmap`` over *tangents* at
a shared primal. Everything here is built on that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ..errors import NotInjectiveError, ShapeError, UnsupportedLayerError
from ..modules.behind import holds_script
from .gradients import out_of_inference
from .pulling import DETACHED, is_broken, pull_each
from .recording import Recorded, point_at, record
from .settings import FORWARD_MODE, uncompiled
from .tangents import SkipZeroProducts, TangentsWithoutGraph

__all__ = ["Map", "NoProductError", "event_rows", "jvp", "jvp_by_reverse", "vjp"]

Map = Callable[[Tensor], Tensor]

_RANDOM = (
    "The map gives another value at every call, so every tangent would belong to another network. "
    "Call .eval() on its dropout, or remove it."
)


class NoProductError(UnsupportedLayerError):
    """A map has no Jacobian-vector products, but may have the other ones."""


def vjp(output: Tensor, point: Tensor, cotangents: Tensor, create_graph: bool) -> Tensor:
    r"""Vector-Jacobian products :math:`u_k^\top J` of a map that has already been evaluated.

    Args:
        output: :math:`f(x)` of shape :math:`(B, *)`, recorded on a graph that reaches ``point``.
        point: :math:`x` of shape :math:`(B, *)`.
        cotangents: :math:`u` of shape :math:`(K, B, *)`.
        create_graph: Whether the products can be differentiated again.

    Returns:
        Products of shape :math:`(K, B, *)`.

    Raises:
        NotInjectiveError: If the output does not depend on the point.

    Examples:
        >>> x = torch.ones(1, 2, requires_grad=True)
        >>> vjp(x**2, x, torch.eye(2).view(2, 1, 2), create_graph=False).squeeze()
        tensor([[2., 0.],
                [0., 2.]])
    """
    return Recorded(output, point).pull(cotangents, create_graph)


def jvp(function: Map, point: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    r"""Value and Jacobian-vector products :math:`J v_k` of a map, in one pass where possible.

    The products are on no graph. Several tangents go through ``torch.func.jvp`` with a ``vmap``
    over them, so that the value is computed once; layers that write into buffers or use an
    ``autograd.Function`` without a forward rule (the host's ``Residual``) make it fail loudly, and
    then raw dual numbers serve. A single tangent tries the dual numbers first, which are faster.
    Last, and wherever the map calls a function whose tangent is not proved right, come two reverse
    passes, :math:`\partial_u (u^\top J) v = J v`.

    Args:
        function: Map of a batch :math:`(B, *)` to a batch.
        point: Where to evaluate, shape :math:`(B, *)`.
        tangents: :math:`v` of shape :math:`(K, B, *)`.

    Returns:
        The value :math:`(B, *)`, on the caller's graph, and the products :math:`(K, B, *)`.

    Raises:
        NotInjectiveError: If the value does not depend on the point.
        UnsupportedLayerError: If no method serves.

    Examples:
        >>> x, jv = jvp(lambda z: z**2, torch.ones(1, 2), torch.ones(1, 1, 2))
        >>> x, jv[0]
        (tensor([[1., 1.]]), tensor([[2., 2.]]))
    """
    several = len(tangents) > 1
    scripted = holds_script(function)
    for attempt in (_jvp_functional, _jvp_dual) if several else (_jvp_dual, _jvp_functional):
        if scripted:
            break
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
    if len(tangents) == 1:
        value, tangent = torch.func.jvp(function, (point,), (tangents[0],), strict=True)[:2]
        return value, tangent.unsqueeze(0)

    def product(tangent: Tensor) -> tuple[Tensor, Tensor]:
        value, out = torch.func.jvp(function, (point,), (tangent,), strict=True)[:2]
        return value, out

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
    r"""As :func:`jvp`, by two reverse passes, :math:`\partial_u (u^\top J) v = J v`.

    Raises:
        NoProductError: If the map has no second derivatives.
    """
    recording = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        leaf = point_at(out_of_inference(point))
        value = record(function, leaf, by_cotangent=True).value
        if not value.requires_grad:
            raise NotInjectiveError(DETACHED)
        # Any number but zero, of which torch's derivative of logcumsumexp takes the logarithm.
        dummy = torch.ones_like(value.detach(), requires_grad=True)
        try:
            (pulled,) = torch.autograd.grad(
                value, leaf, dummy, create_graph=True, allow_unused=True
            )
            if pulled is None:
                raise NotInjectiveError(DETACHED)
            (products,) = pull_each(pulled, [dummy], tangents, create_graph=False)
            if products is None or is_broken(pulled):
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


def event_rows(batches: Tensor) -> Tensor:
    """Tensors (K, B, *) as rows (K, B, n), also of batches (B,) of numbers.

    Examples:
        >>> event_rows(torch.zeros(4, 5)).shape
        torch.Size([4, 5, 1])
    """
    return batches.unsqueeze(2) if batches.dim() == 2 else batches.flatten(2)

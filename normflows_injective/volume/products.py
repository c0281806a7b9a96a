r"""Jacobian products of whole batches: forward mode, reverse mode, and dense Jacobians.

The host's layers do not survive a per-sample ``vmap`` (boolean masks, in-place accumulation), but
all of them survive a Jacobian-vector product of the whole batch, and a ``vmap`` over *tangents* at
a shared primal. Everything here is built on that.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import NotInjectiveError, OptionError, UnsupportedLayerError
from .modules import modules_of, refuse_unsupported, warm_up

__all__ = ["Map", "ValueAndJacobian", "basis_of", "jacobian", "jacobian_by_rows", "jvp", "vjp"]

Map = Callable[[Tensor], Tensor]

_RANDOM = (
    "The map gives another value at every call, so every tangent would belong to another network. "
    "Call .eval() on its dropout, or remove it."
)
_DETACHED = (
    "The output of a map does not depend on its input, or the dependence was cut inside it, so it "
    "has no Jacobian. Remove detach(), no_grad() and .data from the network."
)


class ValueAndJacobian(NamedTuple):
    """Value of a map at a batch, and its Jacobians as matrices of shape (B, D, d)."""

    value: Tensor
    jacobian: Tensor


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
    if not output.requires_grad:
        raise NotInjectiveError(_DETACHED)

    def product(cotangent: Tensor, batched: bool = False) -> Tensor:
        (pulled,) = torch.autograd.grad(
            output,
            point,
            cotangent,
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
        if pulled is None:
            raise NotInjectiveError(_DETACHED)
        return pulled

    if not create_graph and len(cotangents) > 1:
        with suppress(RuntimeError):
            return product(cotangents, batched=True)
    # One at a time, because torch's batching of *differentiable* reverse passes confuses axes in
    # group normalisation: it raises for most shapes and is silently wrong for some.
    return torch.stack([product(cotangent) for cotangent in cotangents])


def jvp(function: Map, point: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    r"""Value and Jacobian-vector products :math:`J v_k` of a map, in one pass where possible.

    ``torch.func.jvp`` is tried first. Layers that write into buffers or use an
    ``autograd.Function`` without a forward rule (the host's ``Residual``) make it fail loudly;
    then raw dual numbers, and last two reverse passes, :math:`\partial_u (u^\top J) v = J v`.

    Args:
        function: Map of a batch :math:`(B, *)` to a batch.
        point: Where to evaluate, shape :math:`(B, *)`.
        tangents: :math:`v` of shape :math:`(K, B, *)`.

    Returns:
        The value :math:`(B, *)`, on the caller's graph, and the products :math:`(K, B, *)`, on it
        only if gradients are enabled and the first method served.

    Raises:
        NotInjectiveError: If the value does not depend on the point.

    Examples:
        >>> x, jv = jvp(lambda z: z**2, torch.ones(1, 2), torch.ones(1, 1, 2))
        >>> x, jv[0]
        (tensor([[1., 1.]]), tensor([[2., 2.]]))
    """
    attempts = (_jvp_functional, _jvp_dual, _jvp_double_reverse)
    for attempt in attempts[:-1]:
        try:
            return attempt(function, point, tangents)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:
            continue
    return attempts[-1](function, point, tangents)


def jacobian(function: Map, point: Tensor, chunk_size: int | None = None) -> ValueAndJacobian:
    r"""Value and dense Jacobians of a map, by products with the basis vectors.

    With gradients disabled this takes :math:`d` forward-mode products. With gradients enabled the
    result stays on the graph; there forward mode is right for most layers, but backward through
    the *tangent* of layer and instance normalisation is silently wrong in torch (pytorch#196700)
    and missing for GLU, so when one of those is met the rows are taken by :math:`D` reverse-mode
    products instead.

    Args:
        function: Map of a batch :math:`(B, *)` with :math:`d` elements per sample to one with
            :math:`D` elements.
        point: Where to evaluate, shape :math:`(B, *)`.
        chunk_size: Number of basis vectors per pass, which bounds the memory; None takes all.

    Returns:
        :class:`ValueAndJacobian` with matrices of shape :math:`(B, D, d)`.

    Raises:
        UnsupportedLayerError: If a layer behind the map has no per-sample Jacobian.
        NotInjectiveError: If the value does not depend on the point.
        OptionError: If ``chunk_size`` is less than 1.

    Examples:
        >>> jacobian(lambda z: torch.cat([z, z**2], 1), torch.full((1, 1), 3.0)).jacobian
        tensor([[[1.],
                 [6.]]])
    """
    refuse_unsupported(modules_of(function))
    warm_up(function, point)
    if not torch.is_grad_enabled():
        return _jacobian_by_columns(jvp, function, point, chunk_size)
    try:
        with _RefuseTangentWithoutGradient():
            return _jacobian_by_columns(_jvp_functional, function, point, chunk_size)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        # The other forward modes lose the graph or cannot be differentiated.
        return jacobian_by_rows(function, point, create_graph=True)


def jacobian_by_rows(function: Map, point: Tensor, create_graph: bool) -> ValueAndJacobian:
    """Value and dense Jacobians (B, D, d) of a map by D reverse-mode products.

    Args:
        function: Map of a batch (B, *) with d elements per sample to one with D elements.
        point: Where to evaluate, shape (B, *).
        create_graph: Whether the Jacobians can be differentiated.

    Returns:
        :class:`ValueAndJacobian`; gradients must be enabled, and reach the point if it has some.

    Raises:
        NotInjectiveError: If the value does not depend on the point.

    Examples:
        >>> jacobian_by_rows(lambda z: z**2, torch.full((1, 1), 3.0), create_graph=False).jacobian
        tensor([[[6.]]])
    """
    leaf = point if point.requires_grad else point.detach().requires_grad_()
    value = function(leaf.clone())
    rows = vjp(value, leaf, basis_of(value), create_graph=create_graph)
    return ValueAndJacobian(value, rows.flatten(2).transpose(0, 1))


def basis_of(batch: Tensor) -> Tensor:
    """The standard basis of the event space of a batch (B, *), repeated over it: (d, B, *).

    Args:
        batch: Gives event shape, batch size, dtype and device.

    Returns:
        Tangents or cotangents, one basis vector for all samples in each of the d slices.

    Examples:
        >>> basis_of(torch.zeros(5, 2, 3)).shape
        torch.Size([6, 5, 2, 3])
    """
    dimension = batch[0].numel()
    basis = torch.eye(dimension, dtype=batch.dtype, device=batch.device)
    return basis.view(dimension, 1, *batch.shape[1:]).expand(dimension, *batch.shape)


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
        with forward_ad.dual_level():
            out = function(forward_ad.make_dual(point, tangent.contiguous()))
            value, product = forward_ad.unpack_dual(out)
        if product is None:
            raise RuntimeError("Forward mode gave no tangent.")
        if values and not torch.equal(value, values[0]):
            raise UnsupportedLayerError(_RANDOM)
        values.append(value)
        products.append(product)
    return values[0], torch.stack(products)


def _jvp_double_reverse(function: Map, point: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = point if point.requires_grad else point.detach().requires_grad_()
        value = function(leaf.clone())
        dummy = torch.zeros_like(value, requires_grad=True)
        pulled = vjp(value, leaf, dummy.unsqueeze(0), create_graph=True)[0]
        products = [
            torch.autograd.grad(pulled, dummy, tangent, retain_graph=True)[0]
            for tangent in tangents
        ]
    return value, torch.stack(products)


def _jacobian_by_columns(
    product: Callable[[Map, Tensor, Tensor], tuple[Tensor, Tensor]],
    function: Map,
    point: Tensor,
    chunk_size: int | None,
) -> ValueAndJacobian:
    if chunk_size is not None and chunk_size < 1:
        raise OptionError(f"chunk_size must be at least 1 or None, got {chunk_size}.")
    basis = basis_of(point)
    columns = []
    for tangents in basis.split(chunk_size or len(basis)):
        value, products = product(function, point, tangents)
        columns.append(products.flatten(2))
    return ValueAndJacobian(value, torch.cat(columns).permute(1, 2, 0))


class _TangentWithoutGradient(RuntimeError):
    """A layer was met whose tangent cannot be differentiated again."""


class _RefuseTangentWithoutGradient(TorchFunctionMode):
    _FAULTY = frozenset(
        {
            F.layer_norm,
            torch.layer_norm,
            F.instance_norm,
            torch.instance_norm,
            F.glu,
            torch._C._nn.glu,
        }
    )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in self._FAULTY:
            raise _TangentWithoutGradient
        return func(*args, **(kwargs or {}))

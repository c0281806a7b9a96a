"""Dense Jacobians of whole batches, by products with basis vectors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import checks_tensors
from ..errors import OptionError
from .first_data import warm_up
from .modules import modules_of, refuse_unsupported
from .products import Map, jvp, vjp
from .recording import point_at
from .settings import as_written, differentiable_attention
from .transforms import Function, Interception

__all__ = ["ValueAndJacobian", "basis_of", "jacobian", "jacobian_by_rows"]

_TANGENT_BYTES = 2**28
# Elements per sample of the widest layer, until the first chunk has shown what it is.
_ASSUMED_WIDTH = 2**14


class ValueAndJacobian(NamedTuple):
    """Value of a map at a batch, and its Jacobians as matrices of shape (B, D, d)."""

    value: Tensor
    jacobian: Tensor


@as_written
@checks_tensors
def jacobian(function: Map, point: Tensor, chunk_size: int | None = None) -> ValueAndJacobian:
    r"""Value and dense Jacobians of a map, by products with the basis vectors.

    With gradients disabled this takes :math:`d` forward-mode products. With gradients enabled the
    result stays on the graph; there forward mode is right for most layers, but backward through
    the *tangent* of layer and instance normalisation is silently wrong in torch (pytorch#196700)
    and missing for GLU, so when one of those is met the rows are taken by :math:`D` reverse-mode
    products instead.

    Without gradients the memory is bounded: the basis is taken in chunks whose widest tangent
    keeps to 256 MiB, at the cost of one more evaluation of the map for every chunk.

    Args:
        function: Map of a batch :math:`(B, *)` with :math:`d` elements per sample to one with
            :math:`D` elements.
        point: Where to evaluate, shape :math:`(B, *)`.
        chunk_size: Number of basis vectors per pass; None takes as many as the bound allows, or
            all with gradients enabled, where the graph keeps every tangent anyhow.

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
    if chunk_size is not None and chunk_size < 1:
        raise OptionError(f"chunk_size must be at least 1 or None, got {chunk_size}.")
    refuse_unsupported(modules_of(function))
    warm_up(function, point)
    with differentiable_attention():
        if not torch.is_grad_enabled():
            return _jacobian_by_columns(jvp, function, point, chunk_size)
        try:
            with _RefuseTangentWithoutGradient():
                products = partial(jvp, create_graph=True)
                all_at_once = point[0].numel()
                return _jacobian_by_columns(products, function, point, chunk_size or all_at_once)
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
    leaf = point_at(point)
    with differentiable_attention():
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


def _jacobian_by_columns(
    product: Callable[[Map, Tensor, Tensor], tuple[Tensor, Tensor]],
    function: Map,
    point: Tensor,
    chunk_size: int | None,
) -> ValueAndJacobian:
    basis = basis_of(point)
    columns: list[Tensor] = []
    measured = _WidestResult()
    size = chunk_size or _chunk_within_bound(_ASSUMED_WIDTH * point.element_size() * len(point))
    while len(basis) > 0:
        with measured:
            value, products = product(function, point, basis[:size])
        columns.append(products.flatten(2))
        basis = basis[size:]
        size = chunk_size or _chunk_within_bound(measured.num_bytes)
    return ValueAndJacobian(value, torch.cat(columns).permute(1, 2, 0))


def _chunk_within_bound(num_bytes: int) -> int:
    # A layer needs the tangents of its input and of its output at once.
    return max(1, _TANGENT_BYTES // (2 * max(1, num_bytes)))


class _WidestResult(Interception):
    """Notes the size of the largest tensor that a map computes, over one tangent."""

    num_bytes = 0

    def _intercept(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self.num_bytes = max(self.num_bytes, result.numel() * result.element_size())
        return result


class _TangentWithoutGradient(RuntimeError):
    """A layer was met whose tangent cannot be differentiated again."""


class _RefuseTangentWithoutGradient(Interception):
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

    def _intercept(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in self._FAULTY:
            raise _TangentWithoutGradient
        return func(*args, **kwargs)

"""Dense Jacobians of whole batches and their traces, by products with basis vectors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_rows, checks_arguments
from ..errors import OptionError, ShapeError
from ..host.first_meeting import give_first_data
from ..host.refusals import refuse_unsupported
from ..modules.contents import modules_of
from .products import NoProductError, event_rows, jvp, jvp_by_reverse, out_of_inference, vjp
from .recording import Map, point_at
from .reverse import Reverse, reverse
from .settings import as_written, differentiable_attention
from .transforms import Function, Interception, refuse_tangents

_TANGENT_BYTES = 2**28
# Bytes per sample of the widest layer, until one sample or the first chunk has measured it.
_ASSUMED_BYTES = 2**16
# Numbers of all tangents at one time in a trace, which has no graph.
_TANGENT_NUMBERS = 2**22


class ValueAndJacobian(NamedTuple):
    """Value of a map at a batch, and its Jacobians as matrices of shape (B, D, d)."""

    value: Tensor
    jacobian: Tensor


class TooLarge(Exception):
    """Too many Jacobians for the memory: how many samples fit, and the value of the batch."""

    def __init__(self, num_rows: int, value: Tensor) -> None:
        super().__init__(num_rows)
        self.num_rows = num_rows
        self.value = value


@as_written
@checks_arguments
def jacobian(function: Map, point: Tensor, chunk_size: int | None = None) -> ValueAndJacobian:
    r"""Value and dense Jacobians of a map, by products with the basis vectors.

    With gradients disabled this takes :math:`d` forward-mode products. With gradients enabled the
    result stays on the graph and comes from reverse mode alone, because torch gets the gradient of
    a tangent wrong for many functions. Where all derivatives of the map are proved right it is
    :math:`J v = \partial_u (u^\top J) v`, which takes as many products. Elsewhere it is :math:`D`
    rows, which can be differentiated once.

    Without gradients the memory is bounded: the basis is taken in chunks whose widest tangent
    keeps to 256 MiB, at the cost of one more evaluation of the map for every chunk.

    Args:
        function: Map of a batch :math:`(B, *)` with :math:`d` elements per sample to one with
            :math:`D` elements.
        point: Where to evaluate, shape :math:`(B, *)`.
        chunk_size: Number of basis vectors per pass without gradients; None takes as many as the
            bound allows. With gradients all are taken at once, because the graph keeps them.

    Returns:
        :class:`ValueAndJacobian` with matrices of shape :math:`(B, D, d)`.

    Raises:
        UnsupportedLayerError: If a layer of the map has no per-sample Jacobian, or none that
            can be differentiated.
        ForwardModeError: If a caller takes a forward-mode derivative.
        NotInjectiveError: If the value does not depend on the point.
        OptionError: If ``chunk_size`` is less than 1.
        ShapeError: If the map returns another number of samples.

    Examples:
        >>> jacobian(lambda z: torch.cat([z, z**2], 1), torch.full((1, 1), 3.0)).jacobian
        tensor([[[1.],
                 [6.]]])
    """
    check_rows(point, "the point of a Jacobian")
    if chunk_size is not None and chunk_size < 1:
        raise OptionError(f"chunk_size must be at least 1 or None, got {chunk_size}.")
    refuse_unsupported(modules_of(function))
    give_first_data(function, point)
    if not torch.is_grad_enabled():
        result = jacobian_without_graph(function, point, Chunks(chunk_size))
    else:
        evaluated = reverse(function, point)
        if evaluated.unproven:
            result = _rows(evaluated)
        else:
            columns = evaluated.jvp(basis_of(point))
            result = ValueAndJacobian(evaluated.value, event_rows(columns).permute(1, 2, 0))
        if evaluated.is_constant:
            result = ValueAndJacobian(*(part.detach() for part in result))
    if len(result.value) != len(point):
        raise ShapeError(
            f"The map took a batch of {len(point)} samples to {len(result.value)}: it must keep "
            "the batch."
        )
    refuse_tangents("A Jacobian", point, result.value)
    return result


def jacobian_by_rows(function: Map, point: Tensor, create_graph: bool) -> ValueAndJacobian:
    """Value and dense Jacobians (B, D, d) of a map by D reverse-mode products."""
    if create_graph:
        return _rows(reverse(function, point))
    leaf = point_at(point)
    with differentiable_attention():
        value = function(leaf.clone())
    rows = vjp(value, leaf, basis_of(value), create_graph=False)
    return ValueAndJacobian(value, event_rows(rows).transpose(0, 1))


class Size(NamedTuple):
    """Elements of one decoded sample, and bytes of the widest tensor that leads to it."""

    num_elements: int
    num_bytes: int


def size_of_a_sample(function: Map, point: Tensor) -> Size:
    """The size of the value of a map at a point (1, *)."""
    measured = _WidestResult()
    with measured, differentiable_attention():
        value = function(point)
    return Size(value.numel(), max(measured.num_bytes, value.numel() * value.element_size()))


class Chunks(NamedTuple):
    """Number of basis vectors in a pass; None for as many as the widest tensor allows.

    The bytes of that tensor are those of one sample, and 0 until they are known.
    """

    size: int | None = None
    num_bytes: int = 0


def jacobian_without_graph(
    function: Map, point: Tensor, chunks: Chunks, at_most: int | None = None
) -> ValueAndJacobian:
    """Value and dense Jacobians (B, D, d) of a map, at most so large, on no graph."""
    try:
        with differentiable_attention():
            return _jacobian_by_columns(function, point, chunks, at_most)
    except NoProductError:
        return _rows_without_graph(function, point)


def jacobian_by_reverse(function: Map, point: Tensor) -> Tensor:
    """Dense Jacobians (B, D, d) of a map, without a graph, by reverse mode alone."""
    with differentiable_attention():
        try:
            columns = jvp_by_reverse(function, point, basis_of(point))[1]
        except NoProductError:
            return _rows_without_graph(function, point).jacobian
    return event_rows(columns).permute(1, 2, 0)


def _rows_without_graph(function: Map, point: Tensor) -> ValueAndJacobian:
    """By reverse mode once, for functions that have no second derivatives."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            value, matrix = jacobian_by_rows(function, out_of_inference(point), False)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise NoProductError(
            "A layer of the map has no derivative in torch, neither in forward nor in reverse "
            f"mode, so its Jacobian does not exist. Replace the layer. torch says: {error}"
        ) from error
    return ValueAndJacobian(value.detach(), matrix.detach())


def _rows(evaluated: Reverse) -> ValueAndJacobian:
    rows = evaluated.vjp(basis_of(evaluated.value))
    return ValueAndJacobian(evaluated.value, event_rows(rows).transpose(0, 1))


def basis_of(batch: Tensor) -> Tensor:
    """The standard basis of the event space of a batch (B, *), repeated over it: (d, B, *)."""
    dimension = batch[0].numel()
    basis = torch.eye(dimension, dtype=batch.dtype, device=batch.device)
    return basis.view(dimension, 1, *batch.shape[1:]).expand(dimension, *batch.shape)


def _jacobian_by_columns(
    function: Map, point: Tensor, chunks: Chunks, at_most: int | None
) -> ValueAndJacobian:
    basis = basis_of(point)
    columns: list[Tensor] = []
    measured = _WidestResult()

    def watched(x: Tensor) -> Tensor:
        with measured:
            return function(x)

    num_bytes = chunks.num_bytes or _ASSUMED_BYTES
    size = chunks.size or _chunk_within_bound(num_bytes * len(point))
    while len(basis) > 0:
        value, products = jvp(watched, point, basis[:size])
        if at_most is not None and len(point) > 1 and value.numel() * point[0].numel() > at_most:
            raise TooLarge(max(1, at_most // (value[0].numel() * point[0].numel())), value)
        columns.append(event_rows(products))
        basis = basis[size:]
        size = chunks.size or _chunk_within_bound(measured.num_bytes)
    # A concatenation of one part copies it.
    joined = columns[0] if len(columns) == 1 else torch.cat(columns)
    return ValueAndJacobian(value, joined.permute(1, 2, 0))


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


@as_written
def trace_of_jacobian(function: Map, m: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""Value (B, d) of a map at m, and its divergence (B, 1), or with probes estimates (B, K).

    .. math:: \operatorname{tr} J = \sum_i e_i^\top J e_i = \mathbb E\, v_k^\top J v_k
    """
    # By J v without gradients, and with them by v^T J, whose derivative torch has right.
    if torch.is_grad_enabled():
        evaluated = reverse(function, m)
        value, directions = evaluated.value, basis_of(m) if probes is None else probes
        terms = (evaluated.vjp(directions) * directions).sum(2)
        trace = terms.T if probes is not None else terms.sum(0).unsqueeze(1)
        if evaluated.is_constant:
            value, trace = value.detach(), trace.detach()
    elif probes is not None:
        value, products = jvp(function, m, probes)
        trace = (products * probes).sum(2).T
    else:
        # In bounded memory.
        value, trace = m, torch.zeros_like(m[:, :1])
        for tangents in basis_of(m).split(max(1, _TANGENT_NUMBERS // m.numel())):
            value, products = jvp(function, m, tangents)
            trace = trace + (products * tangents).sum((0, 2)).unsqueeze(1)
    refuse_tangents("A divergence", m, value)
    return value, trace

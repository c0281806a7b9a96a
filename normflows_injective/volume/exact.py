"""Ways to the exact log-volume: without gradients, with them, and for forward mode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..autodiff.jacobians import (
    Chunks,
    Size,
    TooLarge,
    basis_of,
    jacobian_by_reverse,
    jacobian_without_graph,
    size_of_a_sample,
)
from ..autodiff.products import event_rows
from ..autodiff.recording import Map
from ..autodiff.reverse import Reverse, reverse
from ..autodiff.settings import differentiable_attention
from ..autodiff.transforms import in_forward_mode, open_transforms, refuse_nested, refuse_tangents
from ..errors import ContextError, OptionError, ShapeError
from ..host.first_data import awaits_first_data
from ..host.first_meeting import give_first_data
from ..host.refusals import refuse_unsupported
from ..modules.contents import modules_of
from ..modules.precision import factored_dtype
from .factoring import factor, volumes_of

_JACOBIAN_BYTES = 2**27
# The Jacobians as computed, in the dtype of the factorisation, and the two factors.
_COPIES = 4
# A batch of so many rows is worth a look at what the first one is decoded to.
_MANY_ROWS = 16


class ExactVolume(NamedTuple):
    """A decoded batch, its log-volumes, and which of its Jacobians are rank deficient."""

    x: Tensor
    log_volume: Tensor
    deficient: Tensor


def exact_volume(
    decode: Callable[..., Tensor], z: Tensor, chunk_size: int | None, context: Tensor | None
) -> ExactVolume:
    """Decode z with log-volumes, in the dtype that Jacobians are factored in."""
    if chunk_size is not None and chunk_size < 1:
        raise OptionError(f"chunk_size must be at least 1 or None, got {chunk_size}.")
    modules = modules_of(decode)
    refuse_unsupported(modules)
    whole = _with_rows(decode, context)
    if any(map(awaits_first_data, modules)):
        give_first_data(whole, z)
    if in_forward_mode():
        return _with_tangent(whole, z)
    if torch.is_grad_enabled():
        return _with_graph(whole, z)
    return _without_graph(decode, z, chunk_size, context)


def _with_rows(decode: Callable[..., Tensor], context: Tensor | None) -> Map:
    return decode if context is None else partial(decode, context=context)


def _with_graph(decode: Map, z: Tensor) -> ExactVolume:
    evaluated = reverse(decode, z)
    if evaluated.unproven:
        volume = _first_derivative_of_volume(decode, z, evaluated)
    else:
        columns = event_rows(evaluated.jvp(basis_of(z)))
        factors = factor(columns.permute(1, 2, 0))
        volume = ExactVolume(evaluated.value, factors.log_volume, factors.deficient)
    # The graph that leads to the latents alone is our own.
    return ExactVolume(*(p.detach() for p in volume)) if evaluated.is_constant else volume


def _first_derivative_of_volume(decode: Map, z: Tensor, evaluated: Reverse) -> ExactVolume:
    if open_transforms():
        matrix = event_rows(evaluated.vjp(basis_of(evaluated.value))).transpose(0, 1).detach()
    else:
        matrix = jacobian_by_reverse(decode, z.detach())
    with torch.no_grad():
        _, deficient, q, r = factors = factor(matrix, with_q=True)
        identity = torch.eye(r.shape[2], dtype=r.dtype, device=r.device).expand_as(r)
        inverse = torch.linalg.solve_triangular(r, identity, upper=True)
        transposed_pinv = (q @ inverse.mT).to(matrix.dtype)
    cotangents = transposed_pinv.permute(2, 0, 1).reshape(-1, *evaluated.value.shape)
    products = event_rows(evaluated.vjp(cotangents))
    trace = products.diagonal(dim1=0, dim2=2).sum(1)
    return ExactVolume(evaluated.value, factors.log_volume + (trace - trace.detach()), deficient)


def _with_tangent(decode: Map, z: Tensor) -> ExactVolume:
    """Values and forward-mode derivatives, those of the volume by its gradient."""
    refuse_nested("A log-volume")
    point, tangent = forward_ad.unpack_dual(z)
    refuse_tangents("A log-volume, by parameters or a context,", decode(point.clone()))
    if tangent is None:
        if torch.is_grad_enabled():
            return _with_graph(decode, z)
        return _of_rows(decode, z, Chunks(), None)

    def volume(s: Tensor) -> tuple[Tensor, Tensor]:
        result = _with_graph(decode, s)
        return result.log_volume, result.deficient

    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        vjp: Any = torch.func.vjp
        log_volume, gradient_of_volume, deficient = vjp(volume, point, has_aux=True)
        (gradient,) = gradient_of_volume(torch.ones_like(log_volume))
        slope = (gradient * tangent).reshape(len(z), -1).sum(1, dtype=log_volume.dtype)
        evaluated = reverse(decode, point)
        product = _jvp(evaluated, tangent)
    parts = [evaluated.value, product, log_volume, slope]
    if not recording:
        parts = [part.detach() for part in parts]
    x, volumes = (forward_ad.make_dual(*pair) for pair in (parts[:2], parts[2:]))
    return ExactVolume(x, volumes, deficient)


def _jvp(evaluated: Reverse, tangent: Tensor) -> Tensor:
    """The product (B, *) of the Jacobian with one tangent (B, *), on a graph."""
    if not evaluated.unproven:
        return evaluated.jvp(tangent.unsqueeze(0))[0]
    rows = event_rows(evaluated.vjp(basis_of(evaluated.value)))
    products = (rows * tangent.reshape(len(tangent), -1)).sum(2)
    return products.T.reshape(evaluated.value.shape)


def _without_graph(
    decode: Callable[..., Tensor], z: Tensor, chunk_size: int | None, context: Tensor | None
) -> ExactVolume:
    whole = _with_rows(decode, context)
    bits = torch.finfo(factored_dtype(z.device)).bits
    at_most = _JACOBIAN_BYTES // (_COPIES * bits // 8)
    num_rows, chunks = len(z), Chunks(chunk_size)
    if (size := _size_of_a_sample(decode, z, context)) is not None:
        num_rows = max(1, at_most // max(1, size.num_elements * z[0].numel()))
        chunks = Chunks(chunk_size, size.num_bytes)
    if num_rows < len(z):
        with differentiable_attention():
            expected = whole(z)
    else:
        try:
            return _of_rows(whole, z, chunks, at_most)
        except TooLarge as error:
            num_rows, expected = error.num_rows, error.value
    # A callable may hold tensors for the rows of this batch, and then serves no other.
    try:
        volume = _in_pieces(decode, z, chunks, context, num_rows)
        if _is_close(volume.x, expected):
            return volume
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, ShapeError, ContextError):
        pass
    return _of_rows(whole, z, chunks, None, num_rows)


def _size_of_a_sample(
    decode: Callable[..., Tensor], z: Tensor, context: Tensor | None
) -> Size | None:
    """The size of the first decoded row of many, or None."""
    if len(z) < _MANY_ROWS:
        return None
    # A callable that serves this batch alone raises here, or differs at the comparison later.
    with suppress(RuntimeError, ShapeError, ContextError):
        first = None if context is None else context[:1]
        return size_of_a_sample(_with_rows(decode, first), z[:1])
    return None


def _in_pieces(
    decode: Callable[..., Tensor],
    z: Tensor,
    chunks: Chunks,
    context: Tensor | None,
    num_rows: int,
) -> ExactVolume:
    pieces = z.split(num_rows)
    contexts = [None] * len(pieces) if context is None else context.split(num_rows)
    # Results that outlive their piece would lie between the large arrays of the next ones, and an
    # allocator could not give the same room to each piece.
    results: list[Tensor] = []
    for i, (piece, rows) in enumerate(zip(pieces, contexts, strict=True)):
        parts = _of_rows(_with_rows(decode, rows), piece, chunks, None)
        results = results or [part.new_empty(len(z), *part.shape[1:]) for part in parts]
        for result, part in zip(results, parts, strict=True):
            result.narrow(0, i * num_rows, len(piece)).copy_(part)
        del parts, part
    return ExactVolume(*results)


def _of_rows(
    decode: Map,
    z: Tensor,
    chunks: Chunks,
    at_most: int | None,
    num_rows: int | None = None,
) -> ExactVolume:
    x, matrix = jacobian_without_graph(decode, z, chunks, at_most)
    volumes = [volumes_of(piece) for piece in matrix.split(num_rows or max(1, len(matrix)))]
    parts = zip(*volumes, strict=True)
    return ExactVolume(x, *(torch.cat(part) for part in parts))


def _is_close(x: Tensor, expected: Tensor) -> bool:
    """Whether decoded batches agree up to rounding in another order."""
    tolerance = 1e-3
    scale = float(expected.abs().amax()) if expected.numel() else 0.0
    return x.shape == expected.shape and torch.allclose(
        x, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True
    )

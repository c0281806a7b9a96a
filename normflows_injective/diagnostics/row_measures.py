"""Densities, distances and spectra of rows, in chunks of bounded memory."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autodiff.jacobians import jacobian
from ..errors import InjectiveFlowError
from ..flows.stack import Stack, joint_decode
from ..flows.surfaces.surface import is_closed_form
from ..host.bases import base_log_prob
from ..models.parts import MAX_ROWS, chunks, stack_of
from ..volume.factoring import factor, warn_if_deficient
from ..volume.reconstruction import squared_error
from .rounding import in_precision, other_precision, rounding_error

# Of all Jacobians of a chunk.
_NUMBERS = 2**23


class Measured(NamedTuple):
    """The numbers of a model at rows.

    Attributes:
        log_prob: Log-densities (B,) in the units of the data.
        inner_log_prob: Log-densities (B,) in standardised coordinates.
        reconstruction_error: Squared distances (B,) there.
        singular_values: Those of the decoder Jacobian (B, d) there, descending.
        codimension: Number of dimensions that the manifold lacks.
    """

    log_prob: Tensor
    inner_log_prob: Tensor
    reconstruction_error: Tensor
    singular_values: Tensor
    codimension: int


def measure(model: Any, x: Tensor, context: Tensor | None) -> Measured:
    """Look at rows (B, *) of a model in evaluation mode, without gradients."""
    latent_dim, data_dim = _dimensions(model, x, context)
    parts = [
        _measure_chunk(model, *rows)
        for rows in chunks(x, context, _NUMBERS // (latent_dim * data_dim))
    ]
    *measured, deficient = map(torch.cat, zip(*parts, strict=True))
    if not is_closed_form(stack_of(model).composite):
        warn_if_deficient(deficient)
    log_prob, inner_log_prob, errors, singular_values = measured
    return Measured(log_prob, inner_log_prob, errors, singular_values, data_dim - latent_dim)


def has_own_measure(model: Any) -> bool:
    """Whether densities are against the manifold's own measure, which some charts replace."""
    composite = stack_of(model).composite
    return all(getattr(flow, "measure", "hausdorff") == "hausdorff" for flow in composite)


def reconstruction_errors(model: Any, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows (n, *) in standardised coordinates, and their squared distances (n,) there."""
    stack = stack_of(model)
    parts = []
    for few, given in chunks(x, context, MAX_ROWS):
        rows = stack.standardise(few)
        parts.append((rows, squared_error(rows, stack.inner.project(rows, given))))
    rows, errors = map(torch.cat, zip(*parts, strict=True))
    return rows, errors


def log_prob_error(model: Any, x: Tensor, context: Tensor | None, log_prob: Tensor) -> Tensor:
    """Rounding errors (B,) of log-densities, NaN where the model has one precision alone."""
    unknown = torch.full_like(log_prob, torch.nan)
    dimensions = _dimensions(model, x, context)
    dtype = other_precision(model, x.device)
    if dtype is None:
        return unknown
    try:
        twin = in_precision(model, dtype)
        parts = [
            _look(twin, stack_of(twin), few.to(dtype), _cast(given, dtype)).log_prob
            for few, given in chunks(x, context, _NUMBERS // math.prod(dimensions))
        ]
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, InjectiveFlowError):
        # A layer that names a dtype itself, or values that overflow in the other one.
        return unknown
    return rounding_error(log_prob, torch.cat(parts))


def _dimensions(model: Any, x: Tensor, context: Tensor | None) -> tuple[int, int]:
    """Latent dimension d at the injection, and data dimension D."""
    given = None if context is None else context[:1]
    return stack_of(model).encode(x[:1], given)[0].numel(), x[0].numel()


class _Look(NamedTuple):
    """Log-densities (B,), projections, singular values (B, d), and which Jacobians lack rank."""

    log_prob: Tensor
    projection: Tensor
    singular_values: Tensor
    deficient: Tensor


def _look(model: Any, stack: Stack, x: Tensor, context: Tensor | None) -> _Look:
    """Look at rows (B, *) through a stack by one Jacobian, in silence."""
    z = stack.encode(x, context)
    decode = partial(joint_decode, stack.composite, context=context)
    projection, matrix = jacobian(decode, z)
    factors = factor(matrix)
    if is_closed_form(stack.composite):
        z, log_volume = stack.pull(x, context)
    else:
        log_volume = factors.log_volume.to(torch.promote_types(x.dtype, torch.float32))
        z, log_volume = stack.to_base(z, log_volume, context)
    return _Look(
        log_prob=base_log_prob(model.q0, z, context) - log_volume,
        projection=projection,
        # R has the singular values of the Jacobian, and is small.
        singular_values=torch.linalg.svdvals(factors.r),
        deficient=factors.deficient,
    )


def _measure_chunk(model: Any, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    stack = stack_of(model)
    inner, rows = stack.inner, stack.standardise(x)
    inside = _look(model, inner, rows, context)
    has_units = len(inner.composite) < len(stack.composite)
    whole = _look(model, stack, x, context) if has_units else inside
    errors = squared_error(rows, inside.projection)
    log_probs = whole.log_prob, inside.log_prob
    return *log_probs, errors, inside.singular_values, whole.deficient


def _cast(context: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A context in another dtype; class labels stay whole numbers."""
    return context.to(dtype) if context is not None and context.is_floating_point() else context

"""Layers of a factory: what is no list of layers is refused, and permutations go between."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import normflows as nf
import torch
from torch import Tensor

from ...checks import describe
from ...errors import ContextError, InjectiveFlowError, OptionError, ShapeError
from ...host.context import needs_context
from ..layer_stack import LayerStack

# Layers after which no coordinate is left where the last coupling could not reach it.
_MIXING = (
    nf.flows.Permute,
    nf.flows.LULinearPermute,
    nf.flows.InvertibleAffine,
    nf.flows.Invertible1x1Conv,
)
_ELEMENTWISE = (nf.flows.AffineConstFlow, nf.flows.PeriodicShift, nf.flows.PeriodicWrap)


def checked_layers(made: Any, dim: int) -> list[nf.flows.Flow]:
    """The layers that a factory made, checked to map vectors (B, D) to vectors (B, D)."""
    try:
        stack = LayerStack(made)
    except OptionError as error:
        raise OptionError(
            f"flow_factory({dim}) must give a layer of normflows or a list of at least one, got "
            f"{describe(made)}. Give the layers alone, without a base or a transform around them; "
            "a guide without layers between is AutoDiagonalNormal."
        ) from error
    for flow in stack.flows:
        if needs_context(flow):
            raise ContextError(
                f"flow_factory({dim}) gave a {type(flow).__name__} that needs a context, which a "
                "guide over all latents does not get. Build it without context features."
            )
    advice = (
        "Build them for as many dimensions as the factory is told. A guide on a manifold needs "
        "noise around it: use AutoInjective."
    )
    try:
        shape = tuple(_trial(stack, dim)[1].shape[1:])
    except InjectiveFlowError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ShapeError(
            f"The layers of flow_factory({dim}) must take vectors of {dim} latents, but fail on "
            f"them: {error}. {advice}"
        ) from error
    if shape != (dim,):
        raise ShapeError(
            f"The layers must keep the {dim} latent dimensions, but lead to shape {shape}. "
            f"{advice}"
        )
    return list(stack.flows)


def interleaved(layers: Iterable[nf.flows.Flow], dim: int) -> list[nf.flows.Flow]:
    """Put random permutations between layers of which neither mixes all coordinates itself."""
    result: list[nf.flows.Flow] = []
    # No coordinate is changed by a coupling again before all others were changed once, whichever
    # coordinates the couplings leave alone.
    unchanged = torch.ones(dim, dtype=torch.bool)
    needs_mixing = False
    for layer in layers:
        if dim > 1 and not isinstance(layer, _ELEMENTWISE):
            mixes = isinstance(layer, _MIXING)
            positions = torch.ones_like(unchanged) if mixes else _changed_by(layer, dim)
            if needs_mixing and not mixes:
                order = _order(unchanged, positions)
                result.append(_permutation(order))
                unchanged = unchanged[order]
            needs_mixing = not mixes
            unchanged = unchanged & ~positions
            if not unchanged.any():
                unchanged = torch.ones_like(unchanged)
        result.append(layer)
    return result


def _changed_by(layer: nf.flows.Flow, dim: int) -> Tensor:
    """Positions (D,) that a layer changes, whatever it does at its initial parameters."""
    z, x = _trial(LayerStack(layer), dim)
    if x.shape != z.shape:
        return torch.ones(dim, dtype=torch.bool)
    return (x != z).any(dim=0).cpu()


@torch.no_grad()
def _trial(stack: LayerStack, dim: int) -> tuple[Tensor, Tensor]:
    """Latents (8, D) and their images under a copy of layers with other parameters."""
    stack = deepcopy(stack).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in stack.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(0.1 * noise.to(parameter))
    decimals = (p for p in stack.parameters() if p.is_floating_point())
    z = torch.randn(8, dim, generator=generator)
    z = z.to(next(decimals, z))
    return z, stack.push(z, None)[0]


def _order(unchanged: Tensor, positions: Tensor) -> Tensor:
    """A random order (D,) that puts unchanged coordinates at positions that will be changed."""
    dim = len(unchanged)
    ranked = (unchanged + torch.rand(dim)).argsort(descending=True)
    places = (positions + torch.rand(dim)).argsort(descending=True)
    order = torch.empty_like(ranked)
    order[places] = ranked
    return order


def _permutation(order: Tensor) -> nf.flows.Permute:
    layer = nf.flows.Permute(len(order), "shuffle")
    layer.perm, layer.inv_perm = order, order.argsort()
    return layer

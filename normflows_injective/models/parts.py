"""The parts of an injective flow at one call, each module found once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import normflows as nf
import torch
from torch import Tensor, nn

from ..flows.stack import Stack, without_units
from ..modules.contents import Contents, contents_of, modules_of

# Rows that are evaluated at a time.
MAX_ROWS = 1024


class InjectiveModel(Protocol):
    """The parts of an injective flow, and its two answers, from which losses are made."""

    q0: Any
    p: Any
    flows: Any
    likelihood: Any

    @property
    def latent_block(self) -> list[nf.flows.Flow]:
        """The layers before the first injection."""

    @property
    def composite(self) -> list[nf.flows.Flow]:
        """The layers from the first injection on."""

    def sample(self, num_samples: int, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Draws (n, *) and their log-densities (n,) in nats."""

    def log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Log-densities (B,) in nats of the projections of data (B, *)."""


class Parts(NamedTuple):
    """The layers of a model, and the modules in them.

    Attributes:
        stack: The layers, split at the first injection.
        inner: The composite without the units that stand last, which training terms look at.
        contents: The modules and scripts in the inner composite.
        flows: The modules in all layers.
        base: The modules in the base and in no layer.
        every: All modules of the model, itself included.
    """

    stack: Stack
    inner: Sequence[nf.flows.Flow]
    contents: Contents
    flows: list[nn.Module]
    base: list[nn.Module]
    every: list[nn.Module]


def stack_of(model: InjectiveModel) -> Stack:
    """The layers of a model, split at the first injection."""
    return Stack(model.latent_block, model.composite)


def look_into(model: InjectiveModel) -> Parts:
    """Look once at all modules of a model."""
    seen: set[int] = set()
    stack = stack_of(model)
    inner, units = without_units(stack.composite)
    contents = contents_of(inner, seen)
    flows = contents.modules + contents_of([*units, *stack.latent_block], seen).modules
    base = contents_of([model.q0], seen).modules
    every = flows + base + contents_of([model], seen).modules
    return Parts(stack, inner, contents, flows, base, every)


def chunks(x: Tensor, context: Tensor | None, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Consecutive rows with their context, at most so many, and at most a thousand."""
    size = max(1, min(size, MAX_ROWS))
    for start in range(0, x.shape[0], size):
        few = slice(start, start + size)
        yield x[few], None if context is None else context[few]


def model_dtype(q0: nn.Module, flows: nn.Module) -> torch.dtype:
    """Dtype in which a stack computes: that of most numbers in its flows, or else in its base."""
    return dtype_of(modules_of(flows), modules_of(q0))


def dtype_of(flows: Sequence[nn.Module], base: Sequence[nn.Module]) -> torch.dtype:
    """Dtype of most numbers in the modules of the flows, or else of the base.

    The majority decides, because some layers of normflows keep a float64 scalar in a float32
    model. The flows come first, because some bases of normflows are float64 altogether.
    """
    # By the modules: parameters() puts together names that nobody reads, at every call.
    for modules in (flows, base):
        for held in (
            [module._parameters for module in modules if module._parameters],
            [module._buffers for module in modules if module._buffers],
        ):
            count: dict[torch.dtype, int] = {}
            for tensors in held:
                for tensor in tensors.values():
                    if tensor is not None and tensor.is_floating_point():
                        count[tensor.dtype] = count.get(tensor.dtype, 0) + tensor.numel()
            if count:
                return max(count, key=lambda dtype: count[dtype])
    return torch.get_default_dtype()

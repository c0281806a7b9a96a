"""The check of a whole stack at construction: a trial pass of two samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .bases import sample_base
from .context import needs_context
from .errors import InjectiveFlowError, NotInjectiveError, ShapeError, UnsupportedLayerError
from .flows.composite import Flows, joint_decode, joint_encode
from .flows.shapes import check_raises_dimension

__all__ = ["StackShapes", "model_dtype", "trial_pass"]


class StackShapes(NamedTuple):
    """Event shapes of a stack: of the base, at the first injection, and of the data."""

    base: tuple[int, ...]
    latent: tuple[int, ...]
    data: tuple[int, ...]


def model_dtype(q0: nn.Module, flows: nn.Module) -> torch.dtype:
    """Dtype in which a stack computes: of its flows, or of its base where these hold no numbers.

    The base comes second, because some of the host's are float64 in a float32 model.

    Examples:
        >>> import normflows as nf
        >>> model_dtype(nf.distributions.DiagGaussian(2), nn.Linear(2, 2).double())
        torch.float64
    """
    for module in (flows, q0):
        for tensor in chain(module.parameters(), module.buffers()):
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.get_default_dtype()


def trial_pass(q0: nn.Module, flows: Flows, num_latent: int) -> StackShapes | None:
    """Send two base samples to the data and back, and read off the shapes.

    The random state, the modes of the modules and layers that initialise themselves on data are
    left as they were.

    Args:
        q0: Base distribution.
        flows: Layers from latent to data.
        num_latent: Number of layers before the first injection.

    Returns:
        The shapes, or None where a pass is not possible: a part needs a context, the parameters
        are on the meta device, or the layers still differ in dtype.

    Raises:
        ShapeError: If a layer cannot take what the one before it returns.
        NotInjectiveError: If the latents are at least as wide as the data.
        UnsupportedLayerError: If a layer lacks a direction.
    """
    parts = [q0, *flows]
    tensors = [t for part in parts for t in [*part.parameters(), *part.buffers()]]
    dtypes = {p.dtype for flow in flows for p in flow.parameters()}
    if (
        any(needs_context(part) for part in parts)
        or any(t.is_meta for t in tensors)
        or len(dtypes) > 1
    ):
        return None
    dtype = model_dtype(q0, nn.ModuleList(flows))
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices=devices), _left_as_it_was(parts):
        base, _ = sample_base(q0, 2, None, dtype)
        latent = _through(flows, range(num_latent), base.clone(), forward=True)
        data = _through(flows, range(num_latent, len(flows)), latent.clone(), forward=True)
        shapes = StackShapes(*(tuple(t.shape[1:]) for t in (base, latent, data)))
        check_raises_dimension(shapes.latent, shapes.data, "The stack from injection to data")
        back = _through(flows, reversed(range(len(flows))), data.clone(), forward=False)
    if back.shape != base.shape:
        raise ShapeError(
            f"The layers send the base's shape {shapes.base} to data of shape {shapes.data}, but "
            f"these back to {tuple(back.shape[1:])}. Encoder and decoder must have opposite "
            "shapes."
        )
    return shapes


def _through(flows: Flows, order: Iterator[int] | range, value: Tensor, forward: bool) -> Tensor:
    step = joint_decode if forward else joint_encode
    for index in order:
        where = f"flows[{index}] ({type(flows[index]).__name__})"
        shape = tuple(value.shape[1:]) if isinstance(value, Tensor) else "a list"
        try:
            value = step([flows[index]], value)
        except InjectiveFlowError as error:
            if isinstance(error, ShapeError | NotInjectiveError):
                raise type(error)(f"{where}, given event shape {shape}: {error}") from error
            raise
        except NotImplementedError as error:
            raise UnsupportedLayerError(
                f"{where} lacks the {'generative' if forward else 'encoding'} direction: {error} "
                "Use a layer with both forward and inverse."
            ) from error
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ShapeError(
                f"{where} cannot take event shape {shape} in the "
                f"{'generative' if forward else 'encoding'} direction. Check the shape of the "
                f"base and of the layers around it. The layer said: {error}"
            ) from error
    return value


@contextmanager
def _left_as_it_was(parts: Sequence[nn.Module]) -> Iterator[None]:
    modules = [module for part in parts for module in part.modules()]
    modes = [module.training for module in modules]
    cold = [module for module in modules if hasattr(module, "data_dep_init_done")]
    states = [{k: v.clone() for k, v in module.state_dict().items()} for module in cold]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for module, state in zip(cold, states, strict=True):
            module.load_state_dict(state)

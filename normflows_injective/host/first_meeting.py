"""The first data of layers that initialise themselves, taken wholly or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError
from ..modules.contents import modules_of
from .copies import replica_of
from .first_data import awaits_first_data, refuse_single_sample

Source = TypeVar("Source", bound=Callable[..., Any])
_WRITING = Lock()


def meet_first_data(
    source: Source,
    run: Callable[[Source], Tensor],
    on_samples: bool = False,
    modules: Sequence[nn.Module] | None = None,
) -> Source:
    """Let layers in a source take first data, if all that follows from the data is finite.

    A copy meets the data first: ``run(copy)`` gives the tensor that must be finite. If it is, and
    the parameters that the layers took too, the layers get them, in ordinary tensors also in
    inference mode, and the source is returned; else nothing is changed, and the copy is returned.
    Layers of this package take nothing from a batch that was drawn (``on_samples``), those of
    normflows do.
    """
    modules = modules_of(source) if modules is None else modules
    waiting = filter(awaits_first_data, modules)
    if not any(_takes(module, on_samples) for module in waiting):
        return source
    with torch.inference_mode(False), torch.no_grad():
        copy, twin_of = replica_of(source)
        result = run(copy)
        pairs = [(module, twin_of(module)) for module in modules if awaits_first_data(module)]
        met = [(module, twin) for module, twin in pairs if not awaits_first_data(twin)]
        taken = [t for _, twin in met for t in (*twin.parameters(), *twin.buffers())]
        if not all(bool(t.isfinite().all()) for t in [result, *taken]):
            return copy
        with _WRITING:
            # Another thread may have been first.
            for module, twin in met:
                if awaits_first_data(module):
                    _take_over(module, twin)
    return source


def give_first_data(function: Callable[[Tensor], Tensor], z: Tensor) -> None:
    """Call a function once in the ordinary way, if a layer in it awaits first data (B, *).

    The ActNorm of normflows stores its first input through ``.data``. Inside a functional
    transform that stores a wrapper tensor whose lifetime ends with the transform, and the process
    dies with a segmentation fault.
    """
    modules = modules_of(function)
    if not any(awaits_first_data(module) for module in modules):
        return
    refuse_single_sample(modules, z)
    met = meet_first_data(function, lambda copy: copy(z.detach().clone()), modules=modules)
    if met is not function:
        raise NonFiniteError(
            "The first batch, from which a layer (ActNorm) initialises itself, leads to values "
            "that are NaN or infinite. Clean or standardise the data; no layer was changed."
        )


def _takes(module: nn.Module, on_samples: bool) -> bool:
    """Whether a module that awaits first data would take something from a batch."""
    if not hasattr(module, "initialise"):
        return True
    # Our own layers leave frozen parameters alone.
    is_trained = any(p is not None and p.requires_grad for p in module._parameters.values())
    return is_trained and not on_samples


def _take_over(module: nn.Module, twin: nn.Module) -> None:
    """Give a layer the tensors that its copy took from first data, and the flag last."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            _write(parameter, getattr(twin, name))
    for name, buffer in module._buffers.items():
        new = twin._buffers[name]
        if buffer is not None and new is not None and new.device == buffer.device:
            _write(buffer, new)
        else:
            # As normflows does, which keeps its flag on the CPU.
            module._buffers[name] = new
    if hasattr(twin, "_has_met_data"):
        # What a compiler reads of layers of this package.
        module._has_met_data = twin._has_met_data


def _write(old: Tensor, new: Tensor) -> None:
    if old.shape != new.shape:
        old.data = new.data
        return
    with torch.inference_mode(old.is_inference()), torch.no_grad():
        old.copy_(new)

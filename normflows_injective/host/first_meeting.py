"""The first data of layers that initialise themselves, taken wholly or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError
from ..modules.behind import modules_of
from .copies import replica_of
from .first_data import is_cold, refuse_single_sample

__all__ = ["meet_first_data", "warm_up"]

Source = TypeVar("Source", bound=Callable[..., Any])
_WRITING = Lock()


def meet_first_data(
    source: Source,
    run: Callable[[Source], Tensor],
    on_samples: bool = False,
    modules: Sequence[nn.Module] | None = None,
) -> Source:
    """Let layers that have yet to meet data take it, if all that follows from it is finite.

    A copy meets the data first. If the result is finite, and so is what the layers took, the
    layers get it, in ordinary tensors also in inference mode; else nothing of them is changed.

    Args:
        source: A module, or a callable that modules stand behind.
        run: Calls it, or a copy of it, on the data, and gives what must be finite.
        on_samples: Whether the batch was drawn rather than observed. Then layers of this package
            take nothing from it, but those of normflows do.
        modules: Those behind the source, where the caller has looked already.

    Returns:
        What the caller should go on with: the source, or the copy if the result is not finite.

    Examples:
        >>> import normflows as nf
        >>> norm, x = nf.flows.ActNorm((2,)), torch.tensor([[1.0, 2.0], [3.0, torch.nan]])
        >>> meet_first_data(norm, lambda norm: norm(x)[0]) is norm, is_cold(norm)
        (False, True)
    """
    modules = modules_of(source) if modules is None else modules
    cold = filter(is_cold, modules)
    if not any(_awaits(module, on_samples) for module in cold):
        return source
    with torch.inference_mode(False), torch.no_grad():
        copy, twin_of = replica_of(source)
        result = run(copy)
        pairs = [(module, twin_of(module)) for module in modules if is_cold(module)]
        met = [(module, twin) for module, twin in pairs if not is_cold(twin)]
        taken = [t for _, twin in met for t in (*twin.parameters(), *twin.buffers())]
        if not all(bool(t.isfinite().all()) for t in [result, *taken]):
            return copy
        with _WRITING:
            # Another thread may have been first.
            for module, twin in met:
                if is_cold(module):
                    _take_over(module, twin)
    return source


def warm_up(function: Callable[[Tensor], Tensor], z: Tensor) -> None:
    """Call a function once in the ordinary way if a layer behind it initialises itself on data.

    Such a layer (normflows' ``ActNorm``, also inside ``GlowBlock`` and ``ConvNet2d``) stores its
    first input through ``.data``. Inside a functional transform that stores a wrapper tensor whose
    lifetime ends with the transform, and the process dies with a segmentation fault.

    Args:
        function: Map to be differentiated next.
        z: Batch of shape :math:`(B, *)` to initialise on.

    Raises:
        ShapeError: If the batch has one sample, whose standard deviation does not exist.
        NonFiniteError: If what follows from the batch is not finite; then no layer is changed.
    """
    modules = modules_of(function)
    if not any(is_cold(module) for module in modules):
        return
    refuse_single_sample(modules, z)
    met = meet_first_data(function, lambda copy: copy(z.detach().clone()), modules=modules)
    if met is not function:
        raise NonFiniteError(
            "The first batch, from which a layer (ActNorm) initialises itself, leads to values "
            "that are NaN or infinite. Clean or standardise the data; no layer was changed."
        )


def _awaits(module: nn.Module, on_samples: bool) -> bool:
    """Whether a module that is cold would take something from a batch."""
    if not hasattr(module, "initialise"):
        return True
    # Our own layers leave frozen parameters alone.
    trained = any(p is not None and p.requires_grad for p in module._parameters.values())
    return trained and not on_samples


def _take_over(module: nn.Module, twin: nn.Module) -> None:
    """Give a layer what its copy took from first data, the flag that says so last."""
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

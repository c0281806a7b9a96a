"""Results that are NaN, and the parameter that made them so."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..checks import is_readable
from ..errors import NonFiniteError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_REMEDY = (
    "The model has diverged: load its last good checkpoint, and train at a lower rate, with "
    "gradients clipped, or with a higher beta."
)


def names_diverged(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a method of a module, which returns tensors or None, raise where it would return NaN."""

    @wraps(method)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        result = method(*args, **kwargs)
        module = args[0]
        if isinstance(module, nn.Module):
            check_results(module, result if isinstance(result, tuple) else (result,))
        return result

    return call


def check_results(module: nn.Module, results: Iterable[object]) -> None:
    """Raise if results of a module are NaN, or infinite by one of its parameters."""
    # Densities may be zero, so that infinities of a module with finite parameters pass. It costs
    # one look at values, which waits for the device, where all is well; parameters are searched
    # only where it is not.
    tensors = [r for r in results if isinstance(r, Tensor) and r.is_floating_point()]
    if not tensors or not is_readable(*tensors):
        return
    if bool(torch.stack([torch.isfinite(tensor.detach()).all() for tensor in tensors]).all()):
        return
    for name, parameter in module.named_parameters():
        _refuse(f"The parameter {name}", ~torch.isfinite(parameter), "NaN or infinite", _REMEDY)
    for name, buffer in module.named_buffers():
        # Masks and bounds may be infinite.
        _refuse(f"The buffer {name}", torch.isnan(buffer), "NaN", _REMEDY)
    for result in tensors:
        _refuse(
            f"The result of {type(module).__name__}",
            torch.isnan(result),
            "NaN",
            "The parameters are finite: the arguments lie outside the domain of a layer, or are "
            "so large that it overflows.",
        )


def _refuse(name: str, bad: Tensor, kind: str, advice: str) -> None:
    count = int(bad.sum())
    if count:
        raise NonFiniteError(f"{name} has {count} of {bad.numel()} values {kind}. {advice}")

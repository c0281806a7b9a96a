"""Layers that are refused, and why."""

from __future__ import annotations

from collections.abc import Iterable

import normflows as nf
from normflows.flows.residual import iResBlock
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..errors import UnsupportedLayerError
from ..modules.behind import COMPILED, is_plain_layer

__all__ = ["refuse_unsupported"]


def refuse_unsupported(modules: Iterable[nn.Module]) -> None:
    """Raise at the first module that would make a Jacobian or its gradient silently wrong.

    Args:
        modules: Modules of the differentiated part, as from :func:`modules_of`.

    Raises:
        UnsupportedLayerError: For batch normalisation and dropout in training mode, stochastic
            layers, the host's ``Residual`` with ``reduce_memory=True`` in training mode, and
            compiled sub-networks; the message says what to use.

    Examples:
        >>> refuse_unsupported(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval().modules())
    """
    for module in modules:
        reason = None if is_plain_layer(module) else _reason_against(module)
        if reason is not None:
            raise UnsupportedLayerError(f"{type(module).__name__} {reason}")


def _dropout(module: nn.Module) -> float:
    if isinstance(module, _DropoutNd):
        return module.p
    return module.dropout if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) else 0.0


def _reason_against(module: nn.Module) -> str | None:
    if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
        mode = "in training mode" if module.training else "without running statistics"
        return (
            f"{mode} couples the samples of a batch, so no per-sample Jacobian exists. "
            "Use nn.GroupNorm, or .eval() it."
        )
    if module.training and _dropout(module) > 0:
        return (
            "in training mode draws another network at every call, so encoder, decoder and "
            "their Jacobians would not belong together. Set p=0, or .eval() it."
        )
    if isinstance(module, nf.flows.BatchNorm):
        return (
            "couples the samples of a batch and has no inverse. Use nf.flows.ActNorm, or put "
            "nn.GroupNorm into the networks."
        )
    if isinstance(module, (nf.flows.MetropolisHastings, nf.flows.HamiltonianMonteCarlo)):
        return (
            "is stochastic: it has a log-weight but no Jacobian. It can stand before the first "
            "injection only."
        )
    if isinstance(module, iResBlock) and module.grad_in_forward and module.training:
        return (
            "with reduce_memory=True drops its own branch from the graph of a vector-Jacobian "
            "product, so its weights get no gradient. Build nf.flows.Residual with "
            "reduce_memory=False."
        )
    if isinstance(module, nn.RReLU) and module.training:
        return "in training mode draws another slope at every call. Use a fixed smooth activation."
    compiled_in_place = getattr(module, "_compiled_call_impl", None) is not None
    if type(module).__name__ == "OptimizedModule" or compiled_in_place:
        return COMPILED
    return None

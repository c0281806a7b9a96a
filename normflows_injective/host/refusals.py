"""Modules that spoil a Jacobian, in one table, and layers without an inverse or a density."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import normflows as nf
from normflows.flows.residual import iResBlock
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..errors import UnsupportedLayerError
from ..modules.contents import COMPILED, is_plain_layer

# They draw random numbers at every call, and have a log-weight in place of a log-det.
STOCHASTIC = (nf.flows.MetropolisHastings, nf.flows.HamiltonianMonteCarlo)


class _Refusal(NamedTuple):
    """Layers of some kinds, the state in which they are refused, and the reason."""

    kinds: tuple[type[nn.Module], ...]
    applies: Callable[[Any], bool]
    reason: str


def _always(_: nn.Module) -> bool:
    return True


def _drops(module: Any) -> bool:
    p = module.p if isinstance(module, _DropoutNd) else module.dropout
    return bool(module.training and p > 0)


def _is_compiled(module: nn.Module) -> bool:
    compiled_in_place = getattr(module, "_compiled_call_impl", None) is not None
    return type(module).__name__ == "OptimizedModule" or compiled_in_place


# What makes a Jacobian of each sample, or its gradient, silently wrong.
_REFUSED = (
    _Refusal(
        (_BatchNorm,),
        lambda module: module.training,
        "in training mode couples the samples of a batch, so no per-sample Jacobian exists. "
        "Use nn.GroupNorm, or .eval() it.",
    ),
    _Refusal(
        (_BatchNorm,),
        lambda module: module.running_mean is None,
        "without running statistics couples the samples of a batch, so no per-sample Jacobian "
        "exists. Use nn.GroupNorm, or .eval() it.",
    ),
    _Refusal(
        (_DropoutNd, nn.MultiheadAttention, nn.RNNBase),
        _drops,
        "in training mode draws another network at every call, so encoder, decoder and "
        "their Jacobians would not belong together. Set p=0, or .eval() it.",
    ),
    _Refusal(
        (nf.flows.BatchNorm,),
        _always,
        "couples the samples of a batch and has no inverse. Use nf.flows.ActNorm, or put "
        "nn.GroupNorm into the networks.",
    ),
    _Refusal(
        STOCHASTIC,
        _always,
        "is stochastic: it has a log-weight but no Jacobian. It can stand before the first "
        "injection only.",
    ),
    _Refusal(
        (iResBlock,),
        lambda module: module.grad_in_forward and module.training,
        "with reduce_memory=True drops its own branch from the graph of a vector-Jacobian "
        "product, so its weights get no gradient. Build nf.flows.Residual with "
        "reduce_memory=False.",
    ),
    _Refusal(
        (nn.RReLU,),
        lambda module: module.training,
        "in training mode draws another slope at every call. Use a fixed smooth activation.",
    ),
    _Refusal((nn.Module,), _is_compiled, COMPILED),
)


def refuse_unsupported(modules: Iterable[nn.Module]) -> None:
    """Raise at the first module that makes a Jacobian or its gradient silently wrong."""
    for module in modules:
        if is_plain_layer(module):
            continue
        for kinds, applies, reason in _REFUSED:
            if isinstance(module, kinds) and applies(module):
                raise UnsupportedLayerError(f"{type(module).__name__} {reason}")


def refuse_stochastic(layer: nn.Module) -> None:
    """Raise if a layer is no map of each sample by itself."""
    for module in layer.modules():
        if isinstance(module, (*STOCHASTIC, nf.flows.BatchNorm)):
            raise UnsupportedLayerError(
                f"{type(module).__name__} is no map of each sample by itself, so it has no "
                "density. Use nf.flows.ActNorm for normalisation, or Pyro's own samplers."
            )


def refuse_one_way(layer: nn.Module) -> None:
    """Raise if a layer or one inside it has no inverse."""
    for module in layer.modules():
        one_way_planar = isinstance(module, nf.flows.Planar) and module.act != "leaky_relu"
        inherits = isinstance(module, nf.flows.Flow) and (
            type(module).inverse is nf.flows.base.Flow.inverse
        )
        if one_way_planar or inherits:
            raise UnsupportedLayerError(
                f"{type(module).__name__} has no inverse, so no data can be encoded through it. "
                "Use an invertible layer such as nf.flows.AffineCouplingBlock."
            )

"""Names in Pyro's parameter store that are taken, under which a module would not be trained.

The store keeps the first tensor of a name. A later module under the same name draws and scores by
its own parameters, while the optimiser gets those of the first.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ...errors import RegistrationError

DIGEST = "digest_of_buffers"

# Modules by their parameters. The store keeps parameters of modules that are gone.
_OWNERS: Any = WeakTensorKeyDictionary()


def names_are_free(owner: nn.Module, prefix: str) -> bool:
    """Free names of a module from parameters of one that is gone, and say whether all are free."""
    store = pyro.get_param_store()
    own = {id(parameter) for parameter in owner.parameters()}
    for parameter in owner.parameters():
        _OWNERS[parameter] = weakref.ref(owner)
    stored = {name: value for name, value in store._params.items() if name.startswith(prefix)}
    others = [
        value
        for name, value in stored.items()
        if id(value) not in own and not name.endswith(DIGEST)
    ]
    if not others:
        return True
    # Parameters of a living module, or of an unknown one, as from a file, are left alone.
    if not all(_is_gone(value) for value in others):
        # Modules of Pyro refer to themselves, so that only the collector ends them.
        gc.collect()
        if not all(_is_gone(value) for value in others):
            return False
    for name in stored:
        del store[name]
    return True


def refuse_taken_names(owner: nn.Module, name: str) -> None:
    """Raise that a module cannot be trained under a name."""
    raise RegistrationError(
        f"This {type(owner).__name__} cannot be trained: Pyro's parameter store already holds "
        f"other parameters under the name {name!r}, of an earlier module that is still in use or "
        "from a file, and the optimiser would get those. Call pyro.clear_param_store() before "
        "training it, or delete the earlier module and what refers to it. To continue from a "
        "file, clear the store and use nfp.load."
    )


def refuse_other_tensors(nn_module: nn.Module) -> None:
    """Raise if the optimiser of the present step will get other tensors than a module's own."""
    # That happens where pyro.module meets a name that is taken and returns the module unchanged.
    step = _training_step()
    if step is None:
        return
    own = {id(parameter) for parameter in nn_module.parameters() if parameter.requires_grad}
    for name, site in step.trace.nodes.items():
        if site["type"] != "param" or len(site["args"]) < 2 or id(site["args"][1]) not in own:
            continue
        value: Any = site["value"]
        if value.unconstrained() is not site["args"][1]:
            refuse_taken_names(nn_module, name.partition("$$$")[0])


def trains_now() -> bool:
    """Whether parameters are being collected for an optimiser, as by ``SVI.step``."""
    return torch.is_grad_enabled() and _training_step() is not None


def _training_step() -> TraceMessenger | None:
    for handler in _PYRO_STACK:
        if isinstance(handler, TraceMessenger) and handler.param_only:
            return handler
    return None


def _is_gone(parameter: Tensor) -> bool:
    owner = _OWNERS.get(parameter)
    return owner is not None and owner() is None

"""Digests of buffers in Pyro's parameter store, which keeps parameters only.

A stack with random permutations or masks that takes its parameters from a loaded store, in a
process with another seed, silently has another density. A digest of the buffers in the store,
beside the parameters, shows the difference.
"""

from __future__ import annotations

import hashlib
import warnings
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import torch
from torch import Tensor, nn

from ...distributions.sample_cache import versions
from ...errors import ParamStoreWarning
from .taken_names import DIGEST, refuse_other_tensors

_DIFFERENT = (
    "takes its parameters from Pyro's parameter store, but they were trained with other buffers "
    "(permutations, masks, normalisations), so that its density is another one"
)

# By module: the name of its digest, its first parameter in the store, and its buffers.
_SEEN: WeakKeyDictionary[nn.Module, tuple[Any, ...]] = WeakKeyDictionary()


def watch_buffers(nn_module: nn.Module) -> None:
    """Warn if parameters in the store were trained with other buffers than a module has now."""
    store: Any = pyro.get_param_store()
    key, parameter = _name_in(store, nn_module)
    if key is None:
        refuse_other_tensors(nn_module)
        return
    now = key, id(parameter), versions(nn_module.buffers())
    before = _SEEN.get(nn_module)
    if before == now and now[2] is not None and key in store:
        return
    digest = digest_of(nn_module)
    if digest is None:
        return
    restored = before is None or before[:2] != now[:2]
    # Later changes, as by normalisation layers in training, renew the digest without a warning.
    if restored and key in store and not torch.equal(store[key], digest):
        warn_of_store(key.partition("$$$")[0], _DIFFERENT)
    store[key] = digest
    _SEEN[nn_module] = now


def digest_of(nn_module: nn.Module) -> Tensor | None:
    """Two numbers that tell the saved buffers of a module from others, or None if it has none."""
    parameters = dict(nn_module.named_parameters())
    state = nn_module.state_dict()
    buffers = [key for key in state if key not in parameters]
    if not buffers:
        return None
    digest = hashlib.sha256()
    for key in buffers:
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    raw = digest.digest()
    # 48 bits each, which a float64 holds exactly.
    numbers = [int.from_bytes(raw[i : i + 6], "big") for i in (0, 6)]
    return torch.tensor(numbers, dtype=torch.float64)


def warn_of_store(name: str, reason: str) -> None:
    """Warn that the parameter store has restored a module wrongly, or not at all."""
    warnings.warn(
        f"Module {name!r} {reason}. Save and restore whole modules by nfp.save and nfp.load, "
        "or by state_dict.",
        ParamStoreWarning,
        stacklevel=3,
    )


def _name_in(store: Any, nn_module: nn.Module) -> tuple[str | None, Tensor | None]:
    """Name of the module's digest in the store, and the parameter that shows the name."""
    local, parameter = next(nn_module.named_parameters(), ("", None))
    full = None if parameter is None else store.param_name(parameter)
    # A module inside the one that was registered has a digest of its own.
    if full is None or not full.endswith(local):
        return None, None
    return full[: len(full) - len(local)] + DIGEST, parameter


def make_contiguous(module: nn.Module) -> list[nn.Parameter]:
    """Make the parameters of a module contiguous, and return those that were not."""
    # Of any other, such as the matrix of nf.flows.InvertibleAffine(use_lu=False), the store trains
    # a copy, and the module never learns.
    scattered = [p for p in module.parameters() if not p.is_contiguous()]
    for parameter in scattered:
        parameter.data = parameter.data.contiguous()
    return scattered

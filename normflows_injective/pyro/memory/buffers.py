"""Buffers beside Pyro's parameter store, which keeps parameters only.

A stack with random permutations or masks that takes its parameters from a loaded store, in a
process with another seed, has another density and says nothing. So a digest of the buffers is
left in the store beside the parameters, to compare.
"""

from __future__ import annotations

import hashlib
import warnings
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import torch
from torch import Tensor, nn

from ...errors import ParamStoreWarning
from .sample_cache import versions
from .taken_names import DIGEST, refuse_other_tensors

__all__ = ["digest_of", "make_contiguous", "warn_of_store", "watch_buffers"]

_DIFFERENT = (
    "takes its parameters from Pyro's parameter store, but they were trained with other buffers "
    "(permutations, masks, normalisations), so that its density is another one"
)

# By module: the name of its digest, its first parameter in the store, and its buffers.
_SEEN: WeakKeyDictionary[nn.Module, tuple[Any, ...]] = WeakKeyDictionary()


def watch_buffers(nn_module: nn.Module) -> None:
    """Compare a module's buffers with those that the parameters in the store were trained with.

    Does nothing for a module whose parameters are not in the store, or that has no buffers. Later
    changes, as by normalisation layers in training, renew the digest. A module that is registered
    under a name of other parameters is refused in training.

    Args:
        nn_module: A module that is about to draw or to score.

    Raises:
        RegistrationError: If an optimiser is about to get other parameters under its name.

    Warns:
        ParamStoreWarning: If the parameters come from a module with other buffers.

    Examples:
        >>> normed = nn.BatchNorm1d(2)
        >>> _ = pyro.module("normed", normed)
        >>> watch_buffers(normed)
        >>> "normed$$$digest_of_buffers" in pyro.get_param_store()
        True
    """
    store: Any = pyro.get_param_store()
    key, parameter = _name_in(store, nn_module)
    if key is None:
        refuse_other_tensors(nn_module)
        return
    found = key, id(parameter), versions(nn_module.buffers())
    before = _SEEN.get(nn_module)
    if before == found and found[2] is not None and key in store:
        return
    digest = digest_of(nn_module)
    if digest is None:
        return
    restored = before is None or before[:2] != found[:2]
    if restored and key in store and not torch.equal(store[key], digest):
        warn_of_store(key.partition("$$$")[0], _DIFFERENT)
    store[key] = digest
    _SEEN[nn_module] = found


def digest_of(nn_module: nn.Module) -> Tensor | None:
    """Two numbers that tell the buffers of a module from others, or None if it has none.

    Args:
        nn_module: Any module; only buffers of its ``state_dict`` count.

    Examples:
        >>> digest_of(nn.Linear(2, 2)) is None
        True
    """
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
    """Warn that the parameter store has not, or not rightly, restored a module.

    Args:
        name: Name of the module in the store.
        reason: What happened.
    """
    warnings.warn(
        f"Module {name!r} {reason}. Save and restore whole modules by nfp.save and nfp.load, "
        "or by state_dict.",
        ParamStoreWarning,
        stacklevel=3,
    )


def _name_in(store: Any, nn_module: nn.Module) -> tuple[str | None, Tensor | None]:
    """Name of the module's digest in the store, and the parameter that it was found by."""
    for local, parameter in nn_module.named_parameters():
        full = store.param_name(parameter)
        # A module inside the one that was registered has a digest of its own.
        if full is not None and full.endswith(local):
            return full[: len(full) - len(local)] + DIGEST, parameter
        return None, None
    return None, None


def make_contiguous(module: nn.Module) -> list[nn.Parameter]:
    """Lay the parameters of a module out in memory as Pyro's store needs them.

    The store trains a copy of a parameter that is not contiguous, such as the matrix of the host's
    ``InvertibleAffine(use_lu=False)``, and the module never learns.

    Args:
        module: The module.

    Returns:
        The parameters that were not contiguous.

    Examples:
        >>> import normflows as nf
        >>> layer = nf.flows.InvertibleAffine(3, use_lu=False)
        >>> len(make_contiguous(layer)), layer.W.is_contiguous()
        (1, True)
    """
    moved = [p for p in module.parameters() if not p.is_contiguous()]
    for parameter in moved:
        parameter.data = parameter.data.contiguous()
    return moved

"""Keeping trained modules: whole in a file of ours, or by halves in Pyro's parameter store."""

from __future__ import annotations

import hashlib
import os
import warnings
from typing import Any

import pyro
import torch
from pyro.infer.autoguide.guides import AutoGuide
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn

from ..checkpoints import load_checkpoint, save_checkpoint
from ..errors import CheckpointError, ParamStoreWarning
from .layers import make_contiguous

__all__ = ["load", "module", "save"]

_DIGEST = "digest_of_buffers"


def save(trained: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a guide, transform or model to one safetensors file: parameters and buffers.

    Args:
        trained: What to save; an autoguide has parameters after its first call or ``build``.
        path: File to write, completely or not at all.

    Raises:
        CheckpointError: If its folder does not exist.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(nn.Linear(2, 1), os.path.join(folder, "a.safetensors"))
        ...     load(nn.Linear(2, 1), os.path.join(folder, "a.safetensors"))
    """
    _check_built(trained)
    save_checkpoint(trained, path)


def load(
    trained: nn.Module,
    path: str | os.PathLike[str],
    map_location: str | torch.device | None = None,
) -> None:
    """Read what :func:`save` wrote into a module of the same structure.

    Args:
        trained: What to load into; call ``guide.build(*args)`` on a fresh autoguide before.
        path: File to read.
        map_location: Device to read to, by default the CPU; the module keeps its own.

    Raises:
        CheckpointError: If the file is no checkpoint, damaged or of another module, or if a guide
            has no parameters yet.
    """
    _check_built(trained)
    load_checkpoint(trained, path, map_location)


def module(name: str, nn_module: nn.Module, update_module_params: bool = False) -> nn.Module:
    """Register a module's parameters with Pyro, as ``pyro.module`` does, and watch its buffers.

    Pyro's parameter store keeps parameters only. A stack with random permutations or masks that
    takes its parameters from a loaded store, in a process with another seed, has another density
    and says nothing. This function leaves a digest of the buffers in the store, compares, and
    warns. It is better to :func:`save` the module.

    Args:
        name: Name in the store.
        nn_module: The module.
        update_module_params: Whether parameters that are in the store already replace the
            module's.

    Returns:
        The module.

    Warns:
        ParamStoreWarning: If the store's parameters come from a module with other buffers, if
            that cannot be told, or if they are in the store and not taken over.

    Examples:
        >>> layer = module("layer", nn.Linear(2, 1))
        >>> "layer$$$weight" in pyro.get_param_store()
        True
    """
    store: Any = pyro.get_param_store()
    make_contiguous(nn_module)
    digest = _digest(nn_module)
    key = param_with_module_name(name, _DIGEST)
    if _comes_from_store(store, name, nn_module):
        _warn_if_different(name, digest, store, key, update_module_params)
    elif digest is not None:
        store[key] = digest
    registered: nn.Module = pyro.module(name, nn_module, update_module_params)
    return registered


def _comes_from_store(store: Any, name: str, nn_module: nn.Module) -> bool:
    """Whether the store has parameters by these names that are not the module's own."""
    for parameter_name, parameter in nn_module.named_parameters():
        kept = store._params.get(param_with_module_name(name, parameter_name))
        if kept is not None and kept is not parameter:
            return True
    return False


def _warn_if_different(
    name: str, digest: Tensor | None, store: Any, key: str, update_module_params: bool
) -> None:
    reason = None
    if not update_module_params:
        reason = (
            "has parameters in Pyro's parameter store that are not those of this module, which "
            "goes on with its own. Pass update_module_params=True to take them over"
        )
    elif digest is not None and key not in store:
        reason = (
            "takes its parameters from Pyro's parameter store, which keeps no buffers: its "
            "permutations and masks may differ from those it was trained with"
        )
    elif digest is not None and not torch.equal(store[key], digest):
        reason = (
            "takes its parameters from Pyro's parameter store, but they were trained with other "
            "buffers (permutations, masks, normalisations), so that its density is another one"
        )
    if reason is not None:
        warnings.warn(
            f"Module {name!r} {reason}. Save and restore whole modules by nfp.save and nfp.load, "
            "or by state_dict.",
            ParamStoreWarning,
            stacklevel=3,
        )


def _digest(nn_module: nn.Module) -> Tensor | None:
    """Two numbers that tell the buffers of a module from others, or None if it has none."""
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


def _check_built(trained: nn.Module) -> None:
    if isinstance(trained, AutoGuide) and trained.prototype_trace is None:
        raise CheckpointError(
            f"{type(trained).__name__} has no parameters before its first call. Call "
            "guide.build(*args) with what the model takes, or run the guide once."
        )

"""Trained modules, kept whole in a file or without their buffers in Pyro's parameter store."""

from __future__ import annotations

import os
from typing import Any

import pyro
import torch
from pyro.infer.autoguide.guides import AutoGuide
from pyro.params.param_store import param_with_module_name
from torch import nn

from ...checkpoints import load_checkpoint, on_a_model, save_checkpoint
from ...checks import check_flag, check_module, describe
from ...errors import CheckpointError, OptionError
from .buffers import digest_of, make_contiguous, warn_of_store, watch_buffers
from .taken_names import DIGEST, names_are_free, refuse_taken_names, trains_now

_NOT_TAKEN = (
    "has parameters in Pyro's parameter store that are not those of this module, which goes on "
    "with its own. Pass update_module_params=True to take them over"
)
_UNKNOWN = (
    "takes its parameters from Pyro's parameter store, which keeps no buffers: its permutations "
    "and masks may differ from those it was trained with"
)


@on_a_model
def save(trained: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a guide, transform or model to one safetensors file: parameters and buffers.

    Args:
        trained: Module to save; an autoguide has parameters after its first call or ``build``.
        path: File to write, completely or not at all.

    Raises:
        CheckpointError: If the file cannot be written.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(nn.Linear(2, 1), os.path.join(folder, "a.safetensors"))
        ...     load(nn.Linear(2, 1), os.path.join(folder, "a.safetensors"))
    """
    _check_built(trained)
    _check_path(path)
    save_checkpoint(trained, path)


@on_a_model
def load(
    trained: nn.Module,
    path: str | os.PathLike[str],
    map_location: str | torch.device | None = None,
) -> None:
    """Read a file that :func:`save` wrote into a module of the same structure and options.

    Args:
        trained: Module to load into; call ``guide.build(*args)`` on a fresh autoguide before.
        path: File to read.
        map_location: Device to read to, by default the CPU; the module keeps its own.

    Raises:
        CheckpointError: If the file is no checkpoint, damaged or of another module, or if a guide
            has no parameters yet. A guide of other sites, or of the same in another order, is
            another module.

    Warns:
        CheckpointWarning: If options of the training differ.
    """
    _check_built(trained)
    _check_path(path)
    load_checkpoint(trained, path, map_location)


def module(name: str, nn_module: nn.Module, update_module_params: bool = False) -> nn.Module:
    """Register a module's parameters with Pyro, as ``pyro.module`` does, and watch its buffers.

    Pyro's parameter store keeps parameters only. A stack with random permutations or masks that
    takes its parameters from a loaded store, in a process with another seed, silently has another
    density. A digest of the buffers in the store shows the difference, and there is a warning. Our
    distributions and transforms watch their buffers by themselves; this function also says where
    parameters were not taken over, or came without a digest. Prefer to :func:`save` the module.

    Names of a module that is gone, as in a notebook's cell that is run twice, are taken over.
    Names of a living module are not, and a training step that would give its parameters to the
    optimiser in place of this module's is refused.

    Args:
        name: Name in the store.
        nn_module: The module.
        update_module_params: Whether parameters that are in the store already replace the
            module's.

    Returns:
        The module.

    Raises:
        RegistrationError: In a training step, if other parameters have its names.

    Warns:
        ParamStoreWarning: If the store's parameters come from a module with other buffers, if
            nothing tells whether they do, or if they are in the store and not taken over.

    Examples:
        >>> linear = module("linear", nn.Linear(2, 1))
        >>> "linear$$$weight" in pyro.get_param_store()
        True
    """
    if not isinstance(name, str) or not name or "$$$" in name:
        raise OptionError(
            f"name must be a string, not empty and without '$$$', got {describe(name)}. Give the "
            "module one of its own."
        )
    check_module(nn_module, "nn_module", "Pass the module, not its class.")
    update_module_params = check_flag(update_module_params, "update_module_params")
    make_contiguous(nn_module)
    store: Any = pyro.get_param_store()
    free = update_module_params or names_are_free(nn_module, param_with_module_name(name, ""))
    if _comes_from_store(store, name, nn_module):
        if not free and trains_now():
            refuse_taken_names(nn_module, name)
        elif not free:
            warn_of_store(name, _NOT_TAKEN)
        elif (
            digest_of(nn_module) is not None and param_with_module_name(name, DIGEST) not in store
        ):
            warn_of_store(name, _UNKNOWN)
    registered: nn.Module = pyro.module(name, nn_module, update_module_params)
    watch_buffers(nn_module)
    return registered


def _comes_from_store(store: Any, name: str, nn_module: nn.Module) -> bool:
    """Whether the store has parameters by these names that are not the module's own."""
    return any(
        store._params.get(param_with_module_name(name, local), parameter) is not parameter
        for local, parameter in nn_module.named_parameters()
    )


def _check_path(path: Any) -> None:
    if not isinstance(path, str | os.PathLike):
        raise OptionError(
            f"path must be a string or os.PathLike, got {describe(path)}. Write e.g. "
            "'guide.safetensors'."
        )


def _check_built(trained: Any) -> None:
    check_module(trained, "trained", "Pass a guide, a transform or a model.")
    if isinstance(trained, AutoGuide) and trained.prototype_trace is None:
        raise CheckpointError(
            f"{type(trained).__name__} has no parameters before its first call. Call "
            "guide.build(*args) with what the model takes, or run the guide once."
        )

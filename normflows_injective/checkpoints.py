"""Weights as one safetensors file with a JSON header; nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from contextlib import suppress
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ._version import __version__
from .errors import CheckpointError

__all__ = ["load_checkpoint", "save_checkpoint"]

_KEY = "normflows_injective"


def save_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's state to one safetensors file, completely or not at all.

    The header holds, as JSON, the package version, the class of every submodule, shape and dtype
    of every tensor, a checksum, and what a module declares by a dictionary ``checkpoint_options``
    of numbers and strings without which its weights mean something else. The file is written under
    a temporary name and renamed.

    Args:
        model: Module to save.
        path: File to write.

    Raises:
        CheckpointError: If its folder does not exist, or the model is sharded over processes.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(nn.Linear(2, 1), os.path.join(folder, "a.safetensors"))
        ...     os.listdir(folder)
        ['a.safetensors']
    """
    _refuse_sharded(
        model,
        "On every rank call torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
        "options=StateDictOptions(full_state_dict=True, cpu_offload=True)); on rank 0 load the "
        "result into a model that is not sharded, and save that.",
    )
    # Cloned, because safetensors refuses tensors that share memory (tied weights).
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    header = {"version": __version__, "checksum": _checksum(state), **_description(model, state)}
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise CheckpointError(f"The folder {folder} does not exist. Create it before saving.")
    temporary = f"{os.fspath(path)}.{secrets.token_hex(4)}.part"
    try:
        with open(temporary, "xb") as file:
            file.write(save(state, metadata={_KEY: json.dumps(header)}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    map_location: str | torch.device | None = None,
) -> None:
    """Read a model's state, after checking all of it; on an error the model is as it was.

    Args:
        model: Module of the same structure as the one saved; dtype and device may differ.
        path: File to read.
        map_location: Device to read the tensors to before they are copied into the model; by
            default the CPU.

    Raises:
        CheckpointError: If the file is missing, no checkpoint, truncated, altered, or of another
            model; the message names the first difference. Also if the model is sharded.

    Examples:
        >>> load_checkpoint(nn.Linear(2, 1), "missing.safetensors")
        Traceback (most recent call last):
            ...
        normflows_injective.errors.CheckpointError: missing.safetensors does not exist.
    """
    _refuse_sharded(model, "Load the weights before fully_shard.")
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise CheckpointError(
            f"{name} {'is no file' if os.path.exists(name) else 'does not exist'}."
        )
    try:
        with safe_open(name, framework="pt", device=str(map_location or "cpu")) as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{name} is not a readable safetensors file ({error}). It is truncated or of another "
            "format; pickled files are never read."
        ) from error
    except RuntimeError as error:
        raise CheckpointError(f"{name} cannot be read to {map_location}: {error}") from error
    if _KEY not in metadata:
        raise CheckpointError(
            f"{name} is a safetensors file, but was not written by normflows_injective: its "
            f"header lacks the entry {_KEY!r}."
        )
    try:
        header = json.loads(metadata[_KEY])
        checksum = header["checksum"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{name} has a damaged header ({error!r}).") from error
    if _checksum(state) != checksum:
        raise CheckpointError(
            f"{name} has been altered: its tensors do not have the checksum of its header. "
            "Restore the file from where it was saved."
        )
    expected = _description(model, model.state_dict())
    for part in ("classes", "shapes", "options"):
        _compare(name, part, header.get(part, {}), expected[part])
    model.load_state_dict(state)


def _refuse_sharded(model: nn.Module, remedy: str) -> None:
    for key, parameter in model.named_parameters():
        # What a DTensor has and a tensor has not; torch may be built without distributed.
        if hasattr(parameter, "full_tensor"):
            raise CheckpointError(
                f"{key} is sharded over processes, so this one has only a part of it. {remedy}"
            )


def _description(model: nn.Module, state: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    return {
        "classes": {key: type(module).__name__ for key, module in model.named_modules()},
        "shapes": {key: list(tensor.shape) for key, tensor in state.items()},
        "dtypes": {key: str(tensor.dtype) for key, tensor in state.items()},
        "options": {
            f"{key}.{name}" if key else name: value
            for key, module in model.named_modules()
            for name, value in getattr(module, "checkpoint_options", {}).items()
        },
    }


def _compare(name: str, part: str, saved: Any, expected: dict[str, Any]) -> None:
    if saved == expected:
        return
    saved = saved if isinstance(saved, dict) else {}
    for key in [*expected, *saved]:
        if saved.get(key) != expected.get(key):
            raise CheckpointError(
                f"{name} belongs to another model: of the {part}, {key or 'the model'!r} is "
                f"{saved.get(key, 'absent')} in the file and {expected.get(key, 'absent')} here. "
                "Build the model as it was when saved."
            )


def _checksum(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

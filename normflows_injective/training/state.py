"""The whole state of a training in one file, from which it goes on as if it had never stopped."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch

from .._version import __version__
from ..checkpoints.files import name_of, read_file, replace_file
from ..checkpoints.format import parse, write_content
from ..checkpoints.tree import flatten, unflatten
from ..errors import CheckpointError


def save_state(path: str | os.PathLike[str], **parts: Any) -> None:
    """Write the state of a training, completely or not at all.

    Model, optimiser, scheduler and all else with a ``state_dict`` are saved by it; tensors,
    numbers, strings, and lists, tuples and dictionaries of them as they are. The states of torch's
    random numbers go along, on the CPU and on all CUDA devices that are in use.

    Args:
        path: File to write, in the safetensors format with a JSON header.
        parts: What to save, by name.

    Raises:
        CheckpointError: If a part holds something else, or the file cannot be written.

    References:
        The format: :func:`normflows_injective.InjectiveNormalizingFlow.save`.

    Examples:
        >>> import tempfile
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.Adam([weight])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "run.safetensors")
        ...     save_state(path, optimizer=optimizer, step=3)
        ...     load_state(path, optimizer=optimizer)
        {'step': 3}
    """
    states = {name: _state_of(part) for name, part in parts.items()}
    write_tree(path, {"random": random_states(), "parts": states})


def load_state(path: str | os.PathLike[str], **parts: Any) -> dict[str, Any]:
    """Read a training into its model, optimiser and so on, and go on with its random numbers.

    torch's global random states become those of the file.

    Args:
        path: File that :func:`save_state` has written.
        parts: What has a ``load_state_dict``, by the names under which it was saved.

    Returns:
        The parts that are not given, by name.

    Raises:
        CheckpointError: If the file is missing, damaged or of another kind, or if a part is not in
            it or does not fit.

    References:
        The format: :func:`normflows_injective.InjectiveNormalizingFlow.save`.

    Examples:
        See :func:`save_state`.
    """
    name, tree = name_of(path), read_tree(path)
    if not isinstance(tree, dict) or set(tree) != {"random", "parts"}:
        raise CheckpointError(f"{name} holds no training that save_state has written.")
    saved: dict[str, Any] = tree["parts"]
    for key, part in parts.items():
        if key not in saved:
            raise CheckpointError(f"{name} has no part {key!r}: it has {sorted(saved)}.")
        try:
            part.load_state_dict(saved[key])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{key} of {name} does not fit: {error}") from error
    set_random_states(tree["random"])
    return {key: value for key, value in saved.items() if key not in parts}


def write_tree(path: str | os.PathLike[str], tree: Any) -> None:
    """Write a tree of tensors and plain values to a file, completely or not at all."""
    structure, tensors = flatten(tree)
    header = {"version": __version__, "tree": structure}
    replace_file(path, partial(write_content, header=header, state=tensors))


def read_tree(path: str | os.PathLike[str]) -> Any:
    """The tree of a file."""
    name = name_of(path)
    header, tensors = parse(read_file(path), name)
    try:
        return unflatten(header["tree"], tensors)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{name} holds no training. save() writes weights alone; save_state and fit do more."
        ) from error


def random_states() -> dict[str, Any]:
    """States of torch's random numbers on the CPU and on CUDA devices in use."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": devices}


def set_random_states(states: dict[str, Any]) -> None:
    """Set torch's random numbers to former states."""
    torch.set_rng_state(states["cpu"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


def _state_of(part: Any) -> Any:
    return part.state_dict() if hasattr(part, "state_dict") else part

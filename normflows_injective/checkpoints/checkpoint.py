"""Saving and loading a model's state, after everything has been compared."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._version import __version__
from ..checks import level_of_caller
from ..errors import CheckpointError, CheckpointWarning
from .files import name_of, read_file, replace_file
from .format import CODES, parse, write_content
from .options import Difference, differences, options_of

P = ParamSpec("P")
R = TypeVar("R")


def on_a_model(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse, by name, a call of ``save`` or ``load`` on a class rather than on a model."""

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if not any(isinstance(value, nn.Module) for value in (*args[:1], *kwargs.values())):
            raise CheckpointError(
                "A file holds the weights of a model, not its layers, so save() and load() need "
                "a model that has been built. Build the model as it was when saved, and call "
                "model.load(path)."
            )
        return function(*args, **kwargs)

    return checked


@on_a_model
def save_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the weights to a safetensors file with a JSON header, completely or not at all.

    The header holds, as JSON, the package version, the class and options of every submodule, shape
    and dtype of every tensor, and a checksum. Options are all plain values in public attributes,
    and those in a dictionary ``checkpoint_options`` of a module. A link is followed, and
    permissions are kept. One tensor at a time is copied.

    Args:
        model: Module to save.
        path: File to write.

    Raises:
        CheckpointError: If the file cannot be written, its name belongs to no regular file, or the
            model is sharded over processes or holds something that is no ordinary tensor.

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
    state = _state_of(model)
    for key, tensor in state.items():
        if tensor.dtype not in CODES:
            raise CheckpointError(
                f"{key} is of {tensor.dtype}, which a safetensors file cannot hold. Convert it."
            )
    options = {path: each.values for path, each in options_of(model).items()}
    header = {"version": __version__, **_description(model, state), "values": options}
    replace_file(path, functools.partial(write_content, header=header, state=state))


@on_a_model
def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    map_location: str | torch.device | None = None,
) -> None:
    """Read weights into a model of the same structure, after all of them have been checked.

    Args:
        model: Module of the same structure and options as the one saved; dtype and device may
            differ.
        path: File to read.
        map_location: Device to read the tensors to before they are copied into the model; by
            default the CPU.

    Raises:
        CheckpointError: If the file is missing, no checkpoint, truncated, altered, or of another
            model; the message names the first difference. Also if the model is sharded. On an
            error the model is as it was.

    Warns:
        CheckpointWarning: If options differ on which the meaning of the weights does not depend,
            such as the weight of a training term.

    Examples:
        >>> load_checkpoint(nn.Linear(2, 1), "missing.safetensors")
        Traceback (most recent call last):
            ...
        normflows_injective.errors.CheckpointError: missing.safetensors does not exist.
    """
    _refuse_sharded(model, "Load the weights before fully_shard.")
    name = name_of(path)
    header, state = parse(read_file(path), name)
    added = _added(model, header)
    own = {
        key: tensor
        for key, tensor in _state_of(model).items()
        if key.rpartition(".")[0] not in added
    }
    expected = _description(model, own)
    for path in added:
        del expected["classes"][path]
    for part in ("classes", "shapes", "options"):
        _compare(name, part, header.get(part, {}), expected[part])
    free = _compare_values(name, header.get("values"), model)
    _check_tensors(name, state, own)
    _check_writable(own)
    if map_location is not None:
        state = _moved(name, state, map_location)
    _copy(name, model, state, own)
    if free:
        text = _free_differences(name, free)
        warnings.warn(text, CheckpointWarning, stacklevel=level_of_caller())


def _refuse_sharded(model: nn.Module, remedy: str) -> None:
    for key, parameter in model.named_parameters():
        # A DTensor has this method and a tensor has not; torch may be built without distributed.
        if hasattr(parameter, "full_tensor"):
            raise CheckpointError(
                f"{key} is sharded over processes, so this one has only a part of it. {remedy}"
            )


def _state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model, all of which must have values in memory."""
    state: dict[str, Tensor] = dict(model.state_dict())
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{key} is no tensor but {type(tensor).__name__}, which comes from "
                "get_extra_state. Keep what the module needs in buffers."
            )
        if is_lazy(tensor):
            raise CheckpointError(f"{key} has no shape yet. Call the model once with data before.")
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            kind = "on the meta device" if tensor.is_meta else "sparse or quantised"
            raise CheckpointError(
                f"{key} is {kind}, and files hold dense tensors. Convert it, or give it memory "
                "by model.to_empty(device=...)."
            )
    return state


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


def _added(model: nn.Module, header: dict[str, Any]) -> set[str]:
    """Paths of modules that a file lacks, and may lack because older releases had none."""
    classes = header.get("classes")
    known = classes if isinstance(classes, dict) else {}
    return {
        path
        for path, module in model.named_modules()
        if getattr(type(module), "is_optional_in_files", False) and path not in known
    }


def _compare(name: str, part: str, saved: Any, expected: dict[str, Any]) -> None:
    saved = saved if isinstance(saved, dict) else {}
    for key in [*expected, *saved]:
        if saved.get(key) != expected.get(key):
            raise CheckpointError(
                f"{name} belongs to another model: of the {part}, {key or 'the model'!r} is "
                f"{saved.get(key, 'absent')} in the file and {expected.get(key, 'absent')} here. "
                "Build the model as it was when saved."
            )


def _compare_values(name: str, saved: Any, model: nn.Module) -> list[Difference]:
    """Raise if an option differs that matters, and return the other differences."""
    if saved is None:  # as in files of version 0.1.0
        return []
    try:
        different = list(differences(saved, options_of(model)))
    except (AttributeError, TypeError, KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{name} has a damaged header ({error!r}).") from error
    for one in different:
        if one.matters:
            kind = type(model.get_submodule(one.module)).__name__
            raise CheckpointError(
                f"{name} belongs to another model: the option {one.option!r} of "
                f"{one.module or 'the model'!r} ({kind}) is {one.saved!r} in the file and "
                f"{one.here!r} here. Build the model as it was when saved. If the weights do not "
                f"depend on it, list it in an attribute {kind}.may_differ = {{...}}."
            )
    return different


def _free_differences(name: str, free: list[Difference]) -> str:
    lines = [
        f"{one.option!r} of {one.module or 'the model'!r} is {one.saved!r} in the file and "
        f"{one.here!r} here"
        for one in free
    ]
    return (
        f"The weights of {name} are loaded, but options differ that were in use when they were "
        f"saved: {'; '.join(lines)}. The model keeps its own. Set them as they were to continue "
        "in the same way."
    )


def _check_tensors(name: str, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Compare the tensors themselves with the model, for a header may say anything about them."""
    for key in [*own, *state]:
        if key not in state or key not in own:
            raise CheckpointError(
                f"{name} is damaged: its header fits the model, but {key} is missing "
                f"{'in its tensors' if key not in state else 'in the model'}."
            )
        if state[key].shape != own[key].shape or _kind(state[key]) != _kind(own[key]):
            raise CheckpointError(
                f"{name} is damaged: its header fits the model, but {key} is {state[key].dtype} "
                f"of shape {tuple(state[key].shape)} in the file and {own[key].dtype} of shape "
                f"{tuple(own[key].shape)} in the model."
            )
    first: dict[tuple[Any, ...], str] = {}
    for key, tensor in own.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        twin = first.setdefault(place, key) if tensor.numel() else key
        if not torch.equal(state[key], state[twin]) and not _both_nan(state[key], state[twin]):
            raise CheckpointError(
                f"{name} belongs to another model: {twin} and {key} are one tensor here, and two "
                "in the file. Build the model as it was when saved."
            )


def _both_nan(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and bool(
        ((first == second) | (first.isnan() & second.isnan())).all()
    )


def _kind(tensor: Tensor) -> tuple[bool, ...]:
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype is torch.bool


def _moved(
    name: str, state: dict[str, Tensor], map_location: str | torch.device
) -> dict[str, Tensor]:
    try:
        device = torch.device(map_location)
        return {key: tensor.to(device) for key, tensor in state.items()}
    # torch raises AssertionError where it was built without a kind of device.
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise CheckpointError(f"{name} cannot be read to {map_location}: {error}") from error


def _copy(name: str, model: nn.Module, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Copy a state that fits, or leave the model as it was.

    A backup doubles the memory, so it is made only where copying could fail: where a module has
    loading code of its own.
    """
    backup = {key: tensor.clone() for key, tensor in own.items()} if any(_loaders(model)) else {}
    try:
        model.load_state_dict(state)
    except BaseException as error:
        with torch.no_grad():
            for key, tensor in backup.items():
                own[key].copy_(tensor)
        if not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"{name} fits the model, but cannot be copied into it: {error} The model is as it was."
        ) from error


def _loaders(model: nn.Module) -> Iterator[bool]:
    """Whether code other than torch's and ours runs while a state is loaded."""
    yield _is_foreign(type(model).load_state_dict)
    for module in model.modules():
        yield _is_foreign(type(module)._load_from_state_dict)
        hooks = module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks
        yield any(_is_foreign(hook) for table in hooks for hook in table.values())


def _is_foreign(function: object) -> bool:
    package = str(getattr(function, "__module__", "")).partition(".")[0]
    return package not in ("torch", "normflows_injective")


def _check_writable(own: dict[str, Tensor]) -> None:
    """Refuse tensors into which torch copies nothing, or half before it raises."""
    for key, tensor in own.items():
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise CheckpointError(
                f"{key} was made under torch.inference_mode, so it cannot be written to. Build "
                "the model outside of it."
            )
        if any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
            raise CheckpointError(
                f"{key} is an expanded tensor, whose elements share their memory. Make it "
                "contiguous before loading."
            )

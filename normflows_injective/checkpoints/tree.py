"""Nested dictionaries, lists and tuples of tensors and plain values, as JSON and tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import CheckpointError


def flatten(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """The structure of a tree as JSON, and its tensors by their place in it."""
    tensors: dict[str, Tensor] = {}
    return _flattened(tree, "state", tensors), tensors


def unflatten(structure: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree of a structure and tensors."""
    if isinstance(structure, list):
        return [unflatten(value, tensors) for value in structure]
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    return _KINDS[kind](content, tensors)


# What JSON cannot tell apart or has no word for; keys of its objects would be strings alone.
_KINDS: dict[str, Callable[[Any, dict[str, Tensor]], Any]] = {
    "tensor": lambda name, tensors: tensors[name],
    "number": lambda text, _: float(text),
    "tuple": lambda values, tensors: tuple(unflatten(value, tensors) for value in values),
    "dict": lambda pairs, tensors: {key: unflatten(value, tensors) for key, value in pairs},
}


def _flattened(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[place] = value
        return {"tensor": place}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"number": str(float(value))}
    if isinstance(value, (list, tuple)):
        values = [_flattened(item, f"{place}.{i}", tensors) for i, item in enumerate(value)]
        return {"tuple": values} if isinstance(value, tuple) else values
    if isinstance(value, dict) and all(isinstance(key, (str, int)) for key in value):
        pairs = value.items()
        return {"dict": [[key, _flattened(v, f"{place}.{key}", tensors)] for key, v in pairs]}
    raise CheckpointError(
        f"{place} is {type(value).__name__}, which a file cannot hold. Keep tensors, numbers, "
        "strings, and lists, tuples and dictionaries of them."
    )

"""The safetensors format, read from memory and written tensor by tensor.

Eight bytes hold the length of a JSON table of dtypes, shapes and places; the table and the tensors
follow. The table's ``__metadata__`` holds our own header, a second piece of JSON, with a checksum
of names, dtypes, shapes and bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError

_KEY = "normflows_injective"
_METADATA = "__metadata__"
_NO_CHECKSUM = "0" * 64
_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
# Not every release of torch has all of them.
_DTYPES = {code: getattr(torch, name) for code, name in _NAMES.items() if hasattr(torch, name)}
# The format's names of dtypes.
CODES = {dtype: code for code, dtype in _DTYPES.items()}


def write_content(file: IO[bytes], header: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write a header of JSON and tensors by name to a binary file that can seek.

    One tensor at a time is copied.
    """
    table: dict[str, Any] = {}
    end = 0
    # Wide dtypes first, so that every tensor is aligned.
    for key in sorted(state, key=lambda key: (-state[key].element_size(), key)):
        tensor = state[key]
        start, end = end, end + tensor.numel() * tensor.element_size()
        table[key] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    # The checksum is known after the tensors are written, and as long as its placeholder.
    prefix = _table_bytes(header, table, _NO_CHECKSUM)
    file.write(prefix)
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().to("cpu", copy=True).resolve_conj().resolve_neg()
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        digest.update(_title(key, tensor.dtype, tensor.shape))
        digest.update(raw)
        file.seek(len(prefix) + table[key]["data_offsets"][0])
        file.write(raw)
    file.seek(0)
    file.write(_table_bytes(header, table, digest.hexdigest()))


def parse(content: bytearray, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header of the bytes of a file and its tensors by name, or raise CheckpointError.

    The header comes without its checksum. The tensors share the memory of the bytes.
    """
    try:
        table, start = _read_table(content)
        places = _places(table, len(content) - start)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{name} is not a readable safetensors file ({error}). It is truncated or of another "
            "format; pickled files are never read."
        ) from error
    header = _own_header(table, name)
    if _checksum(content, start, places) != header.pop("checksum"):
        raise CheckpointError(
            f"{name} has been altered: its tensors do not have the checksum of its header. "
            "Restore the file from where it was saved."
        )
    return header, {key: _view(content, start, place) for key, place in places.items()}


class _Place(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def _title(key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    return f"{key} {dtype} {tuple(shape)} ".encode()


def _table_bytes(header: Mapping[str, Any], table: dict[str, Any], checksum: str) -> bytes:
    metadata = {_KEY: json.dumps({**header, "checksum": checksum}, allow_nan=False)}
    text = json.dumps({_METADATA: metadata, **table}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_table(content: bytearray) -> tuple[dict[str, Any], int]:
    """Return the table of a file, and the place where its tensors start."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8:
        raise ValueError(f"it holds {len(content)} bytes, where a file begins with eight")
    if length > len(content) - 8:
        raise ValueError(f"a table of {length} bytes does not fit into {len(content)}")
    table = json.loads(content[8 : 8 + length].decode())
    if not isinstance(table, dict):
        raise TypeError("the table is no JSON object")
    return table, 8 + length


def _places(table: dict[str, Any], length: int) -> dict[str, _Place]:
    """Return the places of the tensors, which must fill the data without gap or overlap."""
    places: dict[str, _Place] = {}
    for key, entry in table.items():
        if key == _METADATA:
            continue
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        start, end = entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
            raise ValueError(f"shape and place of {key} are no whole numbers")
        if end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{key} does not have the size of its shape")
        places[key] = _Place(dtype, tuple(shape), start, end)
    last = 0
    for place in sorted(places.values(), key=lambda place: (place.start, place.end)):
        if place.start != last:
            raise ValueError(f"there is a gap or an overlap at byte {last} of the tensors")
        last = place.end
    if last != length:
        raise ValueError(f"the tensors have {length} bytes rather than {last}")
    return places


def _own_header(table: dict[str, Any], name: str) -> dict[str, Any]:
    metadata = table.get(_METADATA)
    if not isinstance(metadata, dict) or _KEY not in metadata:
        raise CheckpointError(
            f"{name} is a safetensors file, but was not written by normflows_injective: its "
            f"header lacks the entry {_KEY!r}."
        )
    try:
        header = json.loads(metadata[_KEY])
        if not isinstance(header, dict) or "checksum" not in header:
            raise ValueError("no object with a checksum")
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{name} has a damaged header ({error!r}).") from error
    return header


def _checksum(content: bytearray, start: int, places: dict[str, _Place]) -> str:
    digest = hashlib.sha256()
    with memoryview(content) as view:
        for key in sorted(places):
            place = places[key]
            digest.update(_title(key, place.dtype, place.shape))
            digest.update(view[start + place.start : start + place.end])
    return digest.hexdigest()


def _view(content: bytearray, start: int, place: _Place) -> Tensor:
    if place.start == place.end:
        return torch.empty(place.shape, dtype=place.dtype)
    raw = torch.frombuffer(
        content, dtype=torch.uint8, count=place.end - place.start, offset=start + place.start
    )
    if place.dtype is torch.bool:  # Every byte but zero means true, whoever wrote it.
        return (raw != 0).reshape(place.shape)
    if raw.data_ptr() % place.dtype.itemsize:
        raw = raw.clone()
    return raw.view(place.dtype).reshape(place.shape)

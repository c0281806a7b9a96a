"""The options of a model on which the meaning of its weights depends.

No layer has to list them. Every plain value in a public attribute of a module is recorded:
numbers, strings, names of functions, tensors that are neither parameters nor in the state, and all
of these in lists, dictionaries, dataclasses and objects of this package. Attributes of torch,
devices, dtypes and objects of other packages are left out. A class lists options on which its
weights do not depend, such as a weight of the training loss, in an attribute ``may_differ``.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import math
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import RenamedAttribute

# Attributes of every module, of the place where it runs, and of the start of Pyro's guides.
_NO_OPTIONS = frozenset(vars(nn.Module())) | {
    "create_plates",
    "device",
    "dtype",
    "init_loc_fn",
    "inplace",
    "master",
    "may_differ",
    "plates",
}
# How a layer treats points for which its map is not defined.
_POLICIES = frozenset({"off_manifold"})
_LIBRARIES = frozenset({"torch", "normflows", "pyro", "normflows_injective"})
_MAY_DIFFER_IN_TORCH: tuple[tuple[type[nn.Module], frozenset[str]], ...] = (
    (nn.modules.dropout._DropoutNd, frozenset({"p"})),
    (nn.modules.batchnorm._NormBase, frozenset({"momentum"})),
)
_DEPTH = 8
# Classes of estimators by the names that older files have for them.
_ESTIMATORS = {
    "Decoder": "DecoderSurrogate",
    "Encoder": "EncoderSurrogate",
    "OnManifold": "OnManifoldSurrogate",
}
# Numbers of numpy by the kind of their dtype.
_SCALARS: dict[str, Any] = {"b": bool, "i": int, "u": int, "f": float, "c": complex}


class Options(NamedTuple):
    """The options of one module.

    ``values`` has plain values by the name of the attribute, or by ``attribute.part``, and
    ``renamed`` the present names of attributes by the old ones that older files have.
    """

    values: dict[str, Any]
    may_differ: frozenset[str]
    arguments: AbstractSet[str]
    renamed: Mapping[str, str]
    is_of_library: bool


class Difference(NamedTuple):
    """One option that differs between a file and a model, and whether weights depend on it."""

    module: str
    option: str
    saved: Any
    here: Any
    matters: bool


_ABSENT = "absent"


def options_of(model: nn.Module) -> dict[str, Options]:
    """Return the options of every submodule that has any, by its path."""
    options: dict[str, Options] = {}
    free: set[str] = set()
    modules = dict(model.named_modules())
    for path, module in modules.items():
        parent, _, child = path.rpartition(".")
        names = _may_differ(module)
        if path and (parent in free or child in _may_differ(modules[parent])):
            free.add(path)
        values: dict[str, Any] = {}
        soft: set[str] = set()
        for name, value in _attributes(module):
            for key, plain, differs in _described(name, value, 0):
                values[key] = plain
                if path in free or name in names or differs:
                    soft.add(key)
        if values:
            kind, may_differ = type(module), frozenset(soft)
            arguments, is_of_library = _constructor_names(kind), _root(kind) in _LIBRARIES
            options[path] = Options(values, may_differ, arguments, _renamed(kind), is_of_library)
    return options


def differences(
    saved: Mapping[str, Mapping[str, Any]], here: Mapping[str, Options]
) -> Iterator[Difference]:
    """Yield the options that differ between a file and a model of the same classes.

    An attribute that one side lacks is passed over where the class comes from a library, whose
    next release may have it. In other classes it is reported, but does not matter.
    """
    nothing = Options({}, frozenset(), frozenset(), {}, True)
    for path in dict.fromkeys([*here, *saved]):
        options = here.get(path, nothing)
        old = {
            options.renamed.get(name, name): _present_value(name, value)
            for name, value in saved.get(path, {}).items()
        }
        for name in dict.fromkeys([*options.values, *old]):
            values = old.get(name, _ABSENT), options.values.get(name, _ABSENT)
            if name in options.values and name in old:
                fills_later = _is_table_or_none(*values) and name not in options.arguments
                if not (_equal(*values) or fills_later):
                    yield Difference(path, name, *values, name not in options.may_differ)
            elif not options.is_of_library:
                yield Difference(path, name, *values, False)


def _present_value(name: str, value: Any) -> Any:
    """Return a value of a file, with the present name of a class that was renamed."""
    is_class = name == "estimator" and isinstance(value, str)
    return _ESTIMATORS.get(value, value) if is_class else value


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield attributes that may be options, and buffers outside of the state."""
    for name, value in vars(module).items():
        # normflows keeps a buffer X as an attribute X_cpu too.
        is_copy = name.endswith("_cpu") and name[:-4] in module._buffers
        if name not in _NO_OPTIONS and not is_copy and _is_public(name, module):
            yield name, value
    # The sites of Pyro's guides, whose order is that of the coordinates.
    sites = vars(module).get("_unconstrained_shapes")
    if isinstance(sites, Mapping):
        yield "sites", [[str(name), list(shape)] for name, shape in sites.items()]
    for name in sorted(module._non_persistent_buffers_set):
        if not name.startswith("_"):
            yield name, module._buffers.get(name)


def _is_public(name: str, module: nn.Module) -> bool:
    """Whether an attribute is public, or holds an argument of the constructor."""
    if not name.startswith("_"):
        return True
    if _root(type(module)) in _LIBRARIES:
        return False
    return name[1:] in _constructor_names(type(module))


def _constructor_names(kind: Any) -> AbstractSet[str]:
    code = getattr(kind.__init__, "__code__", None)
    if code is None:
        return frozenset()
    return frozenset(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


def _renamed(kind: type) -> dict[str, str]:
    members = (member for base in kind.__mro__ for member in vars(base).items())
    return {name: at.new for name, at in members if isinstance(at, RenamedAttribute)}


def _may_differ(thing: object) -> frozenset[str]:
    names = _POLICIES
    for kind in type(thing).__mro__:
        names |= frozenset(vars(kind).get("may_differ", ()))
    if isinstance(thing, nn.Module):
        names |= frozenset(vars(thing).get("may_differ", ()))
    for kind, free in _MAY_DIFFER_IN_TORCH:
        if isinstance(thing, kind):
            names |= free
    return names


def _described(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any, bool]]:
    """Yield the plain values of an attribute and its parts, and whether they may differ."""
    plain = _plain(value)
    if plain is not _NOTHING:
        yield name, plain, False
        return
    parts = None if depth > _DEPTH else _parts(value)
    if parts is None:
        return
    yield name, _class_name(value), False
    names = _may_differ(value)
    for key, part in parts:
        for inner, described, differs in _described(f"{name}.{key}", part, depth + 1):
            yield inner, described, differs or key in names


_NOTHING = object()


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, or ``_NOTHING``."""
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, complex | slice | range):
        return str(value)
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, Tensor) or hasattr(value, "__array_interface__"):
        return _numbers(value)
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        items = [_plain(item) for item in value]
        return _NOTHING if any(item is _NOTHING for item in items) else items
    if isinstance(value, AbstractSet):
        return sorted(repr(item) for item in value if isinstance(item, bool | int | float | str))
    return _NOTHING


def _parts(value: Any) -> list[tuple[str, Any]] | None:
    """Return names and values of the parts of a compound, or None if it is not looked into."""
    if isinstance(value, partial):
        arguments = dict(enumerate(value.args)) | value.keywords
        return [("function", value.func), *((str(key), part) for key, part in arguments.items())]
    if isinstance(value, FunctionType):
        return _captured(value)
    if isinstance(value, MethodType | BuiltinFunctionType):
        return []
    if isinstance(value, Mapping):
        return [(str(key), part) for key, part in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, list | tuple):
        return [(str(index), part) for index, part in enumerate(value)]
    if dataclasses.is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, nn.Module) or not _is_looked_into(value):
        return None
    return [(key, part) for key, part in vars(value).items() if not key.startswith("_")]


def _is_looked_into(value: Any) -> bool:
    ours = any(_root(kind) == "normflows_injective" for kind in type(value).__mro__)
    return hasattr(value, "__dict__") and (
        ours or isinstance(value, torch.distributions.Distribution)
    )


def _captured(function: FunctionType) -> list[tuple[str, Any]]:
    """Return numbers and functions that a function has captured, and its defaults."""
    code = function.__code__
    parts = list(zip(code.co_freevars, function.__closure__ or (), strict=True))
    cells = [(name, cell.cell_contents) for name, cell in parts if _is_filled(cell)]
    defaults = function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    defaulted = [*zip(names, defaults, strict=True), *(function.__kwdefaults__ or {}).items()]
    # Anything else that it sees, such as data or a whole model, is no option of it.
    return [
        (name, part)
        for name, part in (*cells, *defaulted)
        if isinstance(part, bool | int | float | str | FunctionType) and part is not function
    ]


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _class_name(value: Any) -> str:
    if isinstance(value, FunctionType | MethodType):
        # Where a function was written down is no matter; two lambdas have one name.
        return value.__qualname__.rpartition("<locals>.")[2]
    if isinstance(value, BuiltinFunctionType):
        return value.__name__
    return type(value).__name__


def _numbers(value: Any) -> Any:
    """Return numbers that tell a tensor from others, but not from itself in another dtype."""
    if not isinstance(value, Tensor):
        scalar = _SCALARS.get(getattr(getattr(value, "dtype", None), "kind", "O"))
        if scalar is None:
            return _NOTHING
        if not value.shape:
            return _plain(scalar(value))
        value = torch.as_tensor(value.copy())
    shape = list(value.shape)
    if value.is_meta or value.layout != torch.strided or value.is_quantized:
        return {"shape": shape}
    if not value.dim() and not value.is_complex():
        return _plain(value.item())
    flat = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    flat = flat.detach().to("cpu").flatten()
    if not flat.is_floating_point() or bool((flat == flat.round()).all() & flat.isfinite().all()):
        whole = flat.to(torch.int64).numpy()
        return {"shape": shape, "digest": hashlib.sha256(whole.data).hexdigest()[:16]}
    flat = flat.double()
    weights = torch.arange(1, len(flat) + 1, dtype=torch.float64).cos()
    finite = flat.nan_to_num(0.0, 0.0, 0.0)
    codes = flat.isnan().double() + 2 * flat.isposinf() + 3 * flat.isneginf()
    sums = [float(part @ weights) for part in (finite, codes)]
    return {"shape": shape, "sums": [*sums, float(finite.norm())]}


def _equal(saved: Any, here: Any) -> bool:
    if isinstance(saved, dict) and isinstance(here, dict):
        return _equal_numbers(saved, here)
    if isinstance(saved, list) and isinstance(here, list):
        return len(saved) == len(here) and all(map(_equal, saved, here))
    if isinstance(saved, float) and isinstance(here, float):
        # A number that was computed may differ by rounding on another processor.
        return math.isclose(saved, here, rel_tol=1e-12)
    return bool(saved == here)


def _equal_numbers(saved: dict[str, Any], here: dict[str, Any]) -> bool:
    if "sums" not in saved or "sums" not in here:
        return saved == here or {*saved} != {*here} == {"shape"}
    # Tables that were computed in float32 and in float64 are one.
    scale = max(float(here["sums"][-1]), 1e-30)
    return saved["shape"] == here["shape"] and all(
        abs(old - new) <= 1e-5 * scale
        for old, new in zip(saved["sums"], here["sums"], strict=True)
    )


def _is_table_or_none(saved: Any, here: Any) -> bool:
    """Whether one is None and the other a tensor: a table that is filled at the first call."""
    return (saved is None and isinstance(here, dict)) or (here is None and isinstance(saved, dict))


def _root(kind: type) -> str:
    return kind.__module__.partition(".")[0]

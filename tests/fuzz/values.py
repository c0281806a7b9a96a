"""What a fuzzer puts in place of a valid argument, and whether that must be refused or taken."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from normflows_injective.checks import is_number


class Value(NamedTuple):
    """A value with its label; ``verdict`` is "bad" (refuse), "good" (take) or "may" (either)."""

    label: str
    value: Any
    verdict: str


class Returns(nn.Module):
    """A network that gives the same thing whatever comes."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.what(*args) if callable(self.what) else self.what


class Opaque:
    """An object of no known kind."""


def wrong_types() -> list[Value]:
    """Values that fit no argument of the package."""
    values = {"dict": {"a": 1}, "object": Opaque(), "complex": 2j, "bytes": b"ab", "set": {1}}
    return [Value(label, value, "bad") for label, value in values.items()]


def in_place_of(valid: Any, optional: bool, kind: str | None = None) -> list[Value]:
    """Values to put in place of a valid one, chosen by its kind."""
    kind = kind or kind_of(valid)
    values = wrong_types() + BY_KIND[kind](valid)
    if kind not in ("anything", "context"):
        values.append(Value("None", None, "may" if optional else "bad"))
    return values


def kind_of(valid: Any) -> str:
    """The kind of argument that a valid value shows."""
    if isinstance(valid, bool):
        return "flag"
    if isinstance(valid, int):
        return "count"
    if isinstance(valid, Tensor) and valid.dim() == 0:
        return "level"
    if is_number(valid):
        return "real"
    if isinstance(valid, str):
        return "choice"
    if isinstance(valid, Tensor) and valid.dtype == torch.bool:
        return "mask"
    if isinstance(valid, Tensor):
        return "batch" if valid.is_floating_point() else "labels"
    if isinstance(valid, nn.Module):
        return "module"
    if isinstance(valid, list | tuple) and all(isinstance(v, nn.Module) for v in valid):
        return "modules"
    if isinstance(valid, list | tuple) and all(is_number(v) for v in valid):
        return "counts" if all(isinstance(v, int) for v in valid) else "reals"
    if callable(valid):
        return "function"
    return "anything"


def _count(valid: int) -> list[Value]:
    return [
        *_bad(text="3", list=[3], bool=True, fraction=2.5, whole_float=float(valid), nan=np.nan),
        *_bad(inf=np.inf, negative=-1, huge=10**30, vector=torch.ones(2), module=nn.Identity()),
        *_may(zero=0, one=1, other=valid + 1, three=3),
        *_good(numpy=np.int64(valid), numpy32=np.int32(valid), tensor=torch.tensor(valid)),
    ]


def _column(valid: int) -> list[Value]:
    """In place of the index of a column; a module is a function of the context."""
    return [value for value in _count(valid) if value.label != "module"]


def _schedule(valid: float) -> list[Value]:
    """In place of a number for all steps; a module is a function of the step."""
    return [*(value for value in _real(valid) if value.label != "module"), *_bad(a_class=Opaque)]


def _real(valid: float) -> list[Value]:
    return [
        *_bad(text="1", list=[1.0], bool=True, nan=np.nan, vector=torch.ones(2)),
        *_bad(module=nn.Identity()),
        *_may(zero=0, negative=-1.0, inf=np.inf, large=1e30, small=1e-30, other=2 * valid),
        *_good(numpy=np.float64(valid), numpy32=np.float32(valid), tensor=torch.tensor(valid)),
    ]


def _level(valid: Tensor) -> list[Value]:
    return [
        *_bad(text="1", list=[1.0], bool=True, module=nn.Identity()),
        *_may(zero=0 * valid, negative=-valid, inf=valid / 0, vector=valid.expand(3)),
        *_may(float64=valid.double(), integer=valid.long(), meta=valid.to("meta"), number=2.0),
    ]


def _flag(valid: bool) -> list[Value]:
    return [
        *_bad(text="yes", list=[], number=2, fraction=0.5, nan=np.nan, vector=torch.ones(2)),
        *_may(other=not valid),
        *_good(numpy=np.bool_(valid)),
    ]


def _choice(valid: str) -> list[Value]:
    return _bad(text="nonsense", empty="", number=3, bool=True, list=[valid], tensor=torch.ones(1))


def _counts(valid: Any) -> list[Value]:
    first = tuple(valid)[1:]
    return [
        *_bad(text="ab", bool=True, zero=(0, *first), negative=(-1, *first), nested=[[8]]),
        *_bad(fraction=(2.5, *first), boolean=(True, *first), none=(None, *first), nan=np.nan),
        *_bad(huge=(10**30, *first), texts=("8", *first), module=nn.Identity()),
        *_may(one=valid[0], empty=(), shorter=first, longer=(*valid, valid[0])),
        *_may(other=tuple(v + 1 for v in valid), reversed=tuple(reversed(valid))),
        *_good(list=list(valid), numpy=np.array(valid), numpy_each=tuple(map(np.int64, valid))),
    ]


def _window(valid: Any) -> list[Value]:
    """In place of the first and the last step of a window, which may begin at once."""
    return [value for value in _counts(valid) if value.label != "zero"]


def _reals(valid: Any) -> list[Value]:
    first = tuple(valid)[1:]
    return [
        *_bad(text="ab", bool=True, nan=(np.nan, *first), none=(None, *first), module=nn.Tanh()),
        *_bad(texts=("8", *first), complex_each=(2j, *first)),
        *_may(empty=(), shorter=first, longer=(*valid, valid[0]), reversed=valid[::-1]),
        *_may(one=valid[0], negative=(-1.0, *first), inf=(np.inf, *first)),
        *_good(list=list(valid)),
    ]


def _tensor(x: Tensor) -> list[Value]:
    return [
        *_bad(text="ab", bool=True, number=1.0, list=[[1.0]], numpy=x.detach().numpy()),
        *_bad(complex_dtype=x.to(torch.complex64), module=nn.Identity()),
        *(_bad(sparse=x.detach().to_sparse()) if x.dim() else []),
    ]


def _table(x: Tensor) -> list[Value]:
    """As a batch, where arrays and data frames are taken as well."""
    others = [value for value in _batch(x) if value.label != "numpy"]
    return [*others, *_good(numpy=x.detach().numpy())]


def _shapes(x: Tensor) -> list[Value]:
    if x.dim() < 2:
        return _may(empty=x[:0] if x.dim() else x, extra=x[None], other=torch.ones(3, 2).to(x))
    return _may(
        scalar=x.flatten()[0],
        vector=x[0],
        flat=x.flatten(),
        extra=x[:, None],
        extra_last=x[..., None],
        empty=x[:0],
        none_wide=x[..., :0],
        one_row=x[:1],
        wider=torch.cat([x, x[..., :1]], -1),
        narrower=x[..., :-1],
        transposed=x.transpose(0, -1).contiguous(),
        strided=torch.stack([x, x], -1)[..., 0],
    )


def _batch(x: Tensor) -> list[Value]:
    nan, inf = x.clone(), x.clone()
    nan.view(-1)[0], inf.view(-1)[0] = np.nan, np.inf
    return [
        *_tensor(x),
        *_shapes(x),
        *_bad(integers=x.long(), booleans=x > 0),
        *_may(float64=x.double(), float16=x.half(), bfloat16=x.bfloat16(), nan=nan, inf=inf),
        *_may(zeros=x * 0, negative=-x, scaled=100 * x, meta=x.to("meta"), large=1e30 * x),
        *_may(needs_gradient=x.detach().clone().requires_grad_()),
    ]


def _labels(x: Tensor) -> list[Value]:
    values = [*_tensor(x), *_shapes(x), *_may(negative=-x - 1, large=x + 100, booleans=x > 0)]
    values += _may(int32=x.int(), uint8=x.to(torch.uint8), meta=x.to("meta"))
    return [*values, *_may(floats=x.float())]


def _mask(x: Tensor) -> list[Value]:
    values = [*_tensor(x), *_shapes(x), *_bad(floats=x.float()), *_may(integers=x.long())]
    return [*values, *_may(other=~x, all_missing=x & False, meta=x.to("meta"))]


def _context(x: Tensor | None) -> list[Value]:
    if x is None:
        rows = torch.randn(4, 2)
        return _may(superfluous=rows, text="ab", list=[1.0], number=1.0, vector=rows[0])
    return [
        *_tensor(x),
        *_shapes(x),
        *_may(none=None, integers=x.long(), float64=x.double(), meta=x.to("meta")),
        *_may(more_rows=torch.cat([x, x])),
    ]


def _sum(x: Any, *args: Any, **kwargs: Any) -> Any:
    """A scalar whatever comes: what a function of the caller raises by itself comes through."""
    return x.sum() if isinstance(x, Tensor) else torch.ones(())


def _function(valid: Any) -> list[Value]:
    return [
        *_bad(text="ab", number=1.0, bool=True, list=[valid], a_class=Opaque),
        *_may(gives_none=lambda *a, **k: None, gives_text=lambda *a, **k: "ab"),
        *_may(gives_number=lambda *a, **k: 1.0, gives_less=lambda x, *a, **k: x[:0]),
        *_may(gives_scalar=_sum, gives_same=lambda x, *a, **k: x),
        *_may(gives_list=lambda x, *a, **k: [x], no_arguments=lambda: None),
    ]


def _module(valid: nn.Module) -> list[Value]:
    return [
        *_bad(text="ab", number=1.0, bool=True, list=[1], a_class=type(valid), function=abs),
        *_may(identity=nn.Identity(), linear=nn.Linear(3, 3), gives_none=Returns(None)),
        *_may(gives_less=Returns(lambda x, *a: x[:0]), gives_text=Returns("ab"), pair=[valid] * 2),
    ]


def _modules(valid: Any) -> list[Value]:
    return [
        *_bad(text="ab", number=1.0, bool=True, functions=[abs], numbers=[1, 2], nones=[None]),
        *_bad(a_class=[nn.Linear]),
        *_may(empty=[], one=valid[0], twice=[*valid, *valid], tuple=tuple(valid)),
        *_may(networks=[nn.Linear(3, 3)], reversed=list(reversed(valid))),
    ]


def _anything(valid: Any) -> list[Value]:
    return _bad(text="nonsense", number=3.5, list=[1])


def _axes(x: Tensor) -> list[Value]:
    return [
        *_bad(text="ab", bool=True, number=1.0, complex_dtype=x.to(torch.complex64)),
        *_bad(sparse=x.to_sparse(), module=nn.Identity(), ragged=[[1.0], [1.0, 2.0]]),
        *_bad(nan=torch.full_like(x, np.nan), empty=x[:0], texts=["a", "b", "c"]),
        *_may(zeros=0 * x, negative=-x, integers=x.long(), booleans=x > 0, extra=x[None]),
        *_may(inf=x / 0, scalar=x.flatten()[0], one=x[:1], float64=x.double()),
        *_good(list=x.tolist(), numpy=x.numpy()),
    ]


def _column_of(x: Tensor) -> list[Value]:
    """In place of a column of numbers, which may be a tensor, an array, a list or a number."""
    sparse = _bad(sparse=x.to_sparse()) if x.dim() else []
    return [
        *_bad(text="ab", bool=True, complex_dtype=x.to(torch.complex64), booleans=x > 0),
        *_bad(module=nn.Identity(), ragged=[[1.0], [1.0, 2.0]], texts=["a"], bytes=b"ab"),
        *_bad(nan=torch.full_like(x, np.nan), inf=torch.full_like(x, np.inf), nones=[None]),
        *sparse,
        *_shapes(x),
        *_may(number=1.0, integers=x.long(), float16=x.half(), bfloat16=x.bfloat16()),
        *_may(zeros=x * 0, negative=-x, scaled=100 * x, meta=x.to("meta"), large=1e30 * x),
        *_may(float64=x.double(), needs_gradient=x.detach().clone().requires_grad_()),
        *_good(list=x.tolist(), numpy=x.numpy()),
    ]


def _groups(valid: Any) -> list[Value]:
    return [
        *_bad(text="ab", number=1, flat=[0, 1], texts=[["a"]], fractions=[[0.5]], nan=[[np.nan]]),
        *_bad(bool=True, negative=[[-1]], nones=[None], module=nn.Identity(), overlap=[[0], [0]]),
        *_may(empty=[], empties=[[]], gap=[[0], [2]], tensors=[torch.tensor([0])]),
        *_good(tuples=tuple(map(tuple, valid)), numpy=[np.array(group) for group in valid]),
    ]


def _bad(**values: Any) -> list[Value]:
    return [Value(label, value, "bad") for label, value in values.items()]


def _may(**values: Any) -> list[Value]:
    return [Value(label, value, "may") for label, value in values.items()]


def _good(**values: Any) -> list[Value]:
    return [Value(label, value, "good") for label, value in values.items()]


BY_KIND = {
    "count": _count,
    "column": _column,
    "real": _real,
    "schedule": _schedule,
    "level": _level,
    "flag": _flag,
    "choice": _choice,
    "counts": _counts,
    "window": _window,
    "reals": _reals,
    "batch": _batch,
    "table": _table,
    "labels": _labels,
    "context": _context,
    "mask": _mask,
    "function": _function,
    "module": _module,
    "modules": _modules,
    "axes": _axes,
    "numbers": _column_of,
    "groups": _groups,
    "anything": _anything,
}


def tensors_in(result: Any) -> list[Tensor]:
    """All tensors of a result, those of tuples, lists and dictionaries too."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, tuple | list):
        return [tensor for part in result for tensor in tensors_in(part)]
    return []


def pick(rng: random.Random, values: list[Value]) -> Value:
    """One value; those that must be refused or taken come more often."""
    sure = [value for value in values if value.verdict != "may"]
    return rng.choice(sure if sure and rng.random() < 0.5 else values)

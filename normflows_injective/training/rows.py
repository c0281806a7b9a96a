"""Data for training: rows in memory, each with its context and its weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..checks import check_finite, check_same_rows
from ..checks.tensors import check_dense
from ..errors import DtypeError, ShapeError
from ..models.loss_terms import mean_loss
from ..models.parts import dtype_of

_REMEDY = "Turn categories into numbers, fill gaps, or leave these columns out."


@dataclass(frozen=True)
class Rows:
    """Data (N, *), and one row of context and one weight for each, where there are any."""

    x: Tensor
    context: Tensor | None = None
    weights: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of rows N."""
        return self.x.shape[0]

    @property
    def mass(self) -> float:
        """Sum of the weights."""
        return float(self.count if self.weights is None else self.weights.double().sum())

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """Data, context, and weights where there are any, as modules of losses take them."""
        parts = (self.x, self.context, self.weights)
        return parts[:2] if self.weights is None else parts

    def take(self, index: Tensor | slice) -> Rows:
        """Rows by an index (n,) or a slice."""
        parts = (self.x, self.context, self.weights)
        return Rows(*(None if part is None else part[index] for part in parts))  # type: ignore[arg-type]

    def split(self, size: int) -> Iterator[Rows]:
        """Consecutive parts of at most so many rows."""
        for start in range(0, self.count, size):
            yield self.take(slice(start, start + size))

    def to(self, like: Tensor, with_labels: bool) -> Rows:
        """Rows on the device of a tensor and in its dtype, in which labels stay whole numbers."""
        x = self.x.to(like.device) if with_labels else self.x.to(like)
        others = (self.context, self.weights)
        return Rows(x, *(None if part is None else in_kind(part, like) for part in others))


def read_rows(data: Any, context: Any = None, weights: Any = None) -> Rows:
    """Rows of a tensor, an array, a data frame or a loader, all of whose values are finite.

    A loader, or another iterable of batches, is read once; its batches are tensors of data, or
    pairs of data and context.
    """
    if not hasattr(data, "shape") and isinstance(data, Iterable):
        data, in_batches = _read_batches(data)
        context = in_batches if context is None else context
    x = tensor_of(data, "data")
    if x.dim() < 2 or x.shape[0] < 2:
        raise ShapeError(
            f"data must have at least two rows, shape (N, ...), got {tuple(x.shape)}. One column "
            "alone has the shape (N, 1)."
        )
    parts = {"context": context, "weights": weights}
    others = {k: tensor_of(v, k) for k, v in parts.items() if v is not None}
    check_same_rows(data=x, **others)
    for name, tensor in {"data": x, **others}.items():
        check_finite(tensor, name, "Drop or fill these rows before training.")
    rows = Rows(x, others.get("context"), others.get("weights"))
    if rows.weights is not None:
        # By the check of the losses, before a phase begins.
        mean_loss(torch.zeros(rows.count), rows.weights)
    return rows


def tensor_of(values: Any, name: str) -> Tensor:
    """The tensor of a tensor, an array or a data frame of numbers."""
    columns = getattr(values, "columns", None)
    if hasattr(values, "to_numpy"):
        values = values.to_numpy()
    if isinstance(values, np.ndarray):
        values = _plain_array(values, name, columns)
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DtypeError(
            f"{name} must hold numbers, got {type(values).__name__} ({error}). {_REMEDY}"
        ) from error
    check_dense(tensor, name)
    return tensor.detach()


def example_of(model: nn.Module) -> Tensor:
    """An empty tensor of the device and the dtype in which a model computes."""
    modules = list(model.modules())
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    return torch.empty(0, dtype=dtype_of(modules, []), device=device)


def _plain_array(values: NDArray[Any], name: str, columns: Any) -> NDArray[Any]:
    """An array of numbers that a tensor may share, also of a frame with columns of many types."""
    if values.dtype != object:
        return values if values.flags.writeable else values.copy()
    parts = values.T if values.ndim == 2 else [values]
    numbers = []
    for index, part in enumerate(parts):
        try:
            numbers.append(part.astype(np.float64))
        except (TypeError, ValueError) as error:
            label = index if columns is None else columns[index]
            raise DtypeError(
                f"{name} must hold numbers, but column {label} does not ({error}). {_REMEDY}"
            ) from error
    return np.stack(numbers, -1) if values.ndim == 2 else numbers[0]


def in_kind(tensor: Tensor, like: Tensor) -> Tensor:
    """A context on the device and in the dtype of a tensor, in which labels stay whole numbers."""
    return tensor.to(like) if tensor.is_floating_point() else tensor.to(like.device)


def _read_batches(loader: Iterable[Any]) -> tuple[Tensor, Tensor | None]:
    batches = [batch if isinstance(batch, (tuple, list)) else (batch,) for batch in loader]
    if not all(getattr(part, "ndim", 0) for batch in batches for part in batch):
        raise DtypeError(
            f"data must be a tensor, an array, a data frame or a loader of batches, got "
            f"{type(loader).__name__}. Turn lists of numbers into a tensor."
        )
    if not batches:
        raise ShapeError("data has no batches. Give a tensor, an array or a loader of rows.")
    parts = zip(*batches, strict=True)
    columns = [torch.cat([torch.as_tensor(batch) for batch in part]) for part in parts]
    if len(columns) > 2:
        raise ShapeError(
            f"The batches of data have {len(columns)} parts each: expected x, or (x, context)."
        )
    return columns[0], columns[1] if len(columns) == 2 else None

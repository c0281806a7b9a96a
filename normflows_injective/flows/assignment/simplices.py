r"""Products of simplices: assignments, their logits, and orthonormal coordinates of these.

A row of weights :math:`W_i` on :math:`c_i` classes is the softmax of logits :math:`V_i` of sum
zero. Rows of fewer classes than the largest are padded with zeros, which stay zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad

from ...checks import (
    check_count,
    check_counts,
    check_event_shape,
    check_same_rows,
    checks_arguments_of,
    is_number,
)
from ...errors import DtypeError, OptionError, ShapeError
from ..surfaces.simplex_coordinates import isometric_coordinates, isometric_logits


@checks_arguments_of
@final
class Simplices(nn.Module):
    r"""The product of :math:`n` open simplices of :math:`c_i` classes: the assignment manifold.

    Logits :math:`V` have shape :math:`(B, n, c)` with :math:`c = \max_i c_i`, rows of sum zero,
    and are identified with coordinates :math:`m = Q^\top V` in :math:`\mathbb R^d`,
    :math:`d = \sum_i (c_i - 1)`, where :math:`Q` is orthonormal. Products with :math:`Q` are
    running sums, so everything here costs :math:`O(n c)`.

    Args:
        num_variables: :math:`n`.
        num_classes: :math:`c_i \ge 2`, one number for all variables or one for each.

    Raises:
        OptionError: If a number is out of range, or ``num_classes`` has another length.

    References:
        Boll et al., arXiv 2406.04527, section 2.

    Examples:
        >>> simplices = Simplices(2, [2, 3])
        >>> simplices.dim, simplices.weights(torch.zeros(1, 2, 3))
        (3, tensor([[[0.5000, 0.5000, 0.0000],
                 [0.3333, 0.3333, 0.3333]]]))
    """

    def __init__(self, num_variables: int, num_classes: int | Sequence[int]) -> None:
        super().__init__()
        self.class_counts = class_counts(num_variables, num_classes)
        self.num_variables, self.max_classes = num_variables, max(self.class_counts)
        self.dim = sum(self.class_counts) - num_variables
        self.is_ragged = min(self.class_counts) < self.max_classes
        counts = torch.tensor(self.class_counts).unsqueeze(1)
        classes = torch.arange(self.max_classes)
        is_coordinate = classes[:-1] < counts - 1
        places = torch.full(is_coordinate.shape, self.dim)
        places[is_coordinate] = torch.arange(self.dim)
        # Integers only, which keep their digits when the module is cast.
        self.counts = nn.Buffer(counts, persistent=False)
        self.valid = nn.Buffer(classes < counts, persistent=False)
        self.class_places = nn.Buffer(self.valid.flatten().nonzero()[:, 0], persistent=False)
        exponents = (counts - 1 - classes[:-1]).clamp_min(1)
        self._exponents = nn.Buffer(exponents, persistent=False)
        self._places = nn.Buffer(places, persistent=False)
        positions = is_coordinate.flatten().nonzero()[:, 0]
        self._positions = nn.Buffer(positions, persistent=False)

    def mean_free(self, v: Tensor) -> Tensor:
        """Subtract from rows (*, n, c) their means over the classes, and clear the padding."""
        self._check_classes(v)
        if not self.is_ragged:
            return v - v.mean(-1, keepdim=True)
        # Not by a product, which would leave infinite values or NaN in the padding.
        padded = v.masked_fill(~self.valid, 0)
        return (padded - padded.sum(-1, keepdim=True) / self.counts) * self.valid

    def log_weights(self, v: Tensor) -> Tensor:
        """Logarithms (*, n, c) of the softmax of logits, minus infinity in the padding."""
        return self._restricted(v).log_softmax(-1)

    def weights(self, v: Tensor) -> Tensor:
        r"""Weights :math:`W = \mathrm{softmax}\, V`, (*, n, c), zero in the padding."""
        return self._restricted(v).softmax(-1)

    def replicator(self, weights: Tensor, v: Tensor) -> Tensor:
        r"""The derivative of the softmax, :math:`R_W[V] = W \odot (V - \langle W, V\rangle)`."""
        self._check_classes(v)
        if weights.shape != v.shape:
            raise ShapeError(
                f"weights must have the shape {tuple(v.shape)} of v, got {tuple(weights.shape)}. "
                "Repeat weights or vectors that all samples share."
            )
        return weights * (v - (weights * v).sum(-1, keepdim=True))

    def corner_norms(self, like: Tensor) -> Tensor:
        r"""Norms :math:`\lVert \Pi e_k \rVert = \sqrt{1 - 1/c_i}` of the corners, (n, 1)."""
        return (1 - 1 / self.counts.to(like)).sqrt()

    def corners(self, labels: Tensor, like: Tensor) -> Tensor:
        r"""Unit vectors :math:`u_\beta = \Pi e_\beta / \lVert \Pi e_\beta \rVert`, (*, n, c)."""
        if labels.shape[-1:] != (self.num_variables,):
            raise ShapeError(
                f"labels must have shape (*, {self.num_variables}), one for every variable, got "
                f"{tuple(labels.shape)}."
            )
        return self.mean_corner(one_hot(labels, self.max_classes).to(like))

    def mean_corner(self, weights: Tensor) -> Tensor:
        r"""The mean :math:`\sum_k W_k u_k` of the unit vectors, (*, n, c)."""
        return self.mean_free(weights) / self.corner_norms(weights)

    def round(self, v: Tensor) -> Tensor:
        """The class of largest logit in every row, (*, n)."""
        return self._restricted(v).argmax(-1)

    def to_coordinates(self, v: Tensor) -> Tensor:
        r"""Coordinates :math:`Q^\top V`, (B, d), of logits (B, n, c)."""
        check_event_shape(v, self.valid.shape, "v")
        if self.is_ragged:
            v = v * self.valid
        rows = isometric_coordinates(v, self._exponents.to(v.dtype)).flatten(1)
        return rows[:, self._positions] if self.is_ragged else rows

    def from_coordinates(self, m: Tensor) -> Tensor:
        r"""Logits :math:`Q m`, (B, n, c), of coordinates (B, d)."""
        check_event_shape(m, (self.dim,), "m")
        exponents = self._exponents.to(m.dtype)
        if self.is_ragged:
            return isometric_logits(pad(m, (0, 1))[:, self._places], exponents) * self.valid
        rows = m.view(m.shape[0], self.num_variables, self.max_classes - 1)
        return isometric_logits(rows, exponents)

    def coordinate_mask(self, mask: Tensor) -> Tensor:
        """Mask (B, d) of the coordinates that belong to variables of a mask (B, n)."""
        check_event_shape(mask, (self.num_variables,), "mask")
        rows = mask.unsqueeze(-1).expand(-1, -1, self.max_classes - 1).flatten(1)
        return rows[:, self._positions]

    @property
    def num_classes(self) -> tuple[int, ...]:
        """Number of classes of every variable."""
        return self.class_counts

    def check_labels(self, labels: Tensor, mask: Tensor | None) -> Tensor:
        """Return labels (B, n) as long integers, zero where a mask (B, n) says they are missing.

        Raises:
            DtypeError: If the labels are no tensor of integers, or the mask is not of booleans.
            ShapeError: If they or the mask have another shape.
            OptionError: If a label is negative or not below its number of classes.
        """
        one_hot = (self.num_variables, self.max_classes)
        if labels.shape[1:] == one_hot:
            raise ShapeError(
                f"labels must have shape (B, {self.num_variables}), got {tuple(labels.shape)}. If "
                "these are one-hot rows, convert them with labels.argmax(-1)."
            )
        check_event_shape(labels, (self.num_variables,), "labels")
        if labels.is_floating_point():
            raise DtypeError(
                f"labels must be integers that count classes from 0, got {labels.dtype}. Convert "
                "them with labels.long()."
            )
        if len(labels) == 0:
            raise ShapeError("labels is an empty batch. Skip it, or let the loader drop it.")
        labels = labels.long()
        if mask is not None:
            if mask.shape != labels.shape:
                raise ShapeError(
                    f"mask must have the shape {tuple(labels.shape)} of the labels, got "
                    f"{tuple(mask.shape)}."
                )
            labels = labels.masked_fill(~mask, 0)
        outside = (labels < 0) | (labels >= self.counts[:, 0])
        if bool(outside.any()):
            row, variable = outside.nonzero()[0].tolist()
            raise OptionError(
                f"labels has {int(outside.sum())} of {labels.numel()} entries out of range, the "
                f"first at index [{row}, {variable}]: {int(labels[row, variable])}, where variable"
                f" {variable} has classes 0 to {self.class_counts[variable] - 1}. Count classes "
                "from 0, and give missing entries by mask=."
            )
        return labels

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        counts = self.class_counts if self.is_ragged else self.max_classes
        return f"num_variables={self.num_variables}, num_classes={counts}"

    def _check_classes(self, v: Tensor) -> None:
        if v.shape[-2:] != self.valid.shape:
            raise ShapeError(
                f"Tensors of classes must have shape (*, {self.num_variables}, {self.max_classes})"
                f", one number for every class of every variable, got {tuple(v.shape)}."
            )

    def _restricted(self, v: Tensor) -> Tensor:
        self._check_classes(v)
        return v.masked_fill(~self.valid, -torch.inf) if self.is_ragged else v


def check_shapes(simplices: Simplices, **batches: Tensor) -> None:
    """Raise ShapeError unless batches have the same B, and the shapes that belong to their names.

    Times ``t`` are (B,), ``labels`` and ``mask`` are (B, n), and all others (B, n, c).
    """
    for name, batch in batches.items():
        axes = {"t": 0, "labels": 1, "mask": 1}.get(name, 2)
        check_event_shape(batch, simplices.valid.shape[:axes], name)
    check_same_rows(**batches)


def class_counts(num_variables: int, num_classes: int | Sequence[int]) -> tuple[int, ...]:
    """Return a number of classes for every variable, or raise OptionError."""
    num_variables = check_count(num_variables, "num_variables")
    if is_number(num_classes):
        counts = (check_count(num_classes, "num_classes"),) * num_variables
    else:
        counts = check_counts(num_classes, "num_classes", example="[2, 3], or one integer")
    if len(counts) != num_variables:
        raise OptionError(
            f"num_classes must be one number or {num_variables}, one for every variable, got "
            f"{len(counts)}."
        )
    if min(counts) < 2:
        raise OptionError(
            f"Every variable needs at least two classes, got num_classes={num_classes!r}. Leave "
            "out variables that never vary."
        )
    return counts

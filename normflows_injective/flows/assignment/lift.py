"""Coordinates of logits to points of a product of simplices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import final

import torch
from torch import Tensor

from ...checks import check_choice
from ...errors import NonFiniteError, OffManifoldError
from ..surfaces.off_manifold import check_policy, closed_parts
from ..surfaces.surface import Chart
from .simplices import Simplices


@final
class SimplexLift(Chart):
    r"""The lift of coordinates to weights, :math:`m \mapsto W = \mathrm{softmax}(Q m)`.

    It maps :math:`\mathbb R^d`, :math:`d = \sum_i (c_i - 1)`, to :math:`n` simplices side by side,
    with :math:`\sum_i c_i` weights in all. Against the measure of the first :math:`c_i - 1`
    weights of every simplex, the log-volume is

    .. math:: \log\Big|\frac{dW}{dm}\Big|
              = \sum_i \Big(\sum_k \log W_{ik} + \tfrac12 \log c_i\Big) \quad \text{nats}.

    The measure ``"hausdorff"``, the area of each simplex, adds :math:`\tfrac12 \log c_i` for every
    simplex. For one simplex the lift is ``SimplexStickBreaking(c, kind="ilr")``. After
    ``AssignmentLayer`` it gives a density on simplices.

    Args:
        num_variables: :math:`n`.
        num_classes: :math:`c_i \ge 2`, one number for all variables or one for each.
        measure: ``"lebesgue"`` or ``"hausdorff"``.
        off_manifold: Treatment by :meth:`inverse` of simplices whose sum is not one within a
            relative 1e-4: ``"reject"`` raises, ``"project"`` divides by the sum. Weights that are
            not positive raise in both cases.

    Raises:
        OptionError: If an option is unknown or out of range.

    References:
        Isometric log-ratios: Egozcue et al., Mathematical Geology 35, 2003. The lift is that of
        arXiv 2406.04527 at the barycentre, in coordinates.

    Examples:
        >>> lift = SimplexLift(2, [2, 3])
        >>> lift(torch.zeros(1, 3))
        (tensor([[0.5000, 0.5000, 0.3333, 0.3333, 0.3333]]), tensor([-3.7863]))
    """

    def __init__(
        self,
        num_variables: int,
        num_classes: int | Sequence[int],
        measure: str = "lebesgue",
        off_manifold: str = "reject",
    ) -> None:
        super().__init__()
        check_policy(off_manifold)
        self.simplices = Simplices(num_variables, num_classes)
        self.measure = check_choice(measure, ("lebesgue", "hausdorff"), "measure")
        self.off_manifold = off_manifold
        counts = self.simplices.class_counts
        self.latent_shape, self.data_shape = (self.simplices.dim,), (sum(counts),)
        share = 0.5 if measure == "lebesgue" else 1.0
        self._log_factor = share * sum(math.log(count) for count in counts)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coordinates (B, d) to weights (B, sum of c_i), with the log-volume (B,) in nats."""
        logs = self._flat(self.simplices.log_weights(self.simplices.from_coordinates(z)))
        return logs.exp(), logs.sum(1) + self._log_factor

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights (B, sum of c_i) to coordinates (B, d), with minus the log-volume (B,)."""
        logs = self._closed(x).log()
        z = self.simplices.to_coordinates(self._padded(logs))
        return z, -(logs.sum(1) + self._log_factor)

    @property
    def num_variables(self) -> int:
        """Number of variables."""
        return self.simplices.num_variables

    @property
    def num_classes(self) -> tuple[int, ...]:
        """Number of classes of every variable."""
        return self.simplices.class_counts

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"measure={self.measure!r}, off_manifold={self.off_manifold!r}"

    def _closed(self, x: Tensor) -> Tensor:
        """Divide weights by the sums of their simplices, or raise if these are far from one."""
        if not self.simplices.is_ragged:
            rows = x.reshape(-1, self.simplices.max_classes)
            # If this raises, the loop below raises too, and names the simplex.
            with suppress(OffManifoldError, NonFiniteError):
                return closed_parts(rows, 1.0, self.off_manifold, "x").view_as(x)
        parts = x.split(self.simplices.class_counts, dim=1)
        closed = [
            closed_parts(part, 1.0, self.off_manifold, f"simplex {index} of x")
            for index, part in enumerate(parts)
        ]
        return torch.cat(closed, 1)

    def _flat(self, rows: Tensor) -> Tensor:
        """Flatten rows (B, n, c) to (B, sum of c_i), dropping the padding."""
        return rows.flatten(1)[:, self.simplices.class_places]

    def _padded(self, flat: Tensor) -> Tensor:
        """Pad (B, sum of c_i) to rows (B, n, c), with zeros after the classes."""
        rows = torch.zeros_like(flat[:, :1]).expand(-1, self.simplices.valid.numel())
        rows = rows.index_copy(1, self.simplices.class_places, flat)
        return rows.view(flat.shape[0], *self.simplices.valid.shape)

r"""Products of surfaces: every factor has its own columns, chart and measure.

The Jacobian of a product of charts is block diagonal, so that its log-volume is the sum of those
of the factors, and the measure is the product of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from ...checks import check_same_rows, describe
from ...errors import OffManifoldError, OptionError, ShapeError, UnsupportedLayerError
from ...host.calls import call_layer
from ...host.context import needs_context, takes_context
from ..injection import Injection
from .surface import Chart
from .torus import TorusChart


@final
class ProductSurface(Chart):
    r"""Several surfaces side by side.

    .. math:: (z_1, \dots, z_m) \mapsto (\varphi_1(z_1), \dots, \varphi_m(z_m)), \qquad
              \log\text{-volume} = \sum_j \log\text{-volume of } \varphi_j

    Densities are against the product of the factors' measures, which ``measures`` lists.
    ``ind_circ`` lists the coordinates that are angles. :meth:`rows` and :meth:`columns` go from a
    mapping of named arrays to rows and back.

    Args:
        factors: Charts with closed-form log-volumes, by name or in a sequence, whose names are
            their positions: :class:`TorusChart`, :class:`SphereChart`,
            :class:`SimplexStickBreaking`, charts of plain numbers, or an
            :class:`InjectiveComposite` of a chart and maps of its surface.

    Raises:
        OptionError: If there is no factor, or one is no injection.
        UnsupportedLayerError: If a factor has no closed form, or does not tell its shapes.

    References:
        The determinant of a block-diagonal matrix.

    Examples:
        >>> from normflows_injective.flows import SphereChart, TorusChart
        >>> product = ProductSurface({"wind": TorusChart(1), "place": SphereChart(3)})
        >>> product.latent_shape, product.data_shape, product.ind_circ
        ((3,), (4,), [0, 2])
        >>> x, log_volume = product(torch.zeros(1, 3))
        >>> {name: tuple(part.shape) for name, part in product.columns(x).items()}
        {'wind': (1,), 'place': (1, 3)}
    """

    def __init__(self, factors: Mapping[str, Injection] | Sequence[Injection]) -> None:
        super().__init__()
        if isinstance(factors, Mapping):
            self.names = tuple(map(str, factors))
            parts = list(factors.values())
        else:
            parts = list(factors)
            self.names = tuple(map(str, range(len(parts))))
        if not parts:
            raise OptionError("A product needs one factor at least. Give charts of surfaces.")
        for name, part in zip(self.names, parts, strict=True):
            _check_factor(name, part)
        self.factors = nn.ModuleList(parts)
        self._latent_sizes = [math.prod(part.latent_shape or ()) for part in parts]
        self._data_sizes = [width_of(part) or 0 for part in parts]
        self.latent_shape = (sum(self._latent_sizes),)
        self.data_shape = (sum(self._data_sizes),)
        starts = accumulate(self._latent_sizes, initial=0)
        self.ind_circ = [
            start + i for start, part in zip(starts, parts, strict=False) for i in angles_of(part)
        ]
        self.measures = {
            name: getattr(part, "measure", "hausdorff")
            for name, part in zip(self.names, parts, strict=True)
        }
        kinds = set(self.measures.values())
        self.measure = kinds.pop() if len(kinds) == 1 else "product"
        self.takes_context = any(map(takes_context, parts))
        self.needs_context = any(map(needs_context, parts))

    @property
    def coordinates(self) -> list[range]:
        """The latent coordinates of every factor."""
        bounds = accumulate(self._latent_sizes, initial=0)
        return [range(start, end) for start, end in pairwise(bounds)]

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coordinates (B, d) to rows (B, D), with the log-volume (B,) in nats."""
        return self._each("forward", z.split(self._latent_sizes, 1), context)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows (B, D) to coordinates (B, d), with minus the log-volume (B,) in nats."""
        return self._each("inverse", x.split(self._data_sizes, 1), context)

    def rows(self, columns: Mapping[str, Any]) -> Tensor:
        """Rows (N, D) of a mapping of named arrays, (N,) or (N, n) with the factor's n columns.

        Args:
            columns: A dictionary, or anything with ``[name]`` such as a data frame, whose columns
                are arrays, tensors or sequences. Others than those of the factors are left alone.

        Raises:
            OptionError: If a column is missing.
            ShapeError: If a column has another width than its factor, or another length.
        """
        parts = {}
        for name, size, factor in zip(self.names, self._data_sizes, self.factors, strict=True):
            try:
                values = columns[name]
            except (KeyError, IndexError, TypeError) as error:
                raise OptionError(
                    f"The data have no column {name!r}. The columns are {', '.join(self.names)}."
                ) from error
            part = torch.as_tensor(values if isinstance(values, Tensor) else np.asarray(values))
            part = part if part.is_floating_point() else part.to(torch.get_default_dtype())
            if part.dim() == 1 and size == 1:
                part = part.unsqueeze(1)
            if part.dim() != 2 or part.shape[1] != size:
                raise ShapeError(
                    f"The column {name!r} must have shape (N, {size}){' or (N,)' * (size == 1)}, "
                    f"got {tuple(part.shape)}."
                )
            # In the column's own dtype: many turns leave few digits of an angle in float32.
            parts[name] = factor.wrapped(part) if isinstance(factor, TorusChart) else part
        check_same_rows(**parts)
        return torch.cat(list(parts.values()), 1)

    def columns(self, x: Tensor) -> dict[str, Tensor]:
        """Named columns of rows (B, D): (B,) where a factor has one, (B, n) where it has n."""
        parts = x.split(self._data_sizes, 1)
        return {
            name: part.squeeze(1) if part.shape[1] == 1 else part
            for name, part in zip(self.names, parts, strict=True)
        }

    def extra_repr(self) -> str:
        """Names and measures as shown by ``print(model)``."""
        return ", ".join(f"{name}: {measure}" for name, measure in self.measures.items())

    def _each(
        self, method: str, parts: Sequence[Tensor], context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        images, log_volumes = [], []
        factors: Any = self.factors
        for name, factor, part in zip(self.names, factors, parts, strict=True):
            try:
                image, log_volume = call_layer(factor, method, part, context)
            except OffManifoldError as error:
                raise OffManifoldError(f"Column {name!r}: {error}") from error
            images.append(image)
            log_volumes.append(log_volume)
        return torch.cat(images, 1), torch.stack(log_volumes).sum(0)


def angles_of(chart: Any) -> list[int]:
    """The coordinates of a chart, or of the first layer of a composite, that are angles."""
    first = next(iter(getattr(chart, "flows", [])), chart)
    return list(getattr(first, "ind_circ", []))


def width_of(chart: Any) -> int | None:
    """The number of columns of a chart's surface, or None where it is not known."""
    if chart.data_shape is not None:
        return math.prod(chart.data_shape) if len(chart.data_shape) == 1 else None
    dim: int | None = chart.surface().dim
    return dim


def _check_factor(name: str, part: Any) -> None:
    if not isinstance(part, Injection):
        raise OptionError(
            f"The factor {name!r} must be a chart, for instance nfi.flows.SphereChart(3), got "
            f"{describe(part)}."
        )
    if not part.is_closed_form or len(part.latent_shape or ()) != 1 or width_of(part) is None:
        raise UnsupportedLayerError(
            f"The factor {name!r}, {type(part).__name__}, has no closed-form log-volume of rows "
            "of numbers, so it cannot stand beside others. Products are made of charts of known "
            "surfaces."
        )

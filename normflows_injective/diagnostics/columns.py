"""The columns of a table before a density is fitted to them: their defects, and the remedies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_event_shape, checks_arguments
from ..errors import ShapeError
from ..flows.standardise.columns import copies_of_rows, finite_columns
from ..flows.standardise.fitting import Window, window_of
from ..training.tables import Table, takes_tables

# Rounding to float32 gives continuous columns of a million rows ties in a few percent of them.
_TIED = 0.1
_DISCRETE = 20
_MANY_OUTSIDE = 0.01
# Gaps of a grid, in units of its width, are whole numbers up to this.
_OFF_GRID = 0.05
# A grid is coarse if fewer than some fifty of its values lie within a deviation. Finer ones are
# digits that were rounded away, which no network resolves.
_COARSE = 0.02
# A value stands out if so many of the rows have it, and so many times more than others.
_POINT_MASS, _REPEATED = 0.01, 5.0
_NAMED = 4
_MOST_ROWS = 10_000


class ColumnCheck(NamedTuple):
    """The properties of one column of a table.

    Attributes:
        name: Its name.
        num_distinct: Number of different values.
        tied_share: Share of rows whose value other rows have too.
        width: Smallest gap of tied values that lie on a grid, in units of the column; else 0.
        num_outside: Number of values beyond ten robust deviations from the median.
        copy_of: Name of an earlier column with the same values, or None.
        depends: Whether it is a linear function of earlier columns, copies included.
        remedies: What is remarkable about it, with what to do.
    """

    name: str
    num_distinct: int
    tied_share: float
    width: float
    num_outside: int
    copy_of: str | None
    depends: bool
    remedies: tuple[str, ...]

    @property
    def is_constant(self) -> bool:
        """Whether all values are one."""
        return self.num_distinct == 1

    @property
    def is_discrete(self) -> bool:
        """Whether there are few values, each of them in many rows."""
        return not self.is_constant and self.num_distinct <= _DISCRETE and self.tied_share > 0.5


@dataclass(frozen=True, eq=False, repr=False)
class ColumnReport:
    r"""Result of :func:`column_report`; ``print`` it, or :meth:`dequantise` by it.

    Attributes:
        columns: One :class:`ColumnCheck` per column.
        num_rows: Number of rows :math:`N`.
        num_duplicates: Number of rows that repeat an earlier one.
        rank: Dimension of the smallest plane that holds all rows, at most :math:`D`. A flow has
            at most as many latent dimensions, with a density on them.

    Examples:
        See :func:`column_report`.
    """

    columns: tuple[ColumnCheck, ...]
    num_rows: int
    num_duplicates: int
    rank: int

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        """The report as a table, with a line of words for all that needs care."""
        width = max(12, *(len(column.name) for column in self.columns))
        lines = [
            f"{self.num_rows} rows of {len(self.columns)} columns, rank {self.rank}, "
            f"{self.num_duplicates} duplicate rows",
            f"{'':{width}}{'distinct':>10}{'tied':>8}{'width':>11}{'outside':>9}",
        ]
        for column in self.columns:
            lines.append(
                f"{column.name:{width}}{column.num_distinct:>10}{column.tied_share:>8.0%}"
                f"{column.width:>11.3g}{column.num_outside:>9}"
            )
        owners: dict[str, list[str]] = {}
        for column in self.columns:
            for remedy in column.remedies:
                owners.setdefault(remedy, []).append(column.name)
        lines += [f"{_listed(names)}: {remedy}" for remedy, names in owners.items()]
        if self.num_duplicates:
            lines.append(
                "Duplicate rows: keep them out of both training and held-out data at once, or the "
                "held-out score is that of rows already seen."
            )
        return "\n".join(lines)

    @checks_arguments
    def dequantise(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        r"""Add uniform noise of the width :math:`w_j` of the ties to columns that have ties.

        .. math:: x_j + w_j (u_j - \tfrac12), \qquad u_j \sim U[0, 1)

        A density at values that are shared by many rows is unbounded: a flow may put narrower
        and narrower peaks on them, so a likelihood on such columns means nothing without the
        noise. With it the mean log-density is a lower bound of :math:`\log P(x) - \sum_j \log
        w_j` for the probabilities :math:`P` of the grid's cells.

        Args:
            x: Data of shape :math:`(N, D)`, training or held out, with the columns of the report.
            generator: Source of :math:`u`; torch's own if None.

        Returns:
            A tensor of the same shape; columns without ties are as they were.

        Raises:
            ShapeError: If x has other columns than the report.

        References:
            Theis, van den Oord, Bethge, arXiv 1511.01844, section 3.1.

        Examples:
            >>> x = torch.tensor([[0.0], [1.0], [1.0], [3.0]])
            >>> noisy = column_report(x).dequantise(x)
            >>> torch.equal(noisy.round(), x)
            True
        """
        check_event_shape(x, (len(self.columns),), "x")
        widths = torch.tensor([column.width for column in self.columns], dtype=torch.float64)
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        return torch.where((widths > 0).to(x.device), x + widths.to(x) * (noise - 0.5), x)


@takes_tables
@checks_arguments
def column_report(x: Table, names: Sequence[str] | None = None) -> ColumnReport:
    r"""Look for constants, ties, outliers, copies and dependent columns in a table.

    Every one of them spoils a density silently: it diverges on constants, ties, copies and linear
    dependence, and outliers rule its scale.

    Args:
        x: Data of shape :math:`(N, D)`, at least two rows: a tensor, an array or a data frame.
        names: Names of the columns; by default those of a data frame.

    Returns:
        :class:`ColumnReport`. Linear dependence is looked for in at most 10,000 rows.

    Raises:
        NonFiniteError: If a value is NaN or infinite; the columns are named.
        ShapeError: If x is no table, or has fewer than two rows.

    Examples:
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> x[:, 1] = x[:, 1].round()
        >>> x[:, 2] = 2 * x[:, 0] - 1
        >>> report = column_report(x, names=["length", "count", "twice"])
        >>> report.rank, report.columns[1].width
        (2, 1.0)
        >>> print(str(report).partition("count:")[0].strip())
        100 rows of 3 columns, rank 2, 0 duplicate rows
                      distinct    tied      width  outside
        length             100      0%          0        0
        count                6     99%          1        0
        twice              100      0%          0        0
        >>> report.columns[2].remedies
        ('a linear function of earlier columns. Drop it, or use at most 2 latent dimensions.',)
    """
    _, named = finite_columns(x, names)
    if x.dim() != 2:
        raise ShapeError(
            f"x must be a table of shape (N, D), got {tuple(x.shape)}. Flatten the rows with "
            "x.flatten(1)."
        )
    table = x.detach() + 0.0  # Not -0.0, which is another pattern of bits.
    copies = _copies(table, named)
    depends = _dependent(table.double(), torch.finfo(x.dtype).eps)
    rank = depends.count(False)
    checks = tuple(
        _check(name, column, copy, dependent, rank)
        for name, column, copy, dependent in zip(named, table.T, copies, depends, strict=True)
    )
    distinct = int(copies_of_rows(table).max()) + 1
    return ColumnReport(checks, len(table), len(table) - distinct, rank)


def _listed(names: Sequence[str]) -> str:
    """The first names, and the number of the others."""
    few = ", ".join(names[:_NAMED])
    return few if len(names) <= _NAMED else f"{few} and {len(names) - _NAMED} more"


def _check(
    name: str, column: Tensor, copy_of: str | None, depends: bool, rank: int
) -> ColumnCheck:
    ordered = column.double().sort().values
    values, counts = torch.unique_consecutive(ordered, return_counts=True)
    tied = float(counts[counts > 1].sum()) / len(ordered)
    width = 0.0
    if len(values) > 1 and tied > _TIED:
        width = _width(values, torch.finfo(column.dtype).eps)
    window = window_of(ordered)
    outside = window.outside(ordered) if window.deviation > 0 else 0
    check = ColumnCheck(name, len(values), tied, width, outside, copy_of, depends, ())
    most, share = float(values[counts.argmax()]), float(counts.max()) / len(ordered)
    stands_out = share > _POINT_MASS and int(counts.max()) > _REPEATED * len(ordered) / len(values)
    return check._replace(
        remedies=_remedies(check, window, len(ordered), most, share if stands_out else 0.0, rank)
    )


def _width(values: Tensor, eps: float) -> float:
    """The width of the grid on which different values (K,) in order lie, or 0."""
    gaps = values.diff()
    width = gaps.min()
    # The mean over many gaps, because one of them has the rounding errors of its ends.
    width = gaps.sum() / (gaps / width).round().sum()
    steps = gaps / width
    blurred = 4 * eps * values.abs().max() / width
    is_grid = bool(blurred < _OFF_GRID) and bool(((steps - steps.round()).abs() < _OFF_GRID).all())
    return float(width) if is_grid else 0.0


def _remedies(
    check: ColumnCheck, window: Window, rows: int, most: float, most_share: float, rank: int
) -> tuple[str, ...]:
    """Words for a column in which the value ``most`` has a share of the rows, if it stands out."""
    if check.is_constant:
        return (f"constant at {most:g}. Drop it; a density has no bound on it.",)
    said = []
    if check.width > _COARSE * window.deviation:
        said.append(
            "on a coarse grid, whose width stands above. A density there is unbounded: "
            "dequantise, or give the column as context."
        )
    elif most_share > 0:
        said.append(
            f"{most_share:.1%} of the rows have the value {most:g}. A density there is unbounded: "
            "model these rows apart, or give a mark of them as context."
        )
    if check.num_outside > _MANY_OUTSIDE * rows:
        said.append(
            "values beyond ten robust deviations are many: heavy tails. Use "
            "nfi.flows.Standardise.fit(x, transform='auto')."
        )
    elif check.num_outside:
        said.append(
            "a few values beyond ten robust deviations. Look whether they are fill values or "
            "mistakes, and drop these rows if they are."
        )
    if check.copy_of is not None:
        said.append(f"a copy of {check.copy_of}. Drop it.")
    elif check.depends:
        said.append(
            "a linear function of earlier columns. Drop it, or use at most "
            f"{rank} latent dimensions."
        )
    return tuple(said)


def _copies(table: Tensor, names: Sequence[str]) -> list[str | None]:
    """For every column of a table (N, D) the first one with the same values, or None."""
    first: dict[bytes, str] = {}
    columns = table.T.contiguous().cpu().numpy()
    owners = [first.setdefault(c.tobytes(), name) for name, c in zip(names, columns, strict=True)]
    return [None if owner == name else owner for name, owner in zip(names, owners, strict=True)]


def _dependent(table: Tensor, eps: float) -> list[bool]:
    """Whether each column of a table (N, D) is constant or a linear function of earlier ones.

    The diagonal of R in a QR factorisation has the lengths that are left of the columns when the
    earlier ones are taken away.
    """
    step = -(-len(table) // _MOST_ROWS)
    few = table[::step]
    centred = few - few.mean(0)
    # In units of the largest entry, whose square may overflow.
    centred = centred / centred.abs().amax(0).clamp(min=torch.finfo(table.dtype).tiny)
    lengths = torch.linalg.vector_norm(centred, dim=0)
    left = torch.zeros_like(lengths)
    factor = torch.linalg.qr(centred / lengths.clamp(min=0.5), mode="r").R
    left[: len(factor)] = factor.diagonal().abs()
    # Rounding of the entries is relative to their size, so it is large beside large offsets.
    deviations = (few - few.mean(0)).abs().amax(0) * lengths / len(few) ** 0.5
    noise = eps * (10 + few.abs().amax(0) / deviations) + 1e-10
    return ((left <= noise) | (lengths == 0)).tolist()

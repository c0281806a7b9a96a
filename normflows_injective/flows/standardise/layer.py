"""The layer between standardised coordinates and the user's units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_shape, describe, is_readable
from ...errors import OffManifoldError, OptionError
from ..layer import Layer
from .columns import column_names, finite_columns, listed
from .fitting import KINDS, chosen_kind, fit_column
from .power import yeo_johnson, yeo_johnson_inverse

_NONE, _LOG, _POWER = map(KINDS.index, ("none", "log", "power"))


class ColumnUnits(NamedTuple):
    r"""The transform of one column in :class:`Standardise`, :math:`x = o + u\,T^{-1}(s + c z)`.

    Attributes:
        name: Name of the column.
        kind: Its transform :math:`T`: ``"none"``, ``"log"`` or ``"power"``.
        shift: Location :math:`s`, in units of :math:`T`.
        scale: Scale :math:`c > 0`, in units of :math:`T`.
        power: Exponent :math:`\lambda` of ``"power"``, else 1.
        origin: Origin :math:`o` of the transform, 0 but for ``"power"``.
        unit: Unit :math:`u` of the transform, 1 but for ``"power"``.
        remarks: Peculiarities seen when it was fitted; none in a layer that was loaded.
    """

    name: str
    kind: str
    shift: float
    scale: float
    power: float
    origin: float
    unit: float
    remarks: tuple[str, ...]


@final
class Standardise(Layer):
    r"""Lead standardised coordinates to the units of the data, column by column.

    .. math:: x_j = o_j + u_j\, T_j^{-1}(s_j + c_j z_j), \qquad
              \log\det = \sum_j \log (u_j c_j) - \log T_j'\big((x_j - o_j) / u_j\big)

    with :math:`T` the identity, the logarithm, or the power transform of Yeo and Johnson with an
    exponent :math:`\lambda \in [0, 2]`, for which it is a bijection of :math:`\mathbb R` onto
    :math:`\mathbb R`. There is one set of numbers for every index of the first event axis: for
    every column of a table, every channel of images (C, H, W).

    It stands last in a model. There the training term works in the standardised coordinates, and
    everything else in the units of the data, exactly: see ``docs/training.md``. It may also stand
    wherever a bijection may. All numbers are buffers: nothing is trained, and
    ``Standardise(shape)``, the identity, takes over the state of a layer that was fitted.

    Data far from zero have few digits left: the relative rounding error :math:`\epsilon` of x
    (6e-8 in float32) becomes an absolute error :math:`\epsilon |x_j| / (u_j c_j)` of z, so that a
    column with offset 1e6 and scale 1 keeps two digits behind the point. Subtract such offsets in
    float64, or let the model be float64. In float32 ``"log"``, and ``"power"`` at the ends of its
    range, overflow at 88 in units of :math:`T`.

    Args:
        shape: Number of columns :math:`D`, or event shape.

    Raises:
        OptionError: If a size is not a positive integer.

    References:
        Yeo and Johnson, A new family of power transformations to improve normality or symmetry,
        Biometrika 87, 2000.

    Examples:
        >>> x = torch.tensor([[1.0, 100.0], [3.0, 300.0], [5.0, 500.0]])
        >>> units = Standardise.fit(x, names=["length", "mass"])
        >>> units.inverse(x)[0]
        tensor([[-1.2247, -1.2247],
                [ 0.0000,  0.0000],
                [ 1.2247,  1.2247]])
        >>> units.columns[1].name, round(units.columns[1].scale, 1)
        ('mass', 163.3)
    """

    takes_context = False

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__()
        self.shape = check_shape(shape, "shape")
        columns = self.shape[0]
        self.kind = nn.Buffer(torch.zeros(columns, dtype=torch.long))
        self.power, self.unit, self.scale = (nn.Buffer(torch.ones(columns)) for _ in range(3))
        self.origin, self.shift = (nn.Buffer(torch.zeros(columns)) for _ in range(2))
        self._names = column_names(None, columns)
        self._remarks: list[tuple[str, ...]] = [()] * columns
        self._known_kinds: tuple[Tensor, int | None, frozenset[int]] | None = None

    @classmethod
    def fit(
        cls,
        x: Tensor,
        *,
        transform: str | Sequence[str] = "none",
        names: Sequence[str] | None = None,
    ) -> Standardise:
        r"""A layer whose coordinates of the given data have mean zero and deviation one.

        Location and scale are those of values winsorised at ten robust deviations around the
        median, or where 99 % of them lie, if that is wider: mean and standard deviation for
        normal columns, and hardly moved by a fill value or a few outliers. A constant column gets
        its constant as shift, and scale one; so does one that is constant but for less than one
        in a hundred values.

        Args:
            x: Data of shape :math:`(N, *)`, at least two rows, the training data alone.
            transform: One for all columns, or one for each: ``"none"``; ``"log"``, for positive
                columns, which makes samples positive; ``"power"``, with the exponent of greatest
                likelihood; or ``"auto"``: for columns whose winsorised skewness exceeds one,
                ``"log"`` if they are positive and it leaves at most 0.5, else ``"power"`` if it
                leaves at most half, and else ``"none"``.
            names: Names of the columns, for messages and :attr:`columns`.

        Returns:
            The layer, with the dtype and the device of x.

        Raises:
            NonFiniteError: If a value is NaN or infinite; the columns are named.
            OptionError: If a transform is unknown, or ``"log"`` meets a column that is not
                positive.
            ShapeError: If there are fewer than two rows.

        Examples:
            >>> prices = torch.tensor([[1.0], [10.0], [100.0]])
            >>> layer = Standardise.fit(prices, transform="log", names=["price"])
            >>> x, _ = layer(torch.tensor([[-9.0]]))
            >>> bool(x > 0)
            True
        """
        columns, named = finite_columns(x, names)
        kinds = [
            chosen_kind(column) if kind == "auto" else kind
            for column, kind in zip(columns, _kinds(transform, len(columns)), strict=True)
        ]
        _refuse_logarithms(columns, kinds, named)
        layer = cls(x.shape[1:]).to(x.device, torch.float64)
        fits = [fit_column(column, kind) for column, kind in zip(columns, kinds, strict=True)]
        layer.kind.copy_(torch.tensor([KINDS.index(fit.kind) for fit in fits]))
        for name in ("power", "origin", "unit", "shift", "scale"):
            numbers = torch.tensor([getattr(fit, name) for fit in fits], dtype=torch.float64)
            getattr(layer, name).copy_(numbers)
        layer._names, layer._remarks = named, [fit.remarks for fit in fits]
        return layer.to(x.dtype)

    @property
    def columns(self) -> list[ColumnUnits]:
        """The transform and the numbers of each column, with its name."""
        kinds = [KINDS[kind] for kind in self.kind.tolist()]
        numbers = (self.shift, self.scale, self.power, self.origin, self.unit)
        lists = [number.tolist() for number in numbers]
        rows = zip(self._names, kinds, *lists, self._remarks, strict=True)
        return [ColumnUnits(*row) for row in rows]

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Standardised coordinates (B, *shape) to data, with the log-det (B,) in nats."""
        kind, power, origin, unit, shift, scale = self._numbers(z)
        y = shift + scale * z
        if self._bends_nothing(z):
            return origin + unit * y, self._log_det(z.new_zeros(len(z), 1), unit, scale)
        is_log, is_power = kind == _LOG, kind == _POWER
        # Every transform meets all columns, those of others as zeros: values decide nothing that
        # a compiler or a vmap would have to follow.
        bent, log_slope = yeo_johnson_inverse(torch.where(is_power, y, 0.0), power)
        grown = torch.where(is_log, y, 0.0)
        core = torch.where(is_power, bent, torch.where(is_log, grown.exp(), y))
        log_slope = torch.where(is_power, log_slope, grown)
        return origin + unit * core, self._log_det(log_slope, unit, scale)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (B, *shape) to standardised coordinates, with the log-det (B,) in nats.

        Raises:
            OffManifoldError: If a value is not positive in a column whose logarithm is taken.
        """
        kind, power, origin, unit, shift, scale = self._numbers(x)
        core = (x - origin) / unit
        if self._bends_nothing(x):
            return (core - shift) / scale, -self._log_det(x.new_zeros(len(x), 1), unit, scale)
        is_log, is_power = kind == _LOG, kind == _POWER
        self._refuse_what_has_no_logarithm(is_log, core)
        bent, log_slope = yeo_johnson(torch.where(is_power, core, 0.0), power)
        logarithm = torch.where(is_log, core, 1.0).log()
        y = torch.where(is_power, bent, torch.where(is_log, logarithm, core))
        log_slope = torch.where(is_power, log_slope, -logarithm)
        return (y - shift) / scale, -self._log_det(-log_slope, unit, scale)

    def extra_repr(self) -> str:
        """Shape, and how many columns have each transform, as shown by ``print(model)``."""
        if self.kind.is_meta:
            return f"shape={self.shape}"
        counts = torch.bincount(self.kind, minlength=len(KINDS)).tolist()
        kinds = [f"{kind}={count}" for kind, count in zip(KINDS, counts, strict=True) if count]
        return f"shape={self.shape}, {', '.join(kinds)}"

    def _numbers(self, like: Tensor) -> tuple[Tensor, ...]:
        """Kind, power, origin, unit, shift and scale, which broadcast against a batch."""
        axes = (-1, *(1 for _ in self.shape[1:]))
        numbers = (self.power, self.origin, self.unit, self.shift, self.scale)
        return self.kind.view(axes), *(n.to(like.dtype).view(axes) for n in numbers)

    def _log_det(self, log_slope: Tensor, unit: Tensor, scale: Tensor) -> Tensor:
        """The sum (B,) over an event of log-slopes and logarithms of units and scales."""
        each = math.prod(self.shape[1:])
        return log_slope.flatten(1).sum(1) + each * (unit.log() + scale.log()).sum()

    def _refuse_what_has_no_logarithm(self, is_log: Tensor, core: Tensor) -> None:
        if not is_readable(core, self.kind) or _LOG not in self._kinds_present():
            return
        bad = is_log & (core <= 0)
        if not bool(bad.any()):
            return
        counts = bad.transpose(0, 1).flatten(1).sum(1).tolist()
        named = [f"{n} ({count})" for n, count in zip(self._names, counts, strict=True) if count]
        raise OffManifoldError(
            "x must be positive in columns whose logarithm is taken, got "
            f"{sum(counts)} values that are not, in {listed(named)}. Drop these rows, or fit the "
            "layer with transform='power' there."
        )

    def _bends_nothing(self, like: Tensor) -> bool:
        """Whether every column is shifted and scaled alone, which is a tenth of the work."""
        return is_readable(like, self.kind) and self._kinds_present() == {_NONE}

    def _kinds_present(self) -> frozenset[int]:
        """Kinds of columns, read once: reading them at every call would wait for a GPU."""
        version = None if self.kind.is_inference() else self.kind._version
        known = self._known_kinds
        if known is None or known[0] is not self.kind or known[1] != version or version is None:
            known = self.kind, version, frozenset(self.kind.tolist())
            self._known_kinds = known
        return known[2]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # They belong to the numbers that were there before.
        self._remarks = [()] * self.shape[0]


def _kinds(transform: str | Sequence[str], count: int) -> list[str]:
    """The kind of transform of each column, ``"auto"`` among them."""
    choices = (*KINDS, "auto")
    if isinstance(transform, str):
        return [check_choice(transform, choices, "transform")] * count
    if not isinstance(transform, list | tuple) or len(transform) != count:
        raise OptionError(
            f"transform must be one of {', '.join(choices)}, or a list of {count} of them, one "
            f"per column, got {describe(transform)}. Use 'auto' where you are not sure."
        )
    return [
        check_choice(kind, choices, f"transform[{index}]") for index, kind in enumerate(transform)
    ]


def _refuse_logarithms(columns: list[Tensor], kinds: list[str], names: list[str]) -> None:
    wrong = [
        name
        for column, kind, name in zip(columns, kinds, names, strict=True)
        if kind == "log" and bool(column.min() <= 0)
    ]
    if wrong:
        raise OptionError(
            "transform='log' needs columns that are positive, got values of zero or less in "
            f"{listed(wrong)}. Use 'power' for these columns."
        )

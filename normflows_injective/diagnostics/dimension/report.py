"""The report on the dimension of data."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..figures import new_figure
from .codes import CodeErrors
from .neighbours import NeighbourRatio
from .spectrum import LocalComponents, PrincipalComponents

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class LatentDimReport:
    r"""Result of :func:`suggest_latent_dim`; ``print`` it, or ``plot()`` it.

    All ranges are pairs (low, high), both included.

    Attributes:
        recommended: Latent dimensions :math:`d` to try, from the least intrinsic dimension to the
            number of coordinates that one encoder and one decoder need.
        reason: Why, in one sentence.
        intrinsic: Dimension of the data as a manifold, from ``two_nearest`` and
            ``local_components``; it ends at the linear rank if neighbourhoods show no gap.
        chart: Numbers of coordinates that one pair of maps :math:`\mathbb R^D \to \mathbb R^d \to
            \mathbb R^D` needs; larger than the intrinsic dimension for closed or rolled
            manifolds. From ``code_errors``, or without it the intrinsic range and twice its end
            (Whitney's theorem), at most the components of 99 % of the variance.
        principal_components: Spectrum of all rows: ``variances``, descending, ``for_shares``, the
            numbers of components of 90, 95 and 99 % of the variance, the numerical ``rank``, an
            upper bound of every dimension, and the ``basis``, orthonormal columns.
        two_nearest: TwoNN estimates at several densities, densest first: ``rows``, median
            ``distance``, ``dim`` and ``standard_error``. The standard error is that of the ratios;
            noise adds to the first estimates, and above about ten dimensions all are too low.
        local_components: Dimensions of tangent spaces by numbers of neighbours: ``size``,
            ``radius``, ``median``, quantiles ``low`` (16 %) and ``high`` (84 %) over anchors, the
            median ``gap``, and the share ``without_gap``, whose estimate is all that so many
            neighbours can show.
        code_errors: Errors of an autoencoder with codes of lengths ``dims``, as shares of the
            variance: ``errors``, ``standard_errors``, ``linear_errors``, the lengths ``low`` and
            ``high`` read off them, whether a floor decided (``at_floor``), and whether no length
            sufficed (``is_open``); None if it was left out.
        num_rows: Number of different rows that were used.
        num_columns: Number of columns that vary.
        notes: What was done to the data, and what to be careful about.

    Examples:
        See :func:`suggest_latent_dim`.
    """

    recommended: tuple[int, int]
    reason: str
    intrinsic: tuple[int, int]
    chart: tuple[int, int]
    principal_components: PrincipalComponents
    two_nearest: tuple[NeighbourRatio, ...]
    local_components: tuple[LocalComponents, ...]
    code_errors: CodeErrors | None
    num_rows: int
    num_columns: int
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        """The estimates as a table, and the recommendation."""
        lines = [
            f"Latent dimension of {self.num_rows} rows with {self.num_columns} columns",
            *self._spectrum_lines(),
            *self._neighbour_lines(),
            *self._code_lines(),
            f"intrinsic dimension {in_words(self.intrinsic)}, "
            f"coordinates of one chart {in_words(self.chart)}",
            *_wrapped(f"RECOMMENDED: {in_words(self.recommended)}. {self.reason}"),
        ]
        for note in self.notes:
            lines += _wrapped(f"* {note}", "  ")
        return "\n".join(lines)

    def _spectrum_lines(self) -> list[str]:
        counts = self.principal_components.for_shares
        held = "".join(f"{p} %: {n:<5}" for n, p in zip(counts, (90, 95, 99), strict=True))
        rank = self.principal_components.rank
        return [f"{'principal components':26}{held}rank: {rank}, a bound"]

    def _neighbour_lines(self) -> list[str]:
        lines = [f"{'':24}{'rows':>8}{'dimension':>12}{'error':>8}{'distance':>12}"]
        for position, scale in enumerate(self.two_nearest):
            lines.append(
                f"{'' if position else 'two nearest neighbours':24}{scale.rows:>8}"
                f"{scale.dim:>12.2f}{scale.standard_error:>8.2f}{scale.distance:>12.3g}"
            )
        lines.append(f"{'':24}{'number':>8}{'dimension':>12}{'16-84 %':>8}{'gap in':>12}")
        for position, local in enumerate(self.local_components):
            spread = f"{local.low:.0f}-{local.high:.0f}"
            lines.append(
                f"{'' if position else 'neighbourhoods':24}{local.size:>8}{local.median:>12.0f}"
                f"{spread:>8}{100 * (1 - local.without_gap):>10.0f} %"
            )
        return lines

    def _code_lines(self) -> list[str]:
        codes = self.code_errors
        if codes is None:
            return []
        shown = [i for i, k in enumerate(codes.dims) if k <= codes.high + 2][-7:]
        rows: list[tuple[str, list[str]]] = [
            ("code of length", [f"{codes.dims[i]}" for i in shown]),
            ("  error, % of variance", [f"{100 * codes.errors[i]:.2f}" for i in shown]),
            ("  of components", [f"{100 * codes.linear_errors[i]:.2f}" for i in shown]),
        ]
        return [f"{name:24}" + "".join(f"{cell:>7}" for cell in cells) for name, cells in rows]

    def plot(self) -> Figure:
        """Draw the report: spectrum, local estimates with spreads, error against code length.

        Returns:
            A matplotlib figure, not shown and not saved.

        Raises:
            OptionError: If matplotlib is not installed.
        """
        figure = new_figure(12, 3.8)
        spectrum, local, codes = figure.subplots(1, 3)
        self._plot_spectrum(spectrum)
        self._plot_local(local)
        self._plot_codes(codes)
        return figure

    def _plot_spectrum(self, axis: Any) -> None:
        components = self.principal_components
        variances = components.variances.detach().cpu()
        positive = variances.clamp(min=1e-16 * float(variances[0])).numpy()
        axis.plot(range(1, len(positive) + 1), positive, "o-", markersize=3)
        axis.axvline(components.rank, color="k", ls=":", label=f"rank {components.rank}")
        axis.axvspan(*components.for_shares[::2], alpha=0.2, label="90 to 99 %")
        axis.set(yscale="log", xlabel="component", ylabel="variance", title="All rows")
        axis.legend(fontsize=8)

    def _plot_local(self, axis: Any) -> None:
        axis.axhspan(*self.intrinsic, alpha=0.2, color="C2", label="intrinsic")
        axis.errorbar(
            [scale.distance for scale in self.two_nearest],
            [scale.dim for scale in self.two_nearest],
            [scale.standard_error for scale in self.two_nearest],
            fmt="o-",
            capsize=3,
            label="two nearest neighbours",
        )
        local = self.local_components
        below = [one.median - one.low for one in local]
        above = [one.high - one.median for one in local]
        axis.errorbar(
            [one.radius for one in local],
            [one.median for one in local],
            [below, above],
            fmt="s-",
            capsize=3,
            label="neighbourhoods",
        )
        axis.set(xlabel="distance", ylabel="dimension", title="Near a row")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)

    def _plot_codes(self, axis: Any) -> None:
        axis.set(title="One chart", xlabel="length of the code", ylabel="share of the variance")
        axis.axvspan(*self.recommended, alpha=0.2, color="C1", label="recommended")
        if (codes := self.code_errors) is not None:
            shown = [max(error, 1e-6) for error in codes.errors]
            axis.errorbar(codes.dims, shown, codes.standard_errors, fmt="o-", label="autoencoder")
            linear = [max(error, 1e-6) for error in codes.linear_errors]
            axis.plot(codes.dims, linear, "k--", lw=1, label="components")
            axis.set(yscale="log")
        axis.legend(fontsize=8)


def in_words(pair: tuple[int, int]) -> str:
    """A range, or the one number in it."""
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]} to {pair[1]}"


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, 79, subsequent_indent=indent)

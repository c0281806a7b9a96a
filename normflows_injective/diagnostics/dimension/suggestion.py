"""How many latent dimensions data need."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from ...checks import check_batch, check_count, checks_arguments
from ...layerwise.regression import new_generator
from ...training.tables import Table, takes_tables
from .codes import CodeErrors, code_errors
from .neighbours import NeighbourRatio, two_nearest
from .report import LatentDimReport, in_words
from .rows import FEW_ROWS, LEAST_ROWS, prepare
from .spectrum import (
    LocalComponents,
    PrincipalComponents,
    local_components,
    principal_components,
)

Range = tuple[int, int]

_FULL = (
    "As many dimensions as columns leave nothing out: give an injective flow {most} at most, or "
    "take nf.NormalizingFlow."
)


@takes_tables
@checks_arguments
def suggest_latent_dim(
    x: Table,
    standardise: bool = True,
    num_steps: int | None = 2000,
    max_rows: int = 10_000,
    generator: Generator | None = None,
) -> LatentDimReport:
    r"""Suggest a range of latent dimensions, from several estimators with their spreads.

    No estimator is right everywhere, and two questions are easily confused. The *intrinsic*
    dimension is that of the data as a manifold, seen from nearby: 1 for a circle. The number of
    coordinates of *one chart* is what an encoder :math:`\mathbb R^D \to \mathbb R^d` with a
    decoder needs: 2 for a circle, which no line covers continuously. The range goes from the one
    to the other.

    * Principal components: numbers for 90, 95 and 99 % of the variance, and the linear rank, which
      bounds every dimension from above.
    * Two nearest neighbours, by censored maximum likelihood among all rows, halves, quarters and
      so on. Noise adds to the estimates at small distances; above about ten dimensions all of them
      are too low.
    * Local components: gaps in the spectra of neighbourhoods of several sizes, corrected for
      chance by parallel analysis. The size of the clearest gap counts.
    * One small autoencoder that is trained for codes of every length k at once, from the
      principal components on. It is read by a rule: ``low`` is the least k with a held-out error
      below 5 % of the variance, ``high`` the least with one below 1 %, or with an error per
      missing dimension within a factor two of the least such error of longer codes, which is what
      noise leaves.

    All that takes five seconds of one CPU core for :math:`10^4` rows of a table with 20 columns,
    fifteen for images of 784 pixels.

    Args:
        x: Data (N, \*), flattened to D columns, a tensor, an array or a data frame; at least 30
            different rows, better 1000.
        standardise: Whether to divide every column by its standard deviation, as models of tables
            do. Pass False for images and for columns of one unit.
        num_steps: Number of training steps of the autoencoder; None leaves it out.
        max_rows: Number of rows to use at most, drawn at random.
        generator: Source of all random numbers; by default one of seed 0. Torch's global generator
            is left alone.

    Returns:
        :class:`LatentDimReport`; ``report.recommended`` is the range.

    Raises:
        OptionError: If there are fewer than 30 different rows, or an option is out of range.
        ShapeError: If x is no batch, or no column varies.
        NonFiniteError: If x holds NaN or infinity.

    References:
        Two nearest neighbours: Facco et al., Scientific Reports 7 (2017) 12140; the censored form
        is textbook. Parallel analysis: Horn, Psychometrika 30 (1965) 179. Several scales: Little,
        Maggioni and Rosasco, Applied and Computational Harmonic Analysis 43 (2017) 504. Codes of
        every length: Rippel et al., arXiv 1402.0915.

    Examples:
        >>> angle = 6.3 * torch.rand(1000, 1, generator=torch.Generator().manual_seed(0))
        >>> circle = torch.cat([angle.cos(), angle.sin(), angle.cos() + angle.sin()], dim=1)
        >>> report = suggest_latent_dim(circle, num_steps=100)
        >>> report.principal_components.rank, report.intrinsic, report.recommended
        (2, (1, 1), (1, 2))
    """
    check_batch(x, "x")
    if num_steps is not None:
        check_count(num_steps, "num_steps", advice="Pass None to leave the autoencoder out.")
    check_count(max_rows, "max_rows", least=LEAST_ROWS)
    generator = new_generator() if generator is None else generator
    with torch.inference_mode(False), torch.no_grad():
        # Autograd refuses tensors of inference mode; a clone outside of it is an ordinary one.
        prepared = prepare(x.detach().clone(), standardise, max_rows, generator)
        rows = prepared.rows
        components = principal_components(prepared)
        # Distances are those of the coordinates along the components, of which there are fewer.
        near = rows @ components.basis if len(rows) < rows.shape[1] else rows
        ratios = two_nearest(near, generator)
        local = local_components(near, generator)
        codes = None
        if num_steps is not None:
            codes = code_errors(rows, components, num_steps, generator)
    return _combined(prepared.rows, prepared.notes, components, ratios, local, codes)


def _combined(
    rows: Tensor,
    notes: tuple[str, ...],
    components: PrincipalComponents,
    ratios: tuple[NeighbourRatio, ...],
    local: tuple[LocalComponents, ...],
    codes: CodeErrors | None,
) -> LatentDimReport:
    rank = components.rank
    clear = [one for one in local if one.without_gap < 0.5]
    clearest = max(clear, key=lambda one: one.gap, default=None)
    intrinsic = _intrinsic(ratios, clearest, rank)
    if codes is not None:
        chart = codes.low, codes.high
    else:
        most = max(intrinsic[1], min(2 * intrinsic[1], components.for_shares[2]))
        chart = intrinsic[1], min(most, rank)
    # Gaps are trusted upwards, ratios are not: noise raises them.
    high = chart[1] if clearest is None else max(chart[1], math.ceil(clearest.high))
    low = min(intrinsic[0], chart[1])
    if len(rows) < FEW_ROWS:
        low, high = max(1, low * 3 // 4), high + max(1, high // 3)
    recommended = low, max(low, min(high, rank))
    if recommended[1] == rows.shape[1] > 1:
        notes = *notes, _FULL.format(most=rows.shape[1] - 1)
    return LatentDimReport(
        recommended=recommended,
        reason=_reason(intrinsic, chart, codes, clearest, rank),
        intrinsic=intrinsic,
        chart=chart,
        principal_components=components,
        two_nearest=ratios,
        local_components=local,
        code_errors=codes,
        num_rows=rows.shape[0],
        num_columns=rows.shape[1],
        notes=notes,
    )


def _intrinsic(
    ratios: tuple[NeighbourRatio, ...], clearest: LocalComponents | None, rank: int
) -> Range:
    """The range of the local estimators: the least ratio, and the clearest gap if there is one."""
    least = min((scale.dim for scale in ratios), default=1.0)
    by_ratio = min(rank, max(1, round(least)))
    if clearest is None:
        # Without a gap no direction near a row is smaller than the others.
        return by_ratio, rank
    low, high = max(1, math.floor(clearest.low)), math.ceil(clearest.high)
    return min(low, by_ratio), min(rank, max(high, by_ratio))


def _reason(
    intrinsic: Range,
    chart: Range,
    codes: CodeErrors | None,
    clearest: LocalComponents | None,
    rank: int,
) -> str:
    if clearest is None:
        near = f"Distances say {intrinsic[0]} at least, and near a row no direction is small"
    else:
        plural = "" if intrinsic == (1, 1) else "s"
        near = f"Near a row the data have {in_words(intrinsic)} dimension{plural}"
    if codes is None:
        return f"{near}; one chart may need up to {chart[1]}, which an autoencoder would tell."
    if codes.is_open:
        left = f"{100 * codes.errors[-1]:.2g} % of the variance"
        return f"{near}; the longest code that was tried, {chart[1]}, still leaves {left}."
    if chart[1] >= rank:
        return f"{near}; one chart needs {chart[1]}, where a linear map is exact."
    ending = "reaches its floor" if codes.at_floor else "less than 1 %"
    within = f"one chart loses less than 5 % of the variance from {chart[0]} on"
    return f"{near}; {within}, and {ending} at {chart[1]}: start there, and try fewer."

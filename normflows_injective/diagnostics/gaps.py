"""The nats that one more affine coupling block could win."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_count, renamed
from ..errors import OptionError
from ..flows.volume_preserving.rotation import random_rotation
from ..layerwise.regression import (
    MomentRegression,
    Rows,
    check_latents,
    check_regression,
    fit_moments,
    new_generator,
    step_gains,
)

_LEAST_PER_FOLD = 50
# Share of the rows of a regression by which its best state and its rotation are chosen.
_VALIDATION = 0.25
# A model is better than a simpler one if its gain there is more than this many standard errors.
_MARGIN = 2.0


class CouplingGap(NamedTuple):
    r"""Result of :func:`coupling_gap`, in nats and in the dtype of the latents.

    Attributes:
        gap: Gain at the rotations chosen on the validation rows, measured on rows used neither to
            choose nor to fit; a lower bound of :math:`\max_Q \Delta(Q)` up to its standard error.
        standard_error: Standard error of ``gap``. If no model is better than the identity, the
            gain is zero, and its error is that of the held-out gains of the best simple model that
            was rejected: gains of this size look like zero. It says nothing about structure that
            the regressions cannot find.
        whitening: The part of ``gap`` that mean and covariance alone would give, by blocks that
            are constant or linear in b, at the same rotations.
        rest: ``gap - whitening``, the part that needs a network.
        mean: Mean gain over the rotations, on rows not used to fit.
        mean_standard_error: Standard error of ``mean`` for these rotations; rejected models count
            as in ``standard_error``.
        per_rotation: Gain at every rotation, (R,).
        per_rotation_standard_error: Standard errors of these gains, (R,); rejected models count as
            in ``standard_error``.
        rotations: The orthogonal matrices Q, (R, D, D); their last rows give the coordinates that
            are moved.
        chosen: Index of the rotation that each fold chose, (K,).

    Examples:
        See :func:`coupling_gap`.
    """

    gap: Tensor
    standard_error: Tensor
    whitening: Tensor
    rest: Tensor
    mean: Tensor
    mean_standard_error: Tensor
    per_rotation: Tensor
    per_rotation_standard_error: Tensor
    rotations: Tensor
    chosen: Tensor


@renamed(n_rotations="num_rotations", n_folds="num_folds")
def coupling_gap(
    z: Tensor,
    num_rotations: int = 8,
    num_active: int | None = None,
    num_folds: int = 4,
    regression: MomentRegression | None = None,
    generator: torch.Generator | None = None,
) -> CouplingGap:
    r"""Measure the distance of latents from a standard normal that affine couplings can remove.

    .. math:: \Delta(Q) = \tfrac12 \, \mathbb E_b \sum_i
              \big[m_i^2(b) + \sigma_i^2(b) - 1 - \log \sigma_i^2(b)\big], \qquad (b, a) = Q z,

    with :math:`m_i, \sigma_i` the conditional moments of :math:`a_i`. The best affine block after
    the rotation :math:`Q` lowers the forward KL divergence by :math:`\Delta(Q)`, which vanishes
    for all rotations only for a standard normal.

    Every sample is judged by a regression that has not seen it, so the estimate is a lower bound
    up to its standard error: wrong moments gain less, or lose. The gain on the rows of the fit
    would instead exceed the truth by half the number of parameters over the number of rows.

    Args:
        z: Latents of a model at data, (N, D) with :math:`D \ge 2`.
        num_rotations: Number R of random rotations.
        num_active: Number of coordinates that are moved; by default :math:`\lceil D/2 \rceil`.
        num_folds: Number K of folds. A regression sees :math:`1 - 1/K` of the rows.
        regression: Options of the regressions, :class:`MomentRegression`.
        generator: Source of rotations, folds, weights and batches; by default one of seed 0.
            Torch's global generator is left alone.

    Returns:
        :class:`CouplingGap`.

    Raises:
        ShapeError: If z is not a matrix, or has one column.
        DtypeError: If z is neither float32 nor float64.
        OptionError: If there are fewer than 50 rows to a fold, or an option is out of range.
        NonFiniteError: If z holds NaN or infinity.

    References:
        The gap and its use: Draxler et al., arXiv 2402.06578; cross-fitting derived here.

    Examples:
        >>> z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
        >>> gap = coupling_gap(torch.tensor([2.0, 1.0]) * z, 2)
        >>> bool(gap.gap > 0.1), bool(gap.rest.abs() < 0.02)  # whitening wins it all
        (True, True)
    """
    check_count(num_folds, "num_folds", least=2)
    check_latents(z, _LEAST_PER_FOLD * num_folds, "coupling_gap")
    dim = z.shape[1]
    active = math.ceil(dim / 2) if num_active is None else num_active
    if not 0 < active < dim:
        raise OptionError(f"num_active must lie in 1 to {dim - 1}, got {num_active!r}.")
    options = check_regression(MomentRegression() if regression is None else regression)
    generator = new_generator() if generator is None else generator
    with torch.inference_mode(False), torch.no_grad():
        # Autograd refuses tensors of inference mode; a clone outside of it is an ordinary one.
        return _measure(z.detach().clone(), num_rotations, active, num_folds, options, generator)


def _measure(
    z: Tensor,
    num_rotations: int,
    active: int,
    num_folds: int,
    options: MomentRegression,
    generator: torch.Generator,
) -> CouplingGap:
    dim = z.shape[1]
    rotations = [random_rotation(dim, generator).to(z) for _ in range(num_rotations)]
    order = torch.randperm(len(z), generator=generator, device=generator.device).to(z.device)
    gains, linear, scatter = z.new_zeros(3, num_rotations, len(z))
    best, chosen = z.new_zeros(3, len(z)), []
    folds = order.tensor_split(num_folds)
    for fold, held_out in enumerate(folds):
        seen = torch.cat([*folds[:fold], *folds[fold + 1 :]])
        validation, train = seen.tensor_split([round(_VALIDATION * len(seen))])
        validation_gains = []
        for index, rotation in enumerate(rotations):
            b, a = (z @ rotation.T).split((dim - active, active), dim=1)
            rows = [Rows(b[part], a[part]) for part in (train, validation, held_out)]
            fit = fit_moments(rows[0], rows[1], options, generator, margin=_MARGIN)
            gains[index, held_out] = step_gains(fit.moments, *rows[2])
            linear[index, held_out] = step_gains(fit.linear, *rows[2])
            scatter[index, held_out] = gains[index, held_out]
            if fit.rejected is not None:
                # The estimate is zero: only the scatter of the gains counts, not their mean.
                rejected_gains = step_gains(fit.rejected, *rows[2])
                scatter[index, held_out] = rejected_gains - rejected_gains.mean()
            validation_gains.append(fit.validation_gain)
        winner = max(range(num_rotations), key=validation_gains.__getitem__)
        chosen.append(winner)
        for row, values in zip(best, (gains, linear, scatter), strict=True):
            row[held_out] = values[winner, held_out]
    gap, whitening = best[:2].mean(1)
    return CouplingGap(
        gap=gap,
        standard_error=_standard_error(best[2]),
        whitening=whitening,
        rest=gap - whitening,
        mean=gains.mean(),
        mean_standard_error=_standard_error(scatter.mean(0)),
        per_rotation=gains.mean(1),
        per_rotation_standard_error=_standard_error(scatter),
        rotations=torch.stack(rotations),
        chosen=torch.tensor(chosen, device=z.device),
    )


def _standard_error(values: Tensor) -> Tensor:
    return values.std(-1) / values.shape[-1] ** 0.5

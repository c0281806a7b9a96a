r"""Probabilities of labels under an assignment flow, by importance sampling.

The flow gives a density :math:`p_T` of coordinates :math:`m` at the end, and a reading gives the
probability :math:`r(\beta \mid m)` of labels given these. The proposal :math:`q_\beta` is the law
of the path given the labels, normal around the corner :math:`t \rho u_\beta` with deviation
:math:`s`:

.. math:: p(\beta) = \int r(\beta \mid m)\, p_T(m)\, dm
          = \mathbb E_{m \sim q_\beta} \frac{r(\beta \mid m)\, p_T(m)}{q_\beta(m)}.

For an exact field :math:`p_T = \sum_\beta p(\beta)\, q_\beta`, so all weights are equal when
corners are far apart. A reading that draws from the weights counts logits near other corners as
well. There the corner is drawn first, for each variable on its own, and :math:`q_\beta` is a
product of mixtures.

The estimate of :math:`p(\beta)` is unbiased, so its logarithm is too small in the mean: negative
log-likelihoods are too large by about half of the squared standard error.

A divergence that is estimated by probes is unbiased, but its exponential is not: noise of variance
:math:`\sigma^2` in the logarithm of a weight raises its mean by :math:`\sigma^2 / 2`. The noise is
a sum of independent terms, nearly normal, and several probes tell its variance, so the bias can be
subtracted.

The density is that of the solver's steps, and errs as they do. Some paths of every row are
therefore followed again, first in half as many steps. If that changes little, the error of a
method of order :math:`p` is about :math:`2^p - 1` times smaller than the change. Otherwise they
are followed in twice as many steps, and the error is :math:`2^p / (2^p - 1)` times that change.
With errors :math:`\delta_j` of the log-weights the logarithm of the estimate is wrong by at most
:math:`\sum_j w_j |\delta_j| / \sum_j w_j` to first order. Few paths are followed again, so every
row gets at least the mean error of all rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..checks import check_finite, level_of_caller
from ..errors import NumericalWarning
from ..flows.assignment.layer import AssignmentLayer
from ..flows.assignment.readings import Reading
from ..flows.integration import ORDERS
from ..volume.probes import draw_probes

DIVERGED = "The network has diverged, or the steps are too long for it. Train at a lower rate."

_LOG_TWO_PI = math.log(2 * math.pi)
# One draw in this many for a row of labels is followed again, in other steps.
_DRAWS_PER_CHECK = 16
# Error of the steps, in nats, above which a warning comes.
_LARGEST_ERROR = 0.05
# Factor on errors that longer steps alone have shown.
_SAFETY = 2.0


class DiscreteLogProb(NamedTuple):
    r"""Log-probabilities of labels, estimated by :meth:`AssignmentFlow.log_prob`.

    With importance weights :math:`w_j` of :math:`M` draws for each row of labels

    .. math:: \hat p = \frac1M \sum_j w_j, \qquad
              \mathrm{ESS} = \frac{(\sum_j w_j)^2}{M \sum_j w_j^2}, \qquad
              \mathrm{se}(\log \hat p) = \sqrt{\frac{1 / \mathrm{ESS} - 1}{M - 1}}.

    Attributes:
        log_prob: :math:`\log \hat p` of shape (B,), in nats; minus infinity where no draw counted.
        standard_error: :math:`\mathrm{se}(\log \hat p)` of shape (B,), in nats, to first order,
            plus the error of the solver's steps; infinite where there is no estimate. It means
            little where the effective sample size is a few draws.
        effective_sample_size: ESS of shape (B,), a share of the draws between 0 and 1. Where the
            error of the steps is as large as that of fewer draws, it is the share of those. Before
            that it is at least :math:`1 / M`, so with few draws it says little.

    References:
        Owen, Monte Carlo theory, methods and examples, chapter 9; the error of the steps is
        derived in ``models/assignment_likelihood.py``.

    Examples:
        >>> from normflows_injective import AssignmentFlow
        >>> from normflows_injective.nets.fields import DenseField
        >>> _ = torch.manual_seed(0)
        >>> flow = AssignmentFlow(DenseField(2, 3, hidden=(8,)), num_variables=2, num_classes=3)
        >>> estimate = flow.log_prob(torch.tensor([[0, 1], [2, 2]]), 16, steps=20)
        >>> estimate.log_prob.shape, bool((estimate.effective_sample_size <= 1).all())
        (torch.Size([2]), True)
    """

    log_prob: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor


class _Labels(NamedTuple):
    """Labels (A, n) with the context of each row and a mask (A, n), true where observed."""

    labels: Tensor
    context: Tensor | None
    mask: Tensor | None

    def take(self, rows: Tensor) -> _Labels:
        return _Labels(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]


class _Draws(NamedTuple):
    """Draws (A, d) of the proposal for labels, and their weights before the flow's density.

    ``log_ratio`` (A,) is the log-probability of being read as the labels over the density of the
    proposal, and ``observed`` (A, d) says which coordinates belong to observed variables.
    """

    coordinates: Tensor
    log_ratio: Tensor
    context: Tensor | None
    mask: Tensor | None
    observed: Tensor | None

    def take(self, rows: Tensor) -> _Draws:
        return _Draws(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]


class _Weights(NamedTuple):
    """Log-weights of draws, variances of their noise, and absolute errors of their steps.

    Variances are zero where no path was followed, errors where none was followed again.
    """

    log_weights: Tensor
    variances: Tensor
    step_errors: Tensor


def importance_log_prob(
    layer: AssignmentLayer,
    reading: Reading,
    labels: Tensor,
    num_importance_samples: int,
    context: Tensor | None = None,
    mask: Tensor | None = None,
    max_rows: int = 2048,
    progress: bool = False,
) -> DiscreteLogProb:
    """Estimate log-probabilities of labels (B, n), or of those that a mask (B, n) observes.

    At most ``max_rows`` paths are followed at a time.
    """
    num_rows, num_draws = len(labels), num_importance_samples
    draws = torch.arange(num_rows * num_draws, device=labels.device)
    checked = draws % num_draws < max(1, num_draws // _DRAWS_PER_CHECK)
    rows = _Labels(labels, context, mask)
    parts: list[_Weights] = []
    with tqdm(total=len(draws), unit="draw", disable=not progress) as bar:
        for chunk, again in zip(draws.split(max_rows), checked.split(max_rows), strict=True):
            parts.append(_weigh(layer, reading, rows.take(chunk // num_draws), again))
            bar.update(len(chunk))
    shape = (num_rows, num_draws)
    weights = _Weights(*(torch.cat(part).view(shape) for part in zip(*parts, strict=True)))
    errors = _errors_of_rows(weights, checked.view(shape))
    _warn_of_long_steps(layer, errors)
    estimate = summarise(weights.log_weights, errors)
    # The noise of each draw raises its share of the mean of the weights.
    bias = _weighted_mean(weights.log_weights, weights.variances) / 2
    return estimate._replace(log_prob=estimate.log_prob - bias)


def summarise(log_weights: Tensor, errors: Tensor | None = None) -> DiscreteLogProb:
    """Estimate from log-weights (B, M) with errors (B,) of the logarithm that all draws share."""
    num = log_weights.shape[1]
    total = log_weights.logsumexp(1)
    none = total.isneginf()
    share = (2 * total - (2 * log_weights).logsumexp(1)).exp() / num
    share = share.masked_fill(none, 0.0)
    error = ((1 / share - 1).clamp_min(0) / max(1, num - 1)).sqrt()
    if errors is not None:
        error = error + errors
        fewer = 1 / (1 + (num - 1) * error.square())
        share = torch.where(none, share, share.minimum(fewer))
    # A single draw says nothing of its own error.
    error = error if num > 1 else torch.full_like(error, math.inf)
    return DiscreteLogProb(total - math.log(num), error, share)


def _weigh(layer: AssignmentLayer, reading: Reading, rows: _Labels, checked: Tensor) -> _Weights:
    """Weigh one draw for each of A rows, and follow the paths of those checked (A,) again."""
    draws = _draw(layer, reading, rows)
    zeros = torch.zeros_like(draws.log_ratio)
    # Draws that cannot count need no path.
    counts = draws.log_ratio.isfinite()
    if not bool(counts.any()):
        return _Weights(draws.log_ratio, zeros, zeros)
    followed, again = draws.take(counts), checked[counts]
    log_density, variances = _log_density(layer, followed)
    step_errors = torch.zeros_like(log_density)
    if bool(again.any()):
        changes = _step_errors(layer, followed.take(again), log_density[again])
        step_errors = step_errors.index_put((again,), changes)
    return _Weights(
        draws.log_ratio.index_put((counts,), followed.log_ratio + log_density),
        zeros.index_put((counts,), variances),
        zeros.index_put((counts,), step_errors),
    )


def _draw(layer: AssignmentLayer, reading: Reading, rows: _Labels) -> _Draws:
    """Draw from the proposal, once for each of A rows."""
    labels, context, mask = rows
    path, simplices = layer.field.path, layer.field.path.simplices
    noise = path.draw_start(len(labels), layer.field.like)
    end = noise.new_full((len(labels),), path.horizon.end)
    corners = path.logits(labels, torch.zeros_like(noise), end)
    proposed, log_shares = reading.propose(simplices, labels, corners)
    v = path.logits(proposed, noise, end)
    # The density of the mixture, over that of the component that was drawn from.
    evidence = path.evidence(v, end)
    beside = evidence - evidence.gather(-1, proposed.unsqueeze(-1))
    log_mixture = _sum_observed((log_shares + beside).logsumexp(-1), mask)
    observed = None if mask is None else simplices.coordinate_mask(mask)
    deviation = 1 - path.horizon.contraction * path.horizon.end
    log_component = _log_normal(simplices.to_coordinates(noise), observed, deviation)
    log_reading = _sum_observed(reading.log_prob(simplices, v, labels), mask)
    log_ratio = log_reading - log_component - log_mixture
    return _Draws(simplices.to_coordinates(v), log_ratio, context, mask, observed)


def _log_density(
    layer: AssignmentLayer,
    draws: _Draws,
    times: Sequence[float] | None = None,
    probes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Integrate the log-density of the flow at draws, and the variance of its noise, both (A,)."""
    backwards = (layer.times if times is None else times)[::-1]
    noise, integrals = layer.transport(
        draws.coordinates, backwards, draws.context, draws.mask, probes
    )
    check_finite(noise, "the noise at the start of the paths", DIVERGED)
    check_finite(integrals, "the integral of the divergence", DIVERGED)
    num = integrals.shape[1]
    variance = integrals.var(1) / num if num > 1 else torch.zeros_like(integrals[:, 0])
    return _log_normal(noise, draws.observed, 1.0) + integrals.mean(1), variance


def _step_errors(layer: AssignmentLayer, draws: _Draws, log_density: Tensor) -> Tensor:
    """Estimate errors (A,) of the log-density by the steps, from other numbers of steps."""
    if not layer.estimates:
        return _change_by_steps(layer, draws, log_density, None)
    # With probes of its own each density would differ by its noise.
    probes = draw_probes("rademacher", layer.num_probes, draws.coordinates)
    reference = _log_density(layer, draws, layer.times, probes)[0]
    return _change_by_steps(layer, draws, reference, probes)


def _change_by_steps(
    layer: AssignmentLayer, draws: _Draws, log_density: Tensor, probes: Tensor | None
) -> Tensor:
    def change(grid: Sequence[float]) -> Tensor:
        return (_log_density(layer, draws, grid, probes)[0] - log_density).abs()

    times, fall = layer.times, 2 ** ORDERS[layer.solver]
    if len(times) > 2:
        by_half = change([*times[:-1:2], times[-1]])
        if float(by_half.max()) <= _LARGEST_ERROR:
            return by_half * _SAFETY / (fall - 1)
    midpoints = [(a + b) / 2 for a, b in pairwise(times)]
    return change(sorted([*times, *midpoints])) * fall / (fall - 1)


def _errors_of_rows(weights: _Weights, checked: Tensor) -> Tensor:
    """Average the errors of the steps over the checked draws, to errors (B,) of every row."""
    log_weights = weights.log_weights.masked_fill(~checked, -torch.inf)
    errors = _weighted_mean(log_weights, weights.step_errors)
    return errors.maximum(errors.mean())


def _warn_of_long_steps(layer: AssignmentLayer, errors: Tensor) -> None:
    wrong = errors > _LARGEST_ERROR
    if bool(wrong.any()):
        warnings.warn(
            f"The {len(layer.times) - 1} steps of the solver are too few: with twice as many, "
            f"{int(wrong.sum())} of {len(errors)} log-probabilities differ by more than "
            f"{_LARGEST_ERROR} nats, the worst by {float(errors.max()):.2g}. The stated errors "
            "hold that. Pass more steps, or a solver of higher order.",
            NumericalWarning,
            stacklevel=level_of_caller(),
        )


def _weighted_mean(log_weights: Tensor, values: Tensor) -> Tensor:
    """Average values (B, M) by weights to means (B,), zero where all weights are."""
    return (log_weights.softmax(1).nan_to_num() * values).sum(1)


def _log_normal(noise: Tensor, observed: Tensor | None, deviation: float) -> Tensor:
    """Log-density (B,) of deviation times noise (B, d), over the observed coordinates."""
    each = -0.5 * (noise.square() + _LOG_TWO_PI) - math.log(deviation)
    return _sum_observed(each, observed)


def _sum_observed(values: Tensor, mask: Tensor | None) -> Tensor:
    """Sum values (B, n) over the columns that a mask (B, n) observes, all without a mask."""
    return (values if mask is None else values.masked_fill(~mask, 0.0)).sum(1)

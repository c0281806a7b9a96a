r"""Probabilities of labels under an assignment flow, by importance sampling.

The flow gives a density :math:`p_T` of coordinates :math:`m` at the end, and a reading the
probability :math:`r(\beta \mid m)` of labels given these. With the law of the path given the
labels as the proposal, normal around the corner :math:`t \rho u_\beta` with deviation :math:`s`,

.. math:: p(\beta) = \int r(\beta \mid m)\, p_T(m)\, dm
          = \mathbb E_{m \sim q_\beta} \frac{r(\beta \mid m)\, p_T(m)}{q_\beta(m)}.

For an exact field :math:`p_T = \sum_\beta p(\beta)\, q_\beta`, so all weights are equal where the
corners are far apart. Logits that are read by a draw from their weights count for other labels as
well; there the corner is drawn first, for each variable on its own, and :math:`q_\beta` is a
product of mixtures.

The estimate of :math:`p(\beta)` is unbiased, so that its logarithm is, in the mean, too small:
negative log-likelihoods are too large, by about half of the squared standard error.

A divergence estimated by probes is unbiased, but its exponential is not: noise of variance
:math:`\sigma^2` in the logarithm of a weight raises its mean by :math:`\sigma^2 / 2`. The noise is
a sum of independent terms, nearly normal, and its variance can be told from several probes, so
that it is taken off again.

The density is that of the steps of a solver, and is wrong by as much as they err. Some paths of
every row are therefore followed again, first in half as many steps. If that changes little, the
error of a method of order :math:`p` is about :math:`2^p - 1` times smaller than the change. Else
they are followed in twice as many steps, and the error is :math:`2^p / (2^p - 1)` times that
change. With the errors :math:`\delta_j` of the log-weights the logarithm of the estimate is wrong
by at most :math:`\sum_j w_j |\delta_j| / \sum_j w_j` to first order. Few paths are followed again,
so no row is given less than the mean of all rows.
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

from ..checks import check_finite
from ..errors import NumericalWarning
from ..flows.assignment.integration import ORDERS
from ..flows.assignment.layer import AssignmentLayer
from ..flows.assignment.readings import Reading
from ..volume.probes import draw_probes

__all__ = ["DIVERGED", "DiscreteLogProb", "importance_log_prob"]

DIVERGED = "The network has diverged, or the steps are too long for it. Train at a lower rate."

_LOG_TWO_PI = math.log(2 * math.pi)
# One draw in this many for a row of labels is followed again, in other steps.
_DRAWS_PER_CHECK = 16
# Error of the steps, in nats, above which a warning comes.
_LARGEST_ERROR = 0.05
# For errors that have been found from longer steps alone.
_SAFETY = 2.0


class DiscreteLogProb(NamedTuple):
    """Estimated log-probabilities of labels.

    Attributes:
        log_prob: Logarithm of the estimated probability, (B,), in nats; minus infinity where no
            draw of the proposal counted.
        standard_error: Standard error of that logarithm, (B,), to first order, with the error of
            the solver's steps added; infinite where there is no estimate. It means little where
            the effective sample size is a few draws.
        effective_sample_size: Share of the draws that count, (B,), between 0 and 1, or less where
            the error of the steps is as large as that of fewer draws. It cannot be less than that
            of a single draw, so with few draws it says little.
    """

    log_prob: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor


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
    """Log-probabilities of labels, or of those of them that a mask says are observed.

    Args:
        layer: The flow on coordinates.
        reading: How labels are read off them.
        labels: Classes (B, n), checked.
        num_importance_samples: Draws M for each of them.
        context: One row per sample.
        mask: Booleans (B, n), true where observed.
        max_rows: Paths that are followed at a time.
        progress: Whether to show a progress bar over the draws.

    Returns:
        :class:`DiscreteLogProb`.

    Warns:
        NumericalWarning: If the error of the steps is above .05 nats.
    """
    shape = (len(labels), num_importance_samples)
    index = torch.arange(shape[0] * shape[1], device=labels.device)
    checked = index % shape[1] < max(1, shape[1] // _DRAWS_PER_CHECK)
    parts: list[_Weights] = []
    with tqdm(total=len(index), unit="draw", disable=not progress) as bar:
        for chunk, again in zip(index.split(max_rows), checked.split(max_rows), strict=True):
            rows = chunk // shape[1]
            here = None if context is None else context[rows]
            observed = None if mask is None else mask[rows]
            parts.append(_weigh(layer, reading, labels[rows], here, observed, again))
            bar.update(len(rows))
    log_weights, variances, step_errors = (
        torch.cat(p).view(shape) for p in zip(*parts, strict=True)
    )
    errors = _weighted_mean(log_weights.masked_fill(~checked.view(shape), -torch.inf), step_errors)
    errors = errors.maximum(errors.mean())
    _warn_of_long_steps(layer, errors)
    found = summarise(log_weights, errors)
    # The noise of each draw raises its share of the mean of the weights.
    return found._replace(log_prob=found.log_prob - _weighted_mean(log_weights, variances) / 2)


def summarise(log_weights: Tensor, errors: Tensor | None = None) -> DiscreteLogProb:
    r"""The estimate that importance weights make, with its error.

    .. math:: \hat p = \frac1M \sum_j w_j, \qquad
              \mathrm{ESS} = \frac{(\sum_j w_j)^2}{M \sum_j w_j^2}, \qquad
              \mathrm{se}(\log \hat p) = \sqrt{\frac{1 / \mathrm{ESS} - 1}{M - 1}}

    An error of the weights themselves is added to the standard error, and the effective sample
    size is that of draws with so large a standard error.

    Args:
        log_weights: Logarithms of the weights, (B, M), in nats.
        errors: Errors of the logarithm that all draws share, (B,), in nats; None for none.

    Examples:
        >>> log_prob, error, share = summarise(torch.tensor([[0.0, -torch.inf]]))
        >>> log_prob, error, share
        (tensor([-0.6931]), tensor([1.]), tensor([0.5000]))
    """
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


class _Weights(NamedTuple):
    """Logarithms of the importance weights of draws (A,), and what is known of their errors.

    Attributes:
        log_weights: In nats.
        variances: Variances of the noise of their divergences; zero where no path was followed.
        step_errors: Errors of the steps in absolute value; zero where no other steps were tried.
    """

    log_weights: Tensor
    variances: Tensor
    step_errors: Tensor


class _Draws(NamedTuple):
    """Draws (A,) of the proposal that count.

    Attributes:
        coordinates: Where they are, (A, d).
        log_ratio: Probability of being read as the labels over the density of the proposal.
        context: One row for each.
        mask: Booleans (A, n), true where observed.
    """

    coordinates: Tensor
    log_ratio: Tensor
    context: Tensor | None
    mask: Tensor | None

    def take(self, chosen: Tensor) -> _Draws:
        """The draws that booleans (A,) choose."""
        context, mask = (None if x is None else x[chosen] for x in (self.context, self.mask))
        return _Draws(self.coordinates[chosen], self.log_ratio[chosen], context, mask)


def _weigh(
    layer: AssignmentLayer,
    reading: Reading,
    labels: Tensor,
    context: Tensor | None,
    mask: Tensor | None,
    checked: Tensor,
) -> _Weights:
    """Weigh one draw for each row of labels (A, n); follow the checked ones (A,) twice."""
    draws = _draw(layer, reading, labels, context, mask)
    # Draws that cannot count need no path.
    alive = draws.log_ratio.isfinite()
    variances, step_errors = (torch.zeros_like(draws.log_ratio) for _ in range(2))
    if not bool(alive.any()):
        return _Weights(draws.log_ratio, variances, step_errors)
    followed = draws.take(alive)
    log_density, variance = _log_density(layer, followed)
    log_weights = draws.log_ratio.index_put((alive,), followed.log_ratio + log_density)
    variances = variances.index_put((alive,), variance)
    if bool((again := checked[alive]).any()):
        found = _step_errors(layer, followed.take(again), log_density[again])
        step_errors = step_errors.index_put((alive & checked,), found)
    return _Weights(log_weights, variances, step_errors)


def _draw(
    layer: AssignmentLayer,
    reading: Reading,
    labels: Tensor,
    context: Tensor | None,
    mask: Tensor | None,
) -> _Draws:
    """Draw from the proposal, once for each row of labels (A, n)."""
    path, simplices = layer.field.path, layer.field.path.simplices
    start = path.draw_start(len(labels), layer.field.like)
    end = torch.full_like(start[:, 0, 0], path.horizon.end)
    corners = path.logits(labels, torch.zeros_like(start), end)
    proposed, log_shares = reading.propose(simplices, labels, corners)
    v = path.logits(proposed, start, end)
    # The density of a mixture, over that of the normal law which has been drawn from.
    evidence = path.evidence(v, end)
    evidence = evidence - evidence.gather(-1, proposed.unsqueeze(-1))
    log_mixture = (log_shares + evidence).logsumexp(-1)
    log_reading = reading.log_prob(simplices, v, labels)
    observed = None
    if mask is not None:
        log_mixture = log_mixture * mask
        log_reading = log_reading.masked_fill(~mask, 0.0)
        observed = simplices.coordinate_mask(mask)
    deviation = 1 - path.horizon.contraction * path.horizon.end
    log_proposal = _log_normal(simplices.to_coordinates(start), observed, deviation)
    log_ratio = log_reading.sum(1) - log_proposal - log_mixture.sum(1)
    return _Draws(simplices.to_coordinates(v), log_ratio, context, mask)


def _log_density(
    layer: AssignmentLayer,
    draws: _Draws,
    times: Sequence[float] | None = None,
    probes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-density of the flow at draws, and the variance of its noise, both (A,)."""
    simplices = layer.field.path.simplices
    times = layer.times if times is None else times
    noise, integrals = layer.transport(
        draws.coordinates, times[::-1], draws.context, draws.mask, probes
    )
    check_finite(noise, "the noise at the start of the paths", DIVERGED)
    check_finite(integrals, "the integral of the divergence", DIVERGED)
    num = integrals.shape[1]
    variance = integrals.var(1) / num if num > 1 else torch.zeros_like(integrals[:, 0])
    observed = None if draws.mask is None else simplices.coordinate_mask(draws.mask)
    return _log_normal(noise, observed, 1.0) + integrals.mean(1), variance


def _step_errors(layer: AssignmentLayer, draws: _Draws, log_density: Tensor) -> Tensor:
    """Errors of the steps in the log-density at draws, (A,), by other numbers of steps."""
    times, probes = layer.times, None
    if layer.estimates:
        # With probes of its own, each density would differ by its noise.
        probes = draw_probes("rademacher", layer.num_probes, draws.coordinates)
        log_density = _log_density(layer, draws, times, probes)[0]

    def change(grid: Sequence[float]) -> Tensor:
        return (_log_density(layer, draws, grid, probes)[0] - log_density).abs()

    fall = 2 ** ORDERS[layer.solver]
    if len(times) > 2:
        found = change([*times[:-1:2], times[-1]])
        if float(found.max()) <= _LARGEST_ERROR:
            return found * _SAFETY / (fall - 1)
    halves = [(a + b) / 2 for a, b in pairwise(times)]
    return change(sorted([*times, *halves])) * fall / (fall - 1)


def _weighted_mean(log_weights: Tensor, values: Tensor) -> Tensor:
    """Means (B,) of values (B, M) by weights, zero where all weights are."""
    return (log_weights.softmax(1).nan_to_num() * values).sum(1)


def _warn_of_long_steps(layer: AssignmentLayer, errors: Tensor) -> None:
    wrong = errors > _LARGEST_ERROR
    if bool(wrong.any()):
        warnings.warn(
            f"The {len(layer.times) - 1} steps of the solver are too few: with twice as many, "
            f"{int(wrong.sum())} of {len(errors)} log-probabilities differ by more than "
            f"{_LARGEST_ERROR} nats, the worst by {float(errors.max()):.2g}. The stated errors "
            "hold that. Pass more steps, or a solver of higher order.",
            NumericalWarning,
            stacklevel=4,
        )


def _log_normal(noise: Tensor, observed: Tensor | None, deviation: float) -> Tensor:
    """Log-density (B,) of deviation times noise (B, d), of the observed coordinates."""
    each = -0.5 * (noise.square() + _LOG_TWO_PI) - math.log(deviation)
    return each.sum(1) if observed is None else (each * observed).sum(1)

r"""Probabilities of labels under an assignment flow, by importance sampling.

The flow gives a density :math:`p_T` of coordinates :math:`m` at the end, and a reading the
probability :math:`r(\beta \mid m)` of labels given these. With the law of the path given the
labels as the proposal, normal around the corner :math:`t \rho u_\beta` with deviation :math:`s`,

.. math:: p(\beta) = \int r(\beta \mid m)\, p_T(m)\, dm
          = \mathbb E_{m \sim q_\beta} \frac{r(\beta \mid m)\, p_T(m)}{q_\beta(m)}.

Of an exact field :math:`p_T = \sum_\beta p(\beta)\, q_\beta`, and the weights are all equal where
the corners are far apart. Of logits read by a draw from their weights some near other corners
count as well; so there the corner is drawn first, for each variable on its own, and
:math:`q_\beta` is a product of mixtures.

The estimate of :math:`p(\beta)` is unbiased, so that its logarithm is, in the mean, too small:
negative log-likelihoods are too large, by about half of the squared standard error.

A divergence estimated by probes is unbiased, but its exponential is not: noise of variance
:math:`\sigma^2` in the logarithm of a weight raises its mean by :math:`\sigma^2 / 2`. The noise is
a sum of independent terms, nearly normal, and its variance can be told from several probes, so
that it is taken off again.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .checks import check_finite
from .flows.assignment.layer import AssignmentLayer
from .flows.assignment.readings import Reading

__all__ = ["DIVERGED", "DiscreteLogProb", "importance_log_prob"]

DIVERGED = "The network has diverged, or the steps are too long for it. Train at a lower rate."

_LOG_TWO_PI = math.log(2 * math.pi)


class DiscreteLogProb(NamedTuple):
    """Estimated log-probabilities of labels.

    Attributes:
        log_prob: Logarithm of the estimated probability, (B,), in nats; minus infinity where no
            draw of the proposal counted.
        standard_error: Of that logarithm, (B,), to first order; infinite where there is no
            estimate. It means little where the effective sample size is a few draws.
        effective_sample_size: Share of the draws that count, (B,), between 0 and 1. It cannot be
            less than that of a single draw, so that of few draws it says little.
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
    """
    index = torch.arange(len(labels), device=labels.device)
    index = index.repeat_interleave(num_importance_samples)
    weights, noise = [], []
    with tqdm(total=len(index), unit="draw", disable=not progress) as bar:
        for rows in index.split(max_rows):
            here = None if context is None else context[rows]
            observed = None if mask is None else mask[rows]
            drawn = _log_weights(layer, reading, labels[rows], here, observed)
            weights.append(drawn[0])
            noise.append(drawn[1])
            bar.update(len(rows))
    shape = (len(labels), num_importance_samples)
    log_weights, variances = torch.cat(weights).view(shape), torch.cat(noise).view(shape)
    found = summarise(log_weights)
    # What each draw adds to the mean of the weights is raised by its own noise.
    shares = (log_weights - log_weights.logsumexp(1, keepdim=True)).exp().nan_to_num()
    return found._replace(log_prob=found.log_prob - (shares * variances).sum(1) / 2)


def summarise(log_weights: Tensor) -> DiscreteLogProb:
    r"""The estimate that importance weights make, with its error.

    .. math:: \hat p = \frac1M \sum_j w_j, \qquad
              \mathrm{ESS} = \frac{(\sum_j w_j)^2}{M \sum_j w_j^2}, \qquad
              \mathrm{se}(\log \hat p) = \sqrt{\frac{1 / \mathrm{ESS} - 1}{M - 1}}

    Args:
        log_weights: Logarithms of the weights, (B, M), in nats.

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
    # A single draw says nothing of its own error.
    error = error if num > 1 else torch.full_like(error, math.inf)
    return DiscreteLogProb(total - math.log(num), error, share)


def _log_weights(
    layer: AssignmentLayer,
    reading: Reading,
    labels: Tensor,
    context: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Logarithms of the importance weights of one draw for each row of labels, (B,).

    Beside them is the variance of the noise of their divergence, (B,), zero where no path was
    followed.
    """
    path, simplices = layer.field.path, layer.field.path.simplices
    start = path.draw_start(len(labels), layer.field.like)
    end = torch.full_like(start[:, 0, 0], path.horizon.end)
    corners = path.logits(labels, torch.zeros_like(start), end)
    proposed, log_shares = reading.propose(simplices, labels, corners)
    v = path.logits(proposed, start, end)
    # The density of a mixture, over that of the normal law which has been drawn from.
    evidence = path.evidence(v, end)
    evidence = evidence - evidence.gather(-1, proposed.unsqueeze(-1))
    log_ratio = (log_shares + evidence).logsumexp(-1)
    if mask is not None:
        log_ratio = log_ratio * mask
    log_reading = reading.log_prob(simplices, v, labels)
    if mask is not None:
        log_reading = log_reading.masked_fill(~mask, 0.0)
    log_weights = log_reading.sum(1)
    # Draws that cannot count need no path.
    alive = log_weights.isfinite()
    variance = torch.zeros_like(log_weights)
    if not bool(alive.any()):
        return log_weights, variance
    v, start = v[alive], start[alive]
    context, mask = (None if x is None else x[alive] for x in (context, mask))
    m = simplices.to_coordinates(v)
    observed = None if mask is None else simplices.coordinate_mask(mask)
    noise, integrals = layer.transport(m, layer.times[::-1], context, mask)
    check_finite(noise, "the noise at the start of the paths", DIVERGED)
    check_finite(integrals, "the integral of the divergence", DIVERGED)
    num = integrals.shape[1]
    spread = integrals.var(1) / num if num > 1 else torch.zeros_like(integrals[:, 0])
    deviation = 1 - path.horizon.contraction * path.horizon.end
    log_density = _log_normal(noise, observed, 1.0) + integrals.mean(1)
    log_proposal = _log_normal(simplices.to_coordinates(start), observed, deviation)
    log_proposal = log_proposal + log_ratio[alive].sum(1)
    gained = log_weights[alive] + log_density - log_proposal
    return log_weights.index_put((alive,), gained), variance.index_put((alive,), spread)


def _log_normal(noise: Tensor, observed: Tensor | None, deviation: float) -> Tensor:
    """Log-density (B,) of deviation times noise (B, d), of the observed coordinates."""
    each = -0.5 * (noise.square() + _LOG_TWO_PI) - math.log(deviation)
    return each.sum(1) if observed is None else (each * observed).sum(1)

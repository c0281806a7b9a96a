"""Scores of generative models of tables, and their summary over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import StratifiedKFold, cross_val_score
from torch import Tensor

import normflows_injective as nfi

__all__ = ["Candidate", "Scores", "classifier_two_sample", "markdown_table", "score"]


class Candidate(NamedTuple):
    """The functions of a model that its scores need.

    Attributes:
        sample: Number of samples to samples (n, D).
        project: Data (B, D) to their reconstructions (B, D).
        log_prob: Data (B, D) to exact log-densities (B,) in nats, or None without a density.
        on_manifold: Whether samples lie on the manifold of the reconstructions.
    """

    sample: Callable[[int], Tensor]
    project: Callable[[Tensor], Tensor]
    log_prob: Callable[[Tensor], Tensor] | None = None
    on_manifold: bool = True


class Scores(NamedTuple):
    """Scores of one model on a test set; NaN where a model has no such score.

    Attributes:
        frechet: Squared 2-Wasserstein distance between Gaussian fits to samples and test set.
        c2st: Accuracy of a classifier between samples and test set.
        c2st_projected: Accuracy of a classifier between samples and the reconstructed test set.
        reconstruction: Squared error summed over dimensions, mean over the test set.
        nll: Exact negative log-likelihood of the reconstructed test set, in nats.
    """

    frechet: float
    c2st: float
    c2st_projected: float
    reconstruction: float
    nll: float


# Heading and decimals of every score, in the order of Scores.
COLUMNS = {
    "FID-like": 3,
    "c2st": 3,
    "c2st-proj": 3,
    "reconstruction": 3,
    "exact test NLL": 2,
}


@torch.no_grad()
def score(candidate: Candidate, test: Tensor) -> Scores:
    """Score a model against test data (N, D), with as many samples as test rows."""
    samples, projected = candidate.sample(len(test)), candidate.project(test)
    return Scores(
        frechet=float(nfi.diagnostics.frechet_distance(samples, test)),
        c2st=classifier_two_sample(samples, test),
        c2st_projected=(
            classifier_two_sample(samples, projected) if candidate.on_manifold else math.nan
        ),
        reconstruction=float((test - projected).square().sum(1).mean()),
        nll=_mean_nll(candidate.log_prob, test) if candidate.log_prob else math.nan,
    )


def classifier_two_sample(samples: Tensor, reference: Tensor, seed: int = 0) -> float:
    """Accuracy of a gradient boosting classifier between two sets of rows (N, D), over five folds.

    Equal numbers of rows make 0.5 the score of equal distributions.
    """
    rows = torch.cat([samples, reference]).numpy()
    labels = np.repeat([0, 1], [len(samples), len(reference)])
    folds = StratifiedKFold(n_splits=5, shuffle=True, random_state=seed)
    classifier = HistGradientBoostingClassifier(random_state=seed)
    return float(cross_val_score(classifier, rows, labels, cv=folds).mean())


def markdown_table(results: Mapping[str, Sequence[Scores]]) -> str:
    """A row for each model, each entry the mean over seeds with its standard error."""
    lines = [["model", *COLUMNS], ["---", *["---:"] * len(COLUMNS)]]
    for name, scores in results.items():
        by_score = zip(*scores, strict=True)
        entries = map(_entry, by_score, COLUMNS.values())
        lines.append([name, *entries])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _entry(values: Sequence[float], decimals: int) -> str:
    if any(math.isnan(value) for value in values):
        return "–"
    if len(values) == 1:
        return f"{values[0]:.{decimals}f}"
    standard_error = stdev(values) / math.sqrt(len(values))
    return f"{mean(values):.{decimals}f} ± {standard_error:.{decimals}f}"


def _mean_nll(log_prob: Callable[[Tensor], Tensor], test: Tensor) -> float:
    return -float(torch.cat([log_prob(batch) for batch in test.split(1024)]).mean())

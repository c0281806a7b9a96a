"""Scores of a trained model on test rows, and what it costs to use it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.shared.records import Record

from .data import Split
from .distances import classifier_two_sample, energy_distance, sliced_wasserstein
from .job import Fitted

__all__ = ["Limits", "anomalies", "score", "tube_score"]

# A cell that is shifted moves by so many standard deviations of its column.
SHIFT = 3.0
SAMPLES_OF_TIMES = 10_000
MATCHING_STEPS = (8, 30)


class Limits(NamedTuple):
    """Most test rows of the scores.

    Attributes:
        samples: Of distances and classifiers.
        densities: Of the NLL and the tube's score.
        anomalies: Of every kind of anomalies, and of ordinary rows beside them.
        timed_densities: Of the densities whose time is taken.
        timed_samples: Samples whose time is taken.
    """

    samples: int = 5000
    densities: int = 2000
    anomalies: int = 500
    timed_densities: int = 500
    timed_samples: int = 2000


class Points(NamedTuple):
    """Scores of single rows, each (N,): squared error, and minus the log-density of the image."""

    error: Tensor
    nll: Tensor


@torch.no_grad()
def score(fitted: Fitted, split: Split, latent_dim: int, limits: Limits, seed: int) -> Record:
    """All scores by their names."""
    fitted.model.eval()
    test = split.test[: limits.samples]
    projected, samples = fitted.model.project(test), fitted.sample(len(test))
    like_data = samples if fitted.sample_data is None else fitted.sample_data(len(test))
    # The first call of a Jacobian product sets up what later ones share.
    fitted.model.log_prob(test[:2])
    timed = test[: limits.timed_densities]
    density_seconds = _seconds(lambda: fitted.model.log_prob(timed))
    points = _points(fitted, split.test[: limits.densities])
    reconstruction = float((test - projected).square().sum(1).mean())
    nll = float(points.nll.mean())
    codim = split.dim - latent_dim
    return {
        "reconstruction": reconstruction,
        "c2st_projected": classifier_two_sample(samples, projected, seed),
        "c2st_data": classifier_two_sample(like_data, test, seed),
        "sliced_projected": sliced_wasserstein(samples, projected),
        "sliced_data": sliced_wasserstein(like_data, test),
        "energy_projected": energy_distance(samples, projected),
        "energy_data": energy_distance(like_data, test),
        "nll": nll,
        "tube": tube_score(float(points.error.mean()), nll, codim),
        "density_rows_per_second": len(timed) / density_seconds,
        **_sampling(fitted, projected, limits.timed_samples, seed),
        **_detection(fitted, split, points, limits, codim, seed),
    }


def tube_score(reconstruction: float, nll: float, codim: int) -> float:
    r"""Negative log-likelihood of a Gaussian tube of the best width, up to a constant.

    .. math:: \tfrac{D-d}2 \log \frac{\text{rec}}{D-d} + \text{NLL}

    The tube of variance :math:`\text{rec} / (D - d)` around the manifold has :math:`\tfrac{D-d}2
    \log 2 \pi e` nats more. ``rec`` is the squared error summed over dimensions, of the same
    rows as the NLL.
    """
    return 0.5 * codim * math.log(reconstruction / codim) + nll


def anomalies(split: Split, most: int, seed: int) -> dict[str, Tensor]:
    """Anomalous rows by their kinds, as many of each as there are ordinary ones.

    * permuted: every column of the test rows in an order of its own;
    * shifted: one cell of each row moved by three deviations up or down;
    * others: rows of another class, if the set has one.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = split.test[:most]
    orders = torch.rand(rows.shape, generator=generator).argsort(0)
    shifted = rows.clone()
    # A column without spread, as the border of images, would not be an anomaly of its own size.
    deviation = split.train.std(0)
    spread = (deviation > 0.1 * deviation.max()).nonzero()[:, 0]
    columns = spread[torch.randint(len(spread), (len(rows),), generator=generator)]
    signs = 2.0 * torch.randint(2, (len(rows),), generator=generator) - 1
    shifted[torch.arange(len(rows)), columns] += SHIFT * signs * deviation[columns]
    kinds = {"permuted": rows.gather(0, orders), "shifted": shifted}
    if split.others is not None:
        kinds["others"] = split.others[:most]
    return kinds


def _points(fitted: Fitted, rows: Tensor) -> Points:
    parts = rows.split(500)
    error = torch.cat([fitted.model.reconstruction_error(part) for part in parts])
    nll = -torch.cat([fitted.model.log_prob(part) for part in parts])
    return Points(error.double(), nll.double())


def _detection(
    fitted: Fitted, split: Split, points: Points, limits: Limits, codim: int, seed: int
) -> Record:
    """Areas under the ROC curves, by kind and score, given the points of the first test rows.

    The tube's score of a row is its squared error over twice the variance of the tube, of the
    validation rows, less the log-density of its image.
    """
    held_out = split.validation[: limits.samples]
    variance = float(fitted.model.reconstruction_error(held_out).mean()) / codim
    ordinary = Points(*(values[: limits.anomalies] for values in points))
    record: Record = {}
    for kind, rows in anomalies(split, limits.anomalies, seed).items():
        unusual = _points(fitted, rows)
        both = Points(*map(torch.cat, zip(ordinary, unusual, strict=True)))
        labels = torch.arange(len(both.error)) >= len(ordinary.error)
        by_tube = both.error / (2 * variance) + both.nll
        scores = {"error": both.error, "nll": both.nll, "tube": by_tube}
        for name, values in scores.items():
            finite = torch.nan_to_num(values, nan=1e30, posinf=1e30, neginf=-1e30)
            record[f"auroc_{kind}_{name}"] = float(roc_auc_score(labels, finite))
    return record


def _sampling(fitted: Fitted, projected: Tensor, timed: int, seed: int) -> Record:
    """Seconds for 10,000 samples; of a matching law for both numbers of steps."""

    def seconds(steps: int | None = None) -> float:
        return _seconds(lambda: fitted.sample(timed, steps)) * SAMPLES_OF_TIMES / timed

    record: Record = {"sample_seconds": seconds()}
    if fitted.matching is not None:
        many = MATCHING_STEPS[1]
        samples = fitted.sample(len(projected), many)
        record[f"sample_seconds_{many}"] = seconds(many)
        record[f"c2st_projected_{many}"] = classifier_two_sample(samples, projected, seed)
    return record


def _seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start

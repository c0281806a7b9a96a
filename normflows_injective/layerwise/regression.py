"""Regression of conditional means and standard deviations, never worse than its start."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import (
    check_batch,
    check_count,
    check_counts,
    check_finite,
    check_not_negative,
    check_positive,
)
from ..errors import DtypeError, OptionError, ShapeError
from .block import ConditionalMoments, Moments, partial_step

_CHECKS = 20  # number of times that a fit looks at the validation rows
_PATIENCE = 6  # number of looks without an improvement after which it stops
# Added to the eigenvalues of the correlations of b. In many dimensions A F / 2N nats of noise
# drown the structure that least squares find; a ridge r leaves the share 1 / (1 + r)^2 of them.
_RIDGES = (0.0, 0.1, 1.0, 10.0)  # none first
# Least squares with less noise than this, in nats, need no ridge.
_LITTLE_NOISE = 0.02


class MomentRegression(NamedTuple):
    """Options of the regressions that fit conditional moments.

    Attributes:
        hidden: Widths of the hidden layers.
        steps: Largest number of steps of Adam.
        batch_size: Number of rows in a step.
        learning_rate: First learning rate; it falls to zero by a cosine.
        weight_decay: Decoupled decay of the weights.
        max_log_ratio: Soft bound of the log-ratio of a conditional to the residual standard
            deviation. A wide one measures gaps where variances vanish; a narrow one is safe in
            blocks that have to serve new data.

    Examples:
        >>> MomentRegression((8,), steps=20).batch_size
        512
    """

    hidden: tuple[int, ...] = (32, 32)
    steps: int = 800
    batch_size: int = 512
    learning_rate: float = 5e-3
    weight_decay: float = 1e-4
    max_log_ratio: float = 8.0


class Rows(NamedTuple):
    """Coordinates b (N, F) by which the moments of coordinates a (N, A) are predicted."""

    b: Tensor
    a: Tensor


class MomentFit(NamedTuple):
    """The models that :func:`fit_moments` chose by the validation rows, without gradients."""

    moments: ConditionalMoments
    """The best of all."""
    linear: ConditionalMoments
    """The best without a network: linear, constant, or the identity."""
    validation_gain: float
    """Mean gain of ``moments`` in nats; it is not negative."""
    rejected: ConditionalMoments | None
    """The better of the constant and the linear model without a ridge if ``moments`` is the
    identity, else None. The scatter of its gains tells which gains look like zero; that of models
    near the identity may be as small as one likes."""


class _Judged(NamedTuple):
    """A model, and its gains (N,) in nats on the validation rows."""

    moments: ConditionalMoments
    gains: Tensor

    def mean(self) -> float:
        """Mean gain, with NaN, from numbers out of range, as the worst of all."""
        mean = float(self.gains.mean())
        return -math.inf if math.isnan(mean) else mean

    def beats(self, other: _Judged, margin: float) -> bool:
        """Whether the mean difference of the gains exceeds some standard errors of it."""
        more = self.gains - other.gains
        return bool(more.mean() > margin * more.std() / len(more) ** 0.5)


def step_gains(
    moments: ConditionalMoments, b: Tensor, a: Tensor, step_size: float = 1.0
) -> Tensor:
    r"""Gains (N,) in nats: by how much an affine block lowers the loss of every sample.

    .. math:: \tfrac12 \lVert a \rVert^2 - \tfrac12 \lVert S a + T \rVert^2 + \sum_i \log S_i

    On rows that the moments have not seen, the mean over samples is an unbiased estimate of the
    gain of this block, which at a full step is at most the coupling gap.
    """
    with torch.no_grad():
        return _gains(moments(b), a, step_size)


def fit_moments(
    train: Rows,
    validation: Rows,
    options: MomentRegression,
    generator: torch.Generator,
    step_size: float = 1.0,
    margin: float = 0.0,
) -> MomentFit:
    r"""Fit the moments of a given b by their Gaussian likelihood.

    Constant moments, and linear means with constant variances, have a closed form,

    .. math:: W = C_{at} (C_{tt} + r I)^{-1}, \qquad \sigma_0^2 = \frac{\mathrm{RSS}}{N - 1 - d},
              \qquad d = \mathrm{tr}\, C_{tt} (C_{tt} + r I)^{-1},

    with standardised t and a few ridges r, which also draw constant moments towards those of a
    standard normal. The best of these models on the validation rows starts a network, fitted by
    Adam and kept in its best state there. In the order of identity, constant, linear, network, a
    kind of model wins if one of its ridges gains on the simpler kinds by ``margin`` standard
    errors; a model that wins by chance loses on other rows.

    With enough rows that least squares lose less than 0.02 nats to noise, these alone stand
    between the identity and the network, which starts from them: choosing among ridges, and
    starting from the choice, would only add noise.
    """

    def judged(moments: ConditionalMoments) -> _Judged:
        return _Judged(moments, step_gains(moments, *validation, step_size))

    identity = _Judged(_blank(train), torch.zeros_like(validation.b[:, 0]))
    simple, best_of_kinds, without_ridge = identity, [], []
    noise = 0.5 * train.a.shape[1] * train.b.shape[1] / len(train.b)
    is_noisy = noise >= _LITTLE_NOISE
    kinds = (_constant(train), _linear(train)) if is_noisy else (_linear(train)[:1],)
    for models in kinds:
        candidates = [judged(moments) for moments in models]
        best = max(candidates, key=_Judged.mean)
        without_ridge.append(candidates[0])
        best_of_kinds.append(best)
        # A short step towards the right moments gains little, but twice as surely as a full one:
        # it tells whether there is something, and the mean tells how far to go.
        is_sure = any(candidate.beats(simple, margin) for candidate in candidates)
        if is_sure and best.mean() > simple.mean():
            simple = best
    start = max((identity, *best_of_kinds), key=_Judged.mean) if is_noisy else best_of_kinds[0]
    network = judged(_boost(start.moments, train, validation, options, generator, step_size))
    if network.beats(simple, margin):
        return MomentFit(network.moments, simple.moments, float(network.gains.mean()), None)
    rejected = max(without_ridge, key=_Judged.mean).moments if simple is identity else None
    return MomentFit(simple.moments, simple.moments, float(simple.gains.mean()), rejected)


def new_generator() -> torch.Generator:
    """A generator of its own of seed 0, on the CPU whatever the default device."""
    return torch.Generator(device="cpu").manual_seed(0)


def _gains(moments: Moments, a: Tensor, step_size: float) -> Tensor:
    log_scale, shift = partial_step(moments, step_size)
    image = a * log_scale.exp() + shift
    return (0.5 * (a.square() - image.square()) + log_scale).sum(1)


def _blank(train: Rows) -> ConditionalMoments:
    b, a = train
    return ConditionalMoments.blank(b.shape[1], a.shape[1], None, 1.0, b)


def _constant(train: Rows) -> list[ConditionalMoments]:
    """Mean and variance without b, for every ridge."""
    models: list[ConditionalMoments] = []
    for ridge in _RIDGES:
        moments = _blank(train)
        moments.intercept.copy_(train.a.mean(0))
        _set_variance(moments, train, 0.0)
        moments.intercept.div_(1 + ridge)
        moments.log_std.div_(1 + ridge)
        models.append(moments)
    return models


def _linear(train: Rows) -> list[ConditionalMoments]:
    """A linear mean for every ridge."""
    b, a = train
    intercept = a.mean(0)
    models: list[ConditionalMoments] = []
    for ridge in _RIDGES:
        moments = _blank(train)
        moments.standardise(b)
        if not models:
            t = (b - moments.centre) / moments.spread
            values, basis = torch.linalg.eigh(t.T @ t / len(t))
            # Rounding leaves less than zero, and no ridge at all would divide by it.
            values = values.clamp(min=0)
            cross = basis.T @ (t.T @ (a - intercept)) / len(t)
        damped = values + ridge + 1e3 * torch.finfo(b.dtype).eps
        moments.intercept.copy_(intercept)
        moments.weight.copy_((basis @ (cross / damped.unsqueeze(1))).T)
        _set_variance(moments, train, float((values / damped).sum()))
        models.append(moments)
    return models


def _set_variance(moments: ConditionalMoments, train: Rows, spent: float) -> None:
    """Set the residual variance of a model that has spent some degrees of freedom on slopes."""
    b, a = train
    residuals = a - moments(b).mean
    variance = residuals.square().sum(0) / max(1.0, len(a) - 1 - spent)
    floor = torch.finfo(a.dtype).eps ** 2 * (1 + a.square().mean(0))
    moments.log_std.copy_(0.5 * torch.maximum(variance, floor).log())


def _boost(
    start: ConditionalMoments,
    train: Rows,
    validation: Rows,
    options: MomentRegression,
    generator: torch.Generator,
    step_size: float,
) -> ConditionalMoments:
    """A simple model and a network on top, in its best state on the validation rows."""
    b, a = train
    moments = start.with_network(options.hidden, options.max_log_ratio, generator)
    # A start with slopes has been standardised by the same rows, and one without has none to move.
    moments.standardise(b)
    net = moments.net
    assert net is not None  # for the type checker
    features, validation_features = moments.features(b), moments.features(validation.b)

    def validation_gain() -> float:
        with torch.no_grad():
            predicted = moments.from_features(validation.b, validation_features)
            return float(_gains(predicted, validation.a, step_size).mean())

    # The simple part is in closed form and stays: a network that adds to it is enough.
    trained = [parameter.requires_grad_() for parameter in net.parameters()]
    optimizer = torch.optim.AdamW(
        trained, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    every = max(1, options.steps // _CHECKS)
    best_gain, num_worse = validation_gain(), 0
    best = {name: value.clone() for name, value in net.state_dict().items()}
    order, position = _shuffled(len(b), generator, b.device), 0
    for step in range(1, options.steps + 1):
        if position >= len(b):
            order, position = _shuffled(len(b), generator, b.device), 0
        rows = order[position : position + options.batch_size]
        position += options.batch_size
        with torch.enable_grad():
            mean, log_std = moments.from_features(b[rows], features[rows])
            scores = (a[rows] - mean) * (-log_std).exp()
            loss = (0.5 * scores.square() + log_std).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 5.0)
        optimizer.step()
        schedule.step()
        if step % every:
            continue
        gain = validation_gain()
        num_worse += 1
        if gain > best_gain:
            best_gain, num_worse = gain, 0
            best = {name: value.clone() for name, value in net.state_dict().items()}
        if num_worse >= _PATIENCE or not math.isfinite(gain):
            break
    net.load_state_dict(best)
    return moments.requires_grad_(False)


def _shuffled(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randperm(count, generator=generator, device=generator.device).to(device)


def check_regression(options: MomentRegression) -> MomentRegression:
    """The options of a regression in plain numbers, or an OptionError if one is out of range."""
    if not isinstance(options, MomentRegression):
        raise OptionError(
            f"regression must be a MomentRegression, got {type(options).__name__}. Give "
            "nfi.diagnostics.MomentRegression(...), or None for the defaults."
        )
    return MomentRegression(
        hidden=check_counts(options.hidden, "hidden", example="(32, 32)"),
        steps=check_count(options.steps, "steps"),
        batch_size=check_count(options.batch_size, "batch_size"),
        learning_rate=check_positive(options.learning_rate, "learning_rate"),
        weight_decay=check_not_negative(options.weight_decay, "weight_decay"),
        max_log_ratio=check_positive(options.max_log_ratio, "max_log_ratio"),
    )


def check_latents(z: Tensor, least: int, name: str) -> None:
    """Raise unless z (N, D) is a finite matrix of enough rows and at least two columns."""
    if z.dim() != 2:
        raise ShapeError(
            f"z must have shape (N, D), a row of D coordinates for each of N samples, got "
            f"{tuple(z.shape)}. Flatten images first; a single coordinate is not enough."
        )
    check_batch(z, "z")
    if z.dtype not in (torch.float32, torch.float64):
        raise DtypeError(
            f"{name} needs float32 or float64, in which regressions can be solved, got {z.dtype}. "
            "Convert with z.float()."
        )
    if z.shape[1] < 2:
        raise ShapeError(
            f"{name} needs at least two dimensions, one that is given and one that is moved, got "
            "D = 1. In one dimension a monotone spline does what couplings cannot."
        )
    if len(z) < least:
        raise OptionError(
            f"{name} needs at least {least} samples, so that each part can judge another, got "
            f"{len(z)}. Draw more."
        )
    advice = "Standardise the columns: of numbers as large, no variance can be taken."
    check_finite(z.square().sum(0), "the sum of squares of z over the samples", advice)

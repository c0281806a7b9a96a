"""Regression of conditional means and standard deviations that never ends worse than it began."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_count, check_counts, check_not_negative, check_positive
from ..errors import OptionError
from .block import ConditionalMoments, Moments, partial_step

__all__ = [
    "MomentFit",
    "MomentRegression",
    "check_regression",
    "fit_moments",
    "new_generator",
    "step_gains",
]

_CHECKS = 20  # how often the fit looks at the validation rows
_PATIENCE = 6  # looks without an improvement after which it stops
# Added to the eigenvalues of the correlations of b. In many dimensions A F / 2N nats of noise
# drown what a least squares fit finds; a ridge r leaves of them the share 1 / (1 + r)^2.
_RIDGES = (0.0, 0.1, 1.0, 10.0)  # none first
# Nats of that noise below which least squares need no ridge.
_LITTLE_NOISE = 0.02


class MomentRegression(NamedTuple):
    """How conditional moments are fitted.

    Attributes:
        hidden: Widths of the hidden layers.
        steps: Number of steps of Adam, at most.
        batch_size: Rows of a step.
        learning_rate: Its first value, which falls to zero by a cosine.
        weight_decay: Decoupled decay of the weights.
        max_log_ratio: Soft bound of the log-ratio of a conditional to the residual standard
            deviation. A wide one measures gaps where variances vanish; a narrow one is safe in
            blocks that have to serve new data.
    """

    hidden: tuple[int, ...] = (32, 32)
    steps: int = 800
    batch_size: int = 512
    learning_rate: float = 5e-3
    weight_decay: float = 1e-4
    max_log_ratio: float = 8.0


class MomentFit(NamedTuple):
    """What :func:`fit_moments` found.

    Attributes:
        moments: The model that is best on the validation rows, without gradients.
        linear: The best one without a network: linear, constant, or the identity.
        validation_gain: Mean gain in nats of ``moments`` on those rows; it is not negative.
        rejected: Where ``moments`` is the identity, the better one there of the constant and the
            linear one without a ridge; else None. How its gain scatters says what could not be
            told from zero; models next to the identity scatter as little as one likes.
    """

    moments: ConditionalMoments
    linear: ConditionalMoments
    validation_gain: float
    rejected: ConditionalMoments | None


def step_gains(
    moments: ConditionalMoments, b: Tensor, a: Tensor, step_size: float = 1.0
) -> Tensor:
    r"""By how much an affine block lowers the loss, for every sample.

    .. math:: \tfrac12 \lVert a \rVert^2 - \tfrac12 \lVert S a + T \rVert^2 + \sum_i \log S_i

    On rows that the moments have not seen, the mean over samples is an unbiased estimate of what
    this block gains, which at a full step is at most the coupling gap.

    Args:
        moments: Conditional moments of a given b.
        b: Coordinates that are given, (N, F).
        a: Coordinates that are moved, (N, A).
        step_size: :math:`\eta` of :func:`~normflows_injective.layerwise.block.partial_step`.

    Returns:
        Gains in nats, (N,).

    Examples:
        >>> step_gains(ConditionalMoments(1, 1, None), torch.ones(2, 1), torch.ones(2, 1)).tolist()
        [0.0, 0.0]
    """
    with torch.no_grad():
        return _gains(moments(b), a, step_size)


def fit_moments(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    options: MomentRegression,
    generator: torch.Generator,
    step_size: float = 1.0,
    margin: float = 0.0,
) -> MomentFit:
    r"""Fit the moments of a given b by their Gaussian likelihood.

    First, in closed form, constant moments, and linear means with constant variances,

    .. math:: W = C_{at} (C_{tt} + r I)^{-1}, \qquad \sigma_0^2 = \frac{\mathrm{RSS}}{N - 1 - d},
              \qquad d = \mathrm{tr}\, C_{tt} (C_{tt} + r I)^{-1},

    with standardised t, for some ridges r, by which also constant moments are drawn towards those
    of a standard normal; the validation rows choose one. From what is best on these, a network, by
    Adam, of which the state is kept that does best there. In the order of identity, constant,
    linear, network, a kind of model wins if one of its ridges gains on the simpler kinds.

    Where there are so many rows that least squares lose less than 0.02 nats to noise, they alone
    stand between the identity and the network, which starts from them: choosing among ridges, and
    starting from what was chosen, would only add the noise of the choice.

    Args:
        train: b and a, (N, F) and (N, A), to fit on.
        validation: b and a to choose by.
        options: Size and pace of the fit.
        generator: Source of weights and batches; torch's own is left alone.
        step_size: Step at which the validation gain is taken.
        margin: Number of standard errors by which a model has to gain on a simpler one. One that
            wins by chance loses on other rows.

    Returns:
        :class:`MomentFit`.

    Examples:
        >>> b, noise = torch.randn(2, 400, 1, generator=new_generator(0))
        >>> a = 2 * b + 0.1 * noise
        >>> rows = (b[:200], a[:200]), (b[200:], a[200:])
        >>> fit = fit_moments(*rows, MomentRegression(steps=20), new_generator(1))
        >>> round(float(fit.linear.weight.sum() / fit.linear.spread.sum()), 1)
        2.0
    """

    def judged(moments: ConditionalMoments) -> Tensor:
        return step_gains(moments, *validation, step_size)

    identity, nothing = _blank(train), torch.zeros_like(validation[0][:, 0])
    simple, fitted, full = (identity, nothing), [], []
    b, a = train
    is_safe = 0.5 * a.shape[1] * b.shape[1] / len(b) < _LITTLE_NOISE
    families = (_linear(train)[:1],) if is_safe else (_constant(train), _linear(train))
    for family in families:
        candidates = [(moments, judged(moments)) for moments in family]
        full.append(candidates[0])
        fitted.append(max(candidates, key=_mean))
        # A short step towards the right moments gains little, but twice as surely as a full one:
        # it tells whether there is something, and the mean tells how far to go.
        sure = any(_is_gain(gains - simple[1], margin) for _, gains in candidates)
        if sure and _mean(fitted[-1]) > _mean(simple):
            simple = fitted[-1]
    start = fitted[0] if is_safe else max((identity, nothing), *fitted, key=_mean)
    network = _boost(start[0], train, validation, options, generator, step_size)
    by_network = judged(network)
    if _is_gain(by_network - simple[1], margin):
        return MomentFit(network, simple[0], float(by_network.mean()), None)
    rejected = max(full, key=_mean)[0] if simple[0] is identity else None
    return MomentFit(simple[0], simple[0], float(simple[1].mean()), rejected)


def _mean(judged: tuple[ConditionalMoments, Tensor]) -> float:
    """Mean of the gains (N,) of a model; NaN, of numbers out of range, is worst."""
    mean = float(judged[1].mean())
    return -math.inf if math.isnan(mean) else mean


def _is_gain(gains: Tensor, margin: float) -> bool:
    """Whether gains (N,) have a mean above zero by some standard errors of it."""
    return bool(gains.mean() > margin * gains.std() / len(gains) ** 0.5)


def new_generator(seed: int) -> torch.Generator:
    """A generator of its own on the CPU, whatever the default device.

    Examples:
        >>> new_generator(3).initial_seed()
        3
    """
    return torch.Generator(device="cpu").manual_seed(seed)


def _gains(found: Moments, a: Tensor, step_size: float) -> Tensor:
    log_scale, shift = partial_step(found, step_size)
    moved = a * log_scale.exp() + shift
    return (0.5 * (a.square() - moved.square()) + log_scale).sum(1)


def _blank(train: tuple[Tensor, Tensor]) -> ConditionalMoments:
    b, a = train
    return ConditionalMoments.blank(b.shape[1], a.shape[1], None, 1.0, b)


def _constant(train: tuple[Tensor, Tensor]) -> list[ConditionalMoments]:
    """Mean and variance without b, for every ridge."""
    found: list[ConditionalMoments] = []
    for ridge in _RIDGES:
        moments = _blank(train)
        moments.intercept.copy_(train[1].mean(0))
        _set_variance(moments, train, 0.0)
        moments.intercept.div_(1 + ridge)
        moments.log_std.div_(1 + ridge)
        found.append(moments)
    return found


def _linear(train: tuple[Tensor, Tensor]) -> list[ConditionalMoments]:
    """A linear mean for every ridge."""
    b, a = train
    intercept = a.mean(0)
    found: list[ConditionalMoments] = []
    for ridge in _RIDGES:
        moments = _blank(train)
        moments.standardise(b)
        if not found:
            t = (b - moments.centre) / moments.spread
            values, basis = torch.linalg.eigh(t.T @ t / len(t))
            # Rounding leaves less than zero, and no ridge at all would divide by it.
            values = values.clamp(min=0)
            cross = basis.T @ (t.T @ (a - intercept)) / len(t)
        damped = values + ridge + 1e3 * torch.finfo(b.dtype).eps
        moments.intercept.copy_(intercept)
        moments.weight.copy_((basis @ (cross / damped.unsqueeze(1))).T)
        _set_variance(moments, train, float((values / damped).sum()))
        found.append(moments)
    return found


def _set_variance(moments: ConditionalMoments, train: tuple[Tensor, Tensor], spent: float) -> None:
    """Set the residual variance of a model that has spent some degrees of freedom on slopes."""
    b, a = train
    residuals = a - moments(b).mean
    variance = residuals.square().sum(0) / max(1.0, len(a) - 1 - spent)
    floor = torch.finfo(a.dtype).eps ** 2 * (1 + a.square().mean(0))
    moments.log_std.copy_(0.5 * torch.maximum(variance, floor).log())


def _boost(
    start: ConditionalMoments,
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
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
    features, judged = moments.features(b), moments.features(validation[0])

    def validation_gain() -> float:
        with torch.no_grad():
            found = moments.from_features(validation[0], judged)
            return float(_gains(found, validation[1], step_size).mean())

    # The simple part stays: it is in closed form, and a network that adds to it is enough.
    trained = [parameter.requires_grad_() for parameter in net.parameters()]
    optimizer = torch.optim.AdamW(
        trained, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    every = max(1, options.steps // _CHECKS)
    best_gain, since = validation_gain(), 0
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
        since += 1
        if gain > best_gain:
            best_gain, since = gain, 0
            best = {name: value.clone() for name, value in net.state_dict().items()}
        if since >= _PATIENCE or not math.isfinite(gain):
            break
    net.load_state_dict(best)
    return moments.requires_grad_(False)


def _shuffled(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randperm(count, generator=generator, device=generator.device).to(device)


def check_regression(options: MomentRegression) -> MomentRegression:
    """The options of a regression in plain numbers, each of which is in range.

    Args:
        options: Candidate.

    Raises:
        OptionError: If it is no :class:`MomentRegression`, or one of its numbers is out of range.

    Examples:
        >>> check_regression(MomentRegression(hidden=[8], steps=10)).hidden
        (8,)
    """
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

"""Regression of conditional means and standard deviations that never ends worse than it began."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_batch, check_count
from ..errors import OptionError, ShapeError
from ..flows.moment_block import ConditionalMoments, Moments, partial_step

__all__ = [
    "MomentFit",
    "MomentRegression",
    "check_latents",
    "fit_moments",
    "new_generator",
    "step_gains",
]

_CHECKS = 20  # how often the fit looks at the validation rows
_PATIENCE = 6  # looks without an improvement after which it stops


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
        linear: The linear one, or the identity where that is better on the validation rows.
        validation_gain: Mean gain in nats of ``moments`` on those rows; it is not negative.
    """

    moments: ConditionalMoments
    linear: ConditionalMoments
    validation_gain: float


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
        step_size: :math:`\eta` of :func:`~normflows_injective.flows.moment_block.partial_step`.

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
    """Fit the moments of a given b by their Gaussian likelihood.

    First the least squares solution, in closed form; from there a network, by Adam, of which the
    state is kept that does best on the validation rows. Among the identity, the linear one and the
    network a model wins if it gains on the simpler ones there.

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
    identity = _empty(train)
    linear = _least_squares(train)
    gains = torch.zeros_like(validation[0][:, 0])
    by_linear = step_gains(linear, *validation, step_size)
    simple = identity
    if _is_gain(by_linear, margin):
        simple, gains = linear, by_linear
    network = _boost(linear, train, validation, options, generator, step_size)
    by_network = step_gains(network, *validation, step_size)
    if _is_gain(by_network - gains, margin):
        return MomentFit(network, simple, float(by_network.mean()))
    return MomentFit(simple, simple, float(gains.mean()))


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


def check_latents(z: Tensor, least: int, name: str) -> None:
    """Raise unless z is a matrix of enough rows and at least two columns.

    Args:
        z: Candidate of shape (N, D).
        least: Number of rows that are needed.
        name: What needs them.

    Raises:
        ShapeError: If it is not a matrix, or has one column.
        OptionError: If there are too few rows.
        NonFiniteError: If it holds NaN or infinity.

    Examples:
        >>> check_latents(torch.zeros(100, 2), 100, "coupling_gap")
    """
    check_batch(z, "z")
    if z.dim() != 2:
        raise ShapeError(f"z must have shape (N, D), got {tuple(z.shape)}. Flatten images first.")
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


def _gains(found: Moments, a: Tensor, step_size: float) -> Tensor:
    log_scale, shift = partial_step(found, step_size)
    moved = a * log_scale.exp() + shift
    return (0.5 * (a.square() - moved.square()) + log_scale).sum(1)


def _empty(
    train: tuple[Tensor, Tensor], options: MomentRegression | None = None
) -> ConditionalMoments:
    b, a = train
    hidden, bound = (None, 1.0) if options is None else (options.hidden, options.max_log_ratio)
    # On the meta device no weights are drawn, so that torch's own generator stays where it is.
    with torch.device("meta"):
        moments = ConditionalMoments(b.shape[1], a.shape[1], hidden, bound)
    moments = moments.to_empty(device=b.device).to(b.dtype).requires_grad_(False)
    for tensor in (*moments.parameters(), moments.centre, moments.scores, moments.knots):
        tensor.zero_()
    moments.spread.fill_(1.0)
    return moments


def _least_squares(train: tuple[Tensor, Tensor]) -> ConditionalMoments:
    b, a = train
    moments = _empty(train)
    tiny = torch.finfo(b.dtype).eps
    moments.standardise(b)
    t = (b - moments.centre) / moments.spread
    intercept = a.mean(0)
    gram = t.T @ t / len(t) + 1e3 * tiny * torch.eye(t.shape[1], dtype=t.dtype, device=t.device)
    weight = torch.linalg.solve(gram, t.T @ (a - intercept) / len(t)).T
    residuals = a - intercept - t @ weight.T
    freedom = max(1, len(t) - 1 - t.shape[1])
    variance = residuals.square().sum(0) / freedom
    floor = tiny**2 * (1 + a.square().mean(0))
    moments.intercept.copy_(intercept)
    moments.weight.copy_(weight)
    moments.log_std.copy_(0.5 * torch.maximum(variance, floor).log())
    return moments


def _boost(
    linear: ConditionalMoments,
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    options: MomentRegression,
    generator: torch.Generator,
    step_size: float,
) -> ConditionalMoments:
    """The linear model and a network on top, in its best state on the validation rows."""
    b, a = train
    moments = _empty(train, options)
    moments.load_state_dict(linear.state_dict(), strict=False)
    net = moments.net
    assert net is not None  # for the type checker
    _draw_weights(net, generator)
    features, judged = moments.features(b), moments.features(validation[0])

    def validation_gain() -> float:
        with torch.no_grad():
            found = moments.from_features(validation[0], judged)
            return float(_gains(found, validation[1], step_size).mean())

    # The linear part stays: it is in closed form, and a network that adds to it is enough.
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


def _draw_weights(net: nn.Module, generator: torch.Generator) -> None:
    """LeCun's law for all layers but the last, which stays at zero."""
    layers = [module for module in net.modules() if isinstance(module, nn.Linear)]
    for layer in layers[:-1]:
        draws = torch.randn(layer.weight.shape, generator=generator, device=generator.device)
        layer.weight.copy_((draws / layer.in_features**0.5).to(layer.weight))


def _shuffled(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randperm(count, generator=generator, device=generator.device).to(device)


def check_regression(options: MomentRegression) -> None:
    """Raise unless the numbers of a regression are positive.

    Examples:
        >>> check_regression(MomentRegression())
    """
    check_count(options.steps, "steps")
    check_count(options.batch_size, "batch_size")
    if not options.learning_rate > 0:
        raise OptionError(f"learning_rate must be positive, got {options.learning_rate!r}.")

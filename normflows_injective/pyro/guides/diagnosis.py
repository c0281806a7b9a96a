"""How far to trust a guide, in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer.importance import vectorized_importance_weights
from torch import Generator, Tensor

from ...checks import check_count, check_flag, describe
from ...diagnostics.figures import new_figure
from ...diagnostics.importance import smoothed
from ...errors import NonFiniteError, OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Shapes below which means of weights have a finite variance, and are reliable at all.
_GOOD, _USABLE = 0.5, 0.7
_SHOWN = 5


class SiteFit(NamedTuple):
    """How weights move the marginal law of one component of a latent variable.

    Attributes:
        name: The variable, and the index of the component.
        shift: Difference of the weighted and the guide's mean, in deviations of the guide.
        ratio: Weighted deviation over the guide's.
    """

    name: str
    shift: float
    ratio: float

    @property
    def log_ratio(self) -> float:
        """The logarithm of the ratio."""
        return math.log(max(self.ratio, 1e-300))

    @property
    def size(self) -> float:
        """How far off the component is: the shift, or the logarithm of the ratio."""
        return max(abs(self.shift), abs(self.log_ratio))


@dataclass(frozen=True, eq=False, repr=False)
class GuideReport:
    """Result of :func:`diagnose`; ``print`` it, ``plot()`` it, or ``resample`` draws.

    Attributes:
        elbo: Evidence bound in nats.
        error: Its standard error.
        pareto_k: Shape of the tail of the importance weights.
        effective: Effective number of weighted draws.
        num_samples: Number of draws.
        verdict: What ``pareto_k`` means, in words.
        sites: Components of latent variables, those that weights move most first.
        samples: Draws (n, *) of the guide by the names of the variables.
        log_weights: Smoothed and normalised log-weights (n,) of the draws.
    """

    elbo: float
    error: float
    pareto_k: float
    effective: float
    num_samples: int
    verdict: str
    sites: tuple[SiteFit, ...]
    samples: dict[str, Tensor]
    log_weights: Tensor

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        lines = [
            f"ELBO {self.elbo:.4g} +- {self.error:.2g} nats, from {self.num_samples} draws",
            f"Pareto k {self.pareto_k:.2f}: {self.verdict}",
            f"effective number of draws {self.effective:.0f}",
            f"{'most moved by the weights':28}{'shift':>8}{'ratio':>8}  of deviations",
        ]
        lines += [f"{s.name:28}{s.shift:>8.2f}{s.ratio:>8.2f}" for s in self.sites[:_SHOWN]]
        return "\n".join(lines)

    def resample(self, num_samples: int, generator: Generator | None = None) -> dict[str, Tensor]:
        """Draws by importance resampling, with replacement.

        Args:
            num_samples: Number of draws m, best well below the effective number.
            generator: Source of the choice, torch's global one by default.

        Returns:
            Draws (m, *) of every latent variable by its name.
        """
        count = check_count(num_samples, "num_samples")
        weights = self.log_weights.exp().cpu()
        chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
        return {name: values[chosen.to(values.device)] for name, values in self.samples.items()}

    def plot(self) -> Figure:
        """Draw the weights in order, and how far the weights move the components.

        Returns:
            A matplotlib figure, not shown and not saved.

        Raises:
            OptionError: If matplotlib is not installed.
        """
        figure = new_figure(10, 4)
        weights, components = figure.subplots(1, 2)
        relative = (self.log_weights.double().sort(descending=True).values.cpu()).exp()
        ranks = torch.arange(1, len(relative) + 1)
        weights.loglog(ranks.numpy(), (relative * len(relative)).clamp(min=1e-12).numpy())
        weights.set(
            xlabel="rank of the draw",
            ylabel="weight, 1 for equal weights",
            title=f"k = {self.pareto_k:.2f}, {self.effective:.0f} effective draws",
        )
        shown = self.sites[:_SHOWN][::-1]
        places = range(len(shown))
        components.barh([p + 0.2 for p in places], [s.shift for s in shown], 0.35, label="shift")
        logs = [s.log_ratio for s in shown]
        components.barh([p - 0.2 for p in places], logs, 0.35, label="log of ratio")
        components.set_yticks([*places], [s.name for s in shown])
        components.axvline(0.0, color="k", lw=0.8)
        components.set(xlabel="in deviations of the guide", title="Most moved by the weights")
        components.legend()
        return figure


@torch.no_grad()
def diagnose(
    guide: Callable[..., Any],
    *args: Any,
    model: Callable[..., Any] | None = None,
    num_samples: int = 1000,
    parallel: bool = False,
    **kwargs: Any,
) -> GuideReport:
    r"""Judge a trained guide by importance weights of its own draws.

    .. math:: \log w_i = \log p(x, \theta_i) - \log q(\theta_i), \qquad \theta_i \sim q

    Their mean is the evidence bound. The shape k of their tail says whether expectations under the
    posterior can be had by weighting draws: below 0.7 they can, and ``resample`` gives draws.
    Components whose mean or deviation the weights change are those that the guide fits worst. The
    weights of ``AutoInjective`` are those of draws with their auxiliary variable, which are as
    valid and vary more.

    Args:
        guide: A guide of Pyro, ours or another.
        *args: Arguments of the model.
        model: The model; by default that of an autoguide.
        num_samples: Number of draws n.
        parallel: Whether all draws are made at once, for models that broadcast over a plate
            around them.
        **kwargs: Keyword arguments of the model.

    Returns:
        :class:`GuideReport`.

    Raises:
        OptionError: If the guide does not know its model and none is given.
        NonFiniteError: If no weight is finite.

    References:
        Yao et al., Yes, but did it work?: evaluating variational inference, arXiv 1802.02538.

    Examples:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import normflows_injective.pyro as nfp
        >>> def model():
        ...     pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> guide = nfp.AutoFlow(model).build(warm_start="pathfinder")
        >>> report = diagnose(guide, num_samples=100)
        >>> report.pareto_k < 0.7, abs(report.elbo) < 0.1
        (True, True)
    """
    model = getattr(guide, "model", None) if model is None else model
    if not callable(guide) or not callable(model):
        raise OptionError(
            f"guide must be a guide of Pyro that knows its model, got {describe(guide)}. Give "
            "model=, the model that it was trained for."
        )
    num_samples = check_count(num_samples, "num_samples", least=2)
    with poutine.block():
        if check_flag(parallel, "parallel"):
            log_weights, samples = _at_once(model, guide, num_samples, args, kwargs)
        else:
            log_weights, samples = _one_by_one(model, guide, num_samples, args, kwargs)
    finite = log_weights.isfinite()
    if not bool(finite.any()):
        raise NonFiniteError(
            "No draw of the guide has a finite weight. Train it, or look whether its draws have a "
            "density under the model."
        )
    # A draw without a density under the model has weight zero, and an infinite bound.
    result = smoothed(torch.where(finite, log_weights, -1e30))
    error = float(log_weights.double().std() / num_samples**0.5)
    return GuideReport(
        elbo=float(log_weights.double().mean()),
        error=error,
        pareto_k=result.shape,
        effective=result.effective,
        num_samples=num_samples,
        verdict=_verdict(result.shape),
        sites=_ranked(samples, result.log_weights.exp()),
        samples=samples,
        log_weights=result.log_weights,
    )


def _one_by_one(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    count: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Tensor, dict[str, Tensor]]:
    weights: list[Tensor] = []
    drawn: dict[str, list[Tensor]] = {}
    for _ in range(count):
        guided, replayed = _traces(model, guide, args, kwargs)
        weights.append(torch.as_tensor(replayed.log_prob_sum() - guided.log_prob_sum()))
        for name, value in _latents(guided):
            drawn.setdefault(name, []).append(value)
    samples = {name: torch.stack(values) for name, values in drawn.items()}
    return torch.stack(weights), samples


def _at_once(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    count: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Tensor, dict[str, Tensor]]:
    alone, replayed = _traces(model, guide, args, kwargs)
    sites = [*alone.nodes.values(), *replayed.nodes.values()]
    frames = [f for s in sites if s["type"] == "sample" for f in s["cond_indep_stack"]]
    nesting = max((-frame.dim for frame in frames if frame.dim is not None), default=0)
    log_weights, _, guided = vectorized_importance_weights(
        model,
        guide,
        *args,
        num_samples=count,
        max_plate_nesting=nesting,
        normalized=False,
        **kwargs,
    )
    shapes = {name: value.shape for name, value in _latents(alone)}
    samples = {name: value.reshape(count, *shapes[name]) for name, value in _latents(guided)}
    return log_weights, samples


def _traces(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, Any]:
    """The traces of one draw of a guide, and of the model at that draw."""
    guided = poutine.trace(guide).get_trace(*args, **kwargs)
    return guided, poutine.trace(poutine.replay(model, trace=guided)).get_trace(*args, **kwargs)


def _latents(trace: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the latent variables that a guide has drawn."""
    for name, site in trace.nodes.items():
        is_latent = site["type"] == "sample" and not site["is_observed"]
        if (
            is_latent
            and not site["infer"].get("is_auxiliary")
            and not hasattr(site["fn"], "subsample_size")
        ):
            yield name, site["value"]


def _ranked(samples: dict[str, Tensor], weights: Tensor) -> tuple[SiteFit, ...]:
    fits = []
    for name, values in samples.items():
        flat = values.detach().double().reshape(len(values), -1)
        share = weights.double().to(flat.device).unsqueeze(1)
        mean, deviation = flat.mean(0), flat.std(0, correction=0)
        weighted = (share * flat).sum(0)
        spread = (share * (flat - weighted).square()).sum(0).sqrt()
        unit = deviation.clamp(min=1e-300)
        shifts, ratios = ((weighted - mean) / unit).tolist(), (spread / unit).tolist()
        indices = product(*map(range, values.shape[1:]))
        for index, shift, ratio in zip(indices, shifts, ratios, strict=True):
            label = f"{name}[{', '.join(map(str, index))}]" if len(shifts) > 1 else name
            fits.append(SiteFit(label, shift, ratio))
    return tuple(sorted(fits, key=lambda fit: fit.size, reverse=True))


def _verdict(shape: float) -> str:
    if shape < _GOOD:
        return "the guide is close to the posterior, and weights correct what is left"
    if shape < _USABLE:
        return "usable, if draws are weighted or resampled"
    if math.isinf(shape):
        return "too few draws to say: give num_samples"
    return "not to be trusted: weights are dominated by a few draws; train longer or change guide"

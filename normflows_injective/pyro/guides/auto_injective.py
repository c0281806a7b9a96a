"""A guide on a curved sheet of low dimension, thickened by noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import normflows as nf
import torch
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor, nn

from ...checks import check_choice, check_count, check_flag, describe, is_number
from ...distributions.thickened.decoders import (
    CurvedDecoder,
    Decoder,
    DifferentiatedDecoder,
    LinearDecoder,
)
from ...distributions.thickened.noise import Noise, make_noise
from ...distributions.thickened.reverse import LaplaceReverse, LearnedReverse, Reverse
from ...errors import ContextError, DtypeError, InjectiveFlowError, OptionError, ShapeError
from ...flows.guides.normal_fit import NormalFit
from ...flows.layer_stack import LayerStack
from ...host.context import needs_context
from ...modules.constants import ConstantCopies
from ..laws.thickened import Frame, Thickened
from ..memory.buffers import make_contiguous
from .joint_guide import JointGuide
from .log_joint import LogJoint

Factory = Callable[[int, int], nn.Module]
# The largest rank that is taken by itself.
_MOST_RANK = 10
NOISES = ("mvn", "diagonal", "low_rank")


class _Options(NamedTuple):
    """Options of a guide, in a tuple so that modules are not registered a second time."""

    noise: str
    decoder: nn.Module | Factory | str | None
    reverse: nn.Module | Factory | str
    latent_flows: Callable[[int], Sequence[Any]] | None
    noise_rank: int | None


@final
class AutoInjective(JointGuide):
    r"""A guide on a curved sheet of low dimension, thickened by Gaussian noise.

    .. math::

        \theta = \mathrm{loc} + S\,(h(u) + L \varepsilon), \qquad
        u \sim N(0, I_r), \quad \varepsilon \sim N(0, I_D), \quad S = \operatorname{diag}(scale)

    over the unconstrained latents :math:`\theta` (D,) of the model. With a linear h it is a
    multivariate normal, ``AutoLowRankMultivariateNormal`` if the noise is diagonal; with a curved
    one it follows bent posteriors. The density of :math:`\theta` is an integral over u, bounded
    with a reverse model :math:`r(u \mid \theta)`:

    .. math::

        E\big[\log p(\theta, x) + \log r(u \mid \theta) - \log q(u) - \log q(\theta \mid u)\big]
        \le \mathrm{ELBO} \le \log p(x),

    with slack :math:`E\,\mathrm{KL}(q(u \mid \theta) \,\|\, r)`, which is zero for a linear h
    and shrinks as ``num_aux`` grows.

    The noise cannot be left out. Without it the guide is singular: its density is against the area
    of the sheet, the model's density against volume, and their ratio bounds nothing. For a normal
    target with variances :math:`\lambda_i` its best value is
    :math:`\log Z - \tfrac12 \sum_{i > r} \log 2\pi\lambda_i`, above the evidence, and a sheet
    that fills space makes it arbitrarily large.

    Training finds local optima: u turns first to the directions in which the posterior is widest,
    bent or not, and a guide that has spent all of it there stays a normal one. Take a rank some
    units above the number of bent directions, and compare a few seeds by their objective.
    ``JitTrace_ELBO`` works with the built-in decoders only.

    Args:
        model: A Pyro model whose latent variables are continuous.
        rank: Width r of u, at least 1 and less than D, or one for one latent; None takes
            :math:`\sqrt D`, up to 10.
        noise: ``"mvn"``, L lower triangular, for D up to some hundreds; ``"diagonal"``; or
            ``"low_rank"``, diagonal plus low rank, linear in D.
        decoder: h. None is a linear map plus a small network; ``"linear"`` a linear map;
            otherwise a module that maps (B, r) to (B, D), or a callable of (r, D) that returns
            one. The guide trains it. It should be smooth and start with values of about one.
        reverse: r. ``"laplace"`` is one Gauss-Newton step from a learned linear start; otherwise
            a module that maps standardised values (B, D) to (B, 2 r), mean and log-scale, or a
            callable of (r, D) that returns one.
        num_aux: Number of extra draws from the reverse model, each of which costs a decoder call.
        latent_flows: A callable of r that returns flows of normflows on r coordinates, applied to
            u before h; None for none.
        noise_rank: Rank of ``"low_rank"`` noise; None takes :math:`\sqrt D`.
        init_loc_fn: Pyro's initialisation of latent variables.
        init_scale: Approximate standard deviation of every unconstrained latent at the start; None
            takes those of the curvature of the model's density there, from 0.1 to 1.
        path_gradient: Whether the guide's own density is differentiated along the path of the
            draw alone. Its variance vanishes at the optimum; but the noise that it takes away
            leads sheets out of flat shapes, so that it is off by default.
        guard: Multiple of the usual gradient of a draw to which a larger one is scaled down; None
            for no limit.

    Raises:
        OptionError: If the noise is None, an option is unknown or out of its range, or, when the
            model is first run, if the rank is not less than D.
        ShapeError: If, when the model is first run, decoder or reverse return another shape.
        DtypeError: If a decoder module has another dtype than the latents.

    References:
        The bound: Agakov and Barber, *An auxiliary variational method*, ICONIP 2004; with extra
        draws: Sobolev and Vetrov, *Importance weighted hierarchical variational inference*,
        https://arxiv.org/abs/1905.03290 (2019).

    Examples:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        ...     pyro.sample("y", dist.Normal(x[1] - x[0] ** 2, 0.1), obs=torch.tensor(0.5))
        >>> pyro.clear_param_store()
        >>> guide = AutoInjective(model, rank=1)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        >>> losses = [svi.step() for _ in range(3)]
        >>> guide.median()["x"].shape
        torch.Size([3])
    """

    recipe = ("_options",)

    def __init__(
        self,
        model: Callable[..., Any],
        rank: int | None = None,
        *,
        noise: str = "mvn",
        decoder: nn.Module | Factory | str | None = None,
        reverse: nn.Module | Factory | str = "laplace",
        num_aux: int = 0,
        latent_flows: Callable[[int], Sequence[Any]] | None = None,
        noise_rank: int | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float | None = None,
        path_gradient: bool = False,
        guard: float | None = 50.0,
    ) -> None:
        rank = None if rank is None else check_count(rank, "rank")
        num_aux = check_count(num_aux, "num_aux", least=0)
        noise_rank = _check_noise(noise, noise_rank)
        _check_part(decoder, "decoder", "'linear', None", ("linear", None))
        _check_part(reverse, "reverse", "'laplace'", ("laplace",))
        if latent_flows is not None and not callable(latent_flows):
            raise OptionError(
                "latent_flows must be a callable that gives a list of flows, or None, got "
                f"{describe(latent_flows)}. Write lambda rank: [...]."
            )
        super().__init__(model, init_loc_fn, init_scale, guard)
        self._given_rank = rank
        self.num_aux = num_aux
        self._path_gradient = check_flag(path_gradient, "path_gradient")
        self._options = _Options(noise, decoder, reverse, latent_flows, noise_rank)

    def make_parameters(self, log_joint: LogJoint) -> None:
        """Create the parameters, in the dtype of the latents."""
        most = max(1, self.latent_dim - 1)
        if self._given_rank is None:
            self.rank = min(most, _MOST_RANK, math.ceil(self.latent_dim**0.5))
        elif self._given_rank > most:
            raise OptionError(
                f"rank must be less than the number of latents, {self.latent_dim}, got "
                f"{self._given_rank}. Lower it, leave it out, or use AutoFlow."
            )
        else:
            self.rank = self._given_rank
        loc = self._init_loc()
        decoder = _make_decoder(self._options, self.rank, loc)
        noise = make_noise(self._options.noise, loc, self._options.noise_rank)
        reverse = _make_reverse(self._options, self.rank, loc, decoder, noise)
        # Decoder and noise start with a variance of about one each.
        self.frame = Frame(loc, self._init_scales(loc, log_joint) * 0.5**0.5)
        self.decoder = decoder
        self.noise = noise
        self.reverse = reverse
        self._constants = ConstantCopies()

    def start_at(self, fit: NormalFit) -> None:
        r"""Share a normal law out between the sheet and the noise.

        The frame takes the deviations of every latent given all others, which are the steps that
        the law allows. Along the widest r directions v in these units, of variances
        :math:`\lambda`, the sheet takes :math:`\sqrt{\lambda / 2}\, v` and the noise the other
        half; all else is noise. A decoder without a linear part, or variances alone, leave the
        sheet as it is, and the scales of both are halved.
        """
        slope, covariance = self.decoder.slope, fit.covariance
        if covariance.dim() == 1 or slope is None:
            deviations = fit.variances.sqrt()
            self.frame.move_to(fit.mean, deviations * 0.5**0.5)
            self.noise.take(torch.ones_like(deviations))
        else:
            deviations = torch.cholesky_inverse(fit.root).diagonal().rsqrt()
            relative = covariance / (deviations * deviations.unsqueeze(1))
            values, vectors = torch.linalg.eigh(relative)
            directions = vectors[:, -self.rank :] * (values[-self.rank :].clamp(min=0) / 2).sqrt()
            slope.copy_(directions.mT)
            self.frame.move_to(fit.mean, deviations)
            self.noise.take(relative - directions @ directions.mT)
        self.reverse.follow(self.decoder, self.noise)

    def get_posterior(self, *args: Any, **kwargs: Any) -> TorchDistribution:
        r"""The guide's distribution over the unconstrained latents (D,).

        Its ``log_prob`` of its own latest draw is at least :math:`\log q` in expectation, as the
        evidence bound needs; of any other value it is a lower bound in expectation, which
        serves only as a score.
        """
        return Thickened(
            self.frame,
            self.decoder,
            self.noise,
            self.reverse,
            self.rank,
            self.num_aux,
            self._constants if self._path_gradient else None,
        )


def _make_decoder(options: _Options, rank: int, loc: Tensor) -> Decoder:
    source = options.decoder
    if source is None or source == "linear":
        kind = LinearDecoder if source == "linear" else CurvedDecoder
        decoder: Decoder = kind(rank, len(loc)).to(loc)
        if options.latent_flows is None:
            return decoder
        module: nn.Module = decoder
    else:
        module = _made(source, rank, loc)
    flows = [] if options.latent_flows is None else _listed(options.latent_flows(rank), rank)
    composed = DifferentiatedDecoder(module, [flow.to(loc) for flow in flows])
    _probe(composed, "decoder", loc.new_zeros(2, rank), (2, len(loc)))
    return composed


def _make_reverse(
    options: _Options, rank: int, loc: Tensor, decoder: Decoder, noise: Noise
) -> Reverse:
    if options.reverse == "laplace":
        return LaplaceReverse(decoder, noise, loc, rank)
    module = _made(options.reverse, rank, loc)
    _probe(module, "reverse", loc.new_zeros(2, len(loc)), (2, 2 * rank))
    return LearnedReverse(module, rank)


def _made(source: Any, rank: int, loc: Tensor) -> nn.Module:
    # A module of the caller is used as it is; the result of a callable is converted.
    if isinstance(source, nn.Module):
        return source
    made = source(rank, len(loc))
    if not isinstance(made, nn.Module):
        raise OptionError(
            f"The callable of (rank, latent_dim) must give a module, got {describe(made)}. Return "
            "a torch.nn.Module, such as nn.Sequential(...)."
        )
    return made.to(loc)


def _listed(made: Any, rank: int) -> list[nf.flows.Flow]:
    try:
        stack = LayerStack(made)
        make_contiguous(stack)
        flows = list(stack.flows)
    except OptionError as error:
        raise OptionError(
            f"latent_flows({rank}) must give a list of layers of normflows, got {describe(made)}. "
            "Leave latent_flows out for none."
        ) from error
    needing = [type(flow).__name__ for flow in flows if needs_context(flow)]
    if needing:
        raise ContextError(
            f"latent_flows({rank}) gave {needing[0]}, which needs a context that a guide does not "
            "get. Build it without context features."
        )
    return flows


def _probe(module: nn.Module, name: str, point: Tensor, expected: tuple[int, ...]) -> None:
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.dtype != point.dtype:
            raise DtypeError(
                f"{name} must have the dtype of the model's latents, {point.dtype}, got "
                f"{parameter.dtype}. Convert it with .to({point.dtype})."
            )
    try:
        with torch.no_grad():
            out = module(point)
    except InjectiveFlowError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ShapeError(
            f"{name} must map {tuple(point.shape)} to {expected}, but fails on that: {error}. "
            "Change its first layer."
        ) from error
    result = tuple(out.shape) if isinstance(out, Tensor) else describe(out)
    if result != expected:
        raise ShapeError(
            f"{name} must map {tuple(point.shape)} to {expected}, got {result}. Change its last "
            "layer."
        )


def _check_noise(noise: Any, noise_rank: int | None) -> int | None:
    none = noise is None or (isinstance(noise, str) and noise == "none")
    if none or (is_number(noise) and noise == 0):
        raise OptionError(
            f"noise must be one of {', '.join(map(repr, NOISES))}, got {noise!r}. Without noise "
            "the guide is singular: its objective is not a bound on the evidence, and is "
            "unbounded above. Take 'mvn', or 'low_rank' for many latents."
        )
    check_choice(noise, NOISES, "noise")
    if noise_rank is None:
        return None
    if noise != "low_rank":
        raise OptionError(
            f"noise_rank belongs to noise='low_rank', got noise={noise!r}. Leave it out."
        )
    return check_count(noise_rank, "noise_rank")


def _check_part(option: Any, name: str, names: str, known: tuple[str | None, ...]) -> None:
    named = option is None or isinstance(option, str)
    if not (option in known if named else callable(option)):
        raise OptionError(
            f"{name} must be {names}, a module, or a callable of (rank, latent_dim), got "
            f"{describe(option)}."
        )

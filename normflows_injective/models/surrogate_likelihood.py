"""The training term of free-form injective flows, as a component of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..autodiff.recording import Map
from ..checks import (
    RenamedAttribute,
    check_choice,
    check_flag,
    check_not_negative,
    check_same_rows,
    checks_arguments_of,
    renamed,
)
from ..errors import OptionError
from ..flows.stack import Passes
from ..host.keywords import read_while_tracing
from ..volume.compiled import CompiledSurrogate, check_compilable
from ..volume.estimators import EncoderSurrogate, NoVolume, OnManifoldSurrogate, estimator_from
from ..volume.probes import PROBES, draw_probes
from ..volume.surrogate import DrawProbes, Estimator, SurrogateAndErrors, with_errors
from .collapse import CollapseWatch
from .loss_terms import SurrogateTerms, check_log_prob
from .steps import StepCounter, check_window, trainable
from .training_term import TrainingTerm

_BETA_ADVICE = "Give a number, for instance 10.0; without a reconstruction the manifold collapses."


@checks_arguments_of
class SurrogateLikelihood(TrainingTerm):
    r"""Surrogate likelihood of a free-form injective flow.

    .. math:: \mathcal L = \beta \lVert x - g(f(x)) \rVert^2 - \log p_Z(f(x))
              - \frac1K \sum_k v_k^\top f'(x)\, \mathrm{SG}[g'(f(x)) v_k]

    It takes any pair of callables: ``terms = likelihood(x, encode, decode)`` gives everything but
    :math:`\log p_Z`, and ``likelihood.loss(terms, log_prob)`` puts the loss together. Squared
    error and log-densities are sums over dimensions, in nats, one value per sample.

    Args:
        beta: Weight :math:`\beta \ge 0` of the reconstruction error: a number, or a callable of
            the step. Can be changed at any time by attribute.
        num_probes: Number of probes :math:`K`, at most the latent dimension.
        estimator: ``"encoder"`` (Jacobian at the data), ``"on_manifold"`` (at the reconstruction),
            ``"decoder"``, ``"conditional"``, ``"conditional_opposite"``, ``"conjugate_gradient"``,
            or a :class:`normflows_injective.volume.Estimator`.
        probes: ``"orthonormal"``, ``"sphere"``, ``"gaussian"`` or ``"rademacher"``.
        warmup_steps: ``(start, end)``, whole numbers: reconstruction alone before step ``start``,
            then the weight of likelihood and volume grows linearly to one at step ``end``. The
            steps before are several times faster, so a progress bar is too hopeful at first.
        input_noise: Standard deviation of Gaussian noise added to the data in training mode. The
            reconstruction is compared with the noisy data, which tells the encoder about the
            surroundings of the manifold. ``reconstruction_error`` of the model never adds noise.
        latent_cycle: Weight of :math:`\lVert z' - f(g(z')) \rVert^2` at prior samples.
        compile: True, or a dictionary of keyword arguments for ``torch.compile``, compiles the
            whole term, the networks' derivatives included, for the estimator ``"encoder"``. Pass
            the networks uncompiled. Values and gradients are those of the eager form up to
            rounding. The first step compiles, for ten seconds to minutes, and so does the eighth
            in a row of another batch shape; until then that is evaluated eagerly.

    Raises:
        OptionError: If an option is unknown or out of range.

    References:
        Sorrenson et al., Lifting architectural constraints of injective flows, arXiv 2306.01843.

    Examples:
        >>> import math
        >>> _ = torch.manual_seed(0)
        >>> encoder, decoder = nn.Linear(5, 2), nn.Linear(2, 5)
        >>> likelihood = SurrogateLikelihood(beta=10.0)
        >>> terms = likelihood(torch.randn(3, 5), encoder, decoder)
        >>> log_prob = -0.5 * terms.z.square().sum(1) - math.log(2 * math.pi)
        >>> likelihood.loss(terms, log_prob).shape
        torch.Size([3])
    """

    step: Tensor
    n_probes = RenamedAttribute("num_probes")
    # They lead to the weights, which mean the same without them.
    may_differ = frozenset(
        ("beta", "compile", "estimator", "input_noise", "latent_cycle", "num_probes", "probes")
        + ("warmup_steps",)
    )

    @renamed(n_probes="num_probes")
    def __init__(
        self,
        beta: float | Callable[[int], float] = 10.0,
        num_probes: int = 1,
        estimator: str | Estimator = "encoder",
        probes: str = "orthonormal",
        *,
        warmup_steps: tuple[int, int] | None = None,
        input_noise: float = 0.0,
        latent_cycle: float = 0.0,
        compile: bool | Mapping[str, Any] = False,
    ) -> None:
        super().__init__()
        if isinstance(beta, type):
            raise OptionError(f"beta must be a number or a function, got {beta}. Build one first.")
        self.beta = beta if callable(beta) else check_not_negative(beta, "beta", _BETA_ADVICE)
        self.num_probes = num_probes
        self.estimator = estimator_from(estimator)
        options = _options(compile)
        if options is not None:
            check_compilable(self.estimator)
        self.probes = check_choice(probes, PROBES, "probes")
        self.warmup_steps = check_window(warmup_steps)
        self.input_noise = check_not_negative(input_noise, "input_noise")
        self.latent_cycle = check_not_negative(latent_cycle, "latent_cycle")
        self._compiled = None if options is None else CompiledSurrogate(options)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self._counter, self._watch = StepCounter(), CollapseWatch()

    def forward(
        self, x: Tensor, encode: Map, decode: Map, prior: Tensor | None = None
    ) -> SurrogateTerms:
        r"""Encode, decode and estimate the volume term.

        Args:
            x: Data of shape :math:`(B, *)`.
            encode: :math:`f`, data to latents.
            decode: :math:`g`, latents to data.
            prior: Prior samples :math:`z'` of shape :math:`(B, *)`, needed if ``latent_cycle`` is
                positive.

        Returns:
            :class:`SurrogateTerms`.

        Raises:
            OptionError: If there are more probes than latent dimensions, or the prior is missing.
            ShapeError: If the decoder does not return the shape of x, or the prior has other rows.
            NotInjectiveError: If the latents are wider than the data.
            UnsupportedLayerError: If a layer makes the gradient silently wrong.
        """
        if self.training and self.input_noise > 0:
            x = x + self.input_noise * torch.randn_like(x)
        draw = partial(draw_probes, self.probes, self.num_probes)
        prior = self._checked_prior(prior, x)
        surrogate, error, cycle_error = self._pass(x, encode, decode, draw, prior)
        if cycle_error is None:
            cycle_error = torch.zeros_like(surrogate.volume)
        return SurrogateTerms(*surrogate, error, cycle_error)

    def terms(self, x: Tensor, passes: Passes, prior: Tensor | None = None) -> SurrogateTerms:
        """The terms at data (B, *), by :meth:`forward`."""
        return self(x, passes.encode, passes.decode, prior)

    def check_stack(self, starts_with_chart: bool) -> None:
        """Refuse layers that start with a chart."""
        if starts_with_chart:
            raise OptionError(
                "The inverse of a chart is no pseudo-inverse, so the surrogate's gradient would "
                "be biased. Leave likelihood out, or use nfi.ExactLikelihood."
            )

    def loss(self, terms: SurrogateTerms, log_prob: Tensor) -> Tensor:
        r"""Put the training loss together.

        .. math:: w\,(\text{volume} - \log p_Z) + \beta\, \text{reconstruction error}
                  + \lambda\, \text{latent cycle error}

        Args:
            terms: The result of :meth:`forward`.
            log_prob: :math:`\log p_Z` at ``terms.z``, shape :math:`(B,)` in nats.

        Returns:
            Loss per sample, shape :math:`(B,)`. It is no likelihood: see the package's README.

        Raises:
            ShapeError: If the log-density has another shape.
        """
        check_log_prob(log_prob, terms)
        loss = self._effective_beta() * terms.reconstruction_error
        if self.latent_cycle > 0:
            loss = loss + self.latent_cycle * terms.latent_cycle_error
        weight = self._effective_weight()
        # Left out rather than multiplied by zero: an infinite log-density would give NaN.
        if weight == 0:
            return loss
        term = terms.volume - log_prob
        return loss + (term if weight == 1 else weight * term)

    def current_beta(self) -> float:
        """Weight of the reconstruction error in the next training loss.

        Returns:
            ``beta``, or the value of the schedule at the step.

        Raises:
            OptionError: If it is negative or not finite.

        Examples:
            >>> SurrogateLikelihood(beta=lambda step: 10.0 + step).current_beta()
            10.0
        """
        return self._beta_at(self._current_step() if callable(self.beta) else 0)

    def final_beta(self) -> float:
        """Weight of the reconstruction error after the warm-up, or at the step if later."""
        if self.warmup_steps is None or not callable(self.beta):
            return self.current_beta()
        return self._beta_at(max(self.warmup_steps[1], self._current_step()))

    def likelihood_weight(self) -> float:
        """Weight of likelihood and volume in the next training loss, between 0 and 1.

        Returns:
            1 without ``warmup_steps``; else 0 before ``start``, 1 from ``end`` on, linear between.

        Examples:
            >>> SurrogateLikelihood(warmup_steps=(10, 20)).likelihood_weight()
            0.0
        """
        if self.warmup_steps is None:
            return 1.0
        start, end = self.warmup_steps
        if self._counter.is_known_to_reach(self.step, end + 1):
            return 1.0
        share = (self._current_step() - start + 1) / (end - start + 1)
        return min(1.0, max(0.0, share))

    def advance(self) -> None:
        """Count one training step by hand, for schedules and warm-up.

        From then on losses count none by themselves. Call it after every update, where a training
        term stands alone, or where a step is not one update.
        """
        self._counter.add(self.step, self._counter.hand_over())

    @contextmanager
    def training_loss(
        self, module: nn.Module, modules: Sequence[nn.Module] | None = None
    ) -> Iterator[None]:
        """Enclose the computation of a loss of a module, which is counted if it trains.

        A loss begins a step if parameters have changed since the last one; see
        ``docs/training.md``. Nothing is counted in evaluation mode, without gradients, or if the
        loss raises an error.
        """
        if not self.training:
            yield
            return
        parameters = trainable(module, modules)
        begins = self._counter.begins(parameters)
        if not isinstance(begins, bool) and self._depends_on_step():
            begins = bool(begins)
        is_part = not self._counter.by_hand and begins is False
        self._counter.offset = -1 if is_part else 0
        try:
            yield
        finally:
            self._counter.offset = 0
        if torch.is_grad_enabled():
            self._counter.add(self.step, begins)
            self._counter.end_loss(parameters)

    def watch(self, module: nn.Module, x: Tensor, terms: SurrogateTerms) -> None:
        """Warn if a training begins badly, or buys likelihood with the manifold.

        Warns:
            ScaleWarning: At first, if columns of the data have very different scales.
            SmoothnessWarning: At first, if an encoder or a decoder is piecewise linear.
            CollapseWarning: Once, if the reconstruction stays poor and is no inverse.
        """
        if not (self.training and torch.is_grad_enabled()):
            return
        self._watch.begin(module, x, terms.reconstruction_error)
        # Only these surrogates have the value -d at a consistent pair, for probes of fixed length.
        kinds = (EncoderSurrogate, OnManifoldSurrogate)
        is_telling = isinstance(estimator_from(self.estimator), kinds)
        if is_telling and self.probes != "gaussian" and self.likelihood_weight() == 1:
            dim = terms.z.shape[1:].numel()
            self._watch.look(x, terms.reconstruction_error, terms.volume, dim)

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return (
            f"beta={self.beta}, num_probes={self.num_probes}, estimator={self.estimator}, "
            f"probes={self.probes!r}, warmup_steps={self.warmup_steps}, "
            f"input_noise={self.input_noise}, latent_cycle={self.latent_cycle}, "
            f"compile={False if self._compiled is None else self._compiled.options or True}"
        )

    def _pass(
        self, x: Tensor, encode: Map, decode: Map, draw: DrawProbes, prior: Tensor | None
    ) -> SurrogateAndErrors:
        estimator = estimator_from(self.estimator)
        if self._effective_weight() == 0:
            estimator = NoVolume()
        elif self._compiled is not None:
            check_compilable(estimator)
            return self._compiled(x, encode, decode, draw, prior)
        return with_errors(estimator(x, encode, decode, draw), x, encode, decode, prior)

    def _effective_weight(self) -> float:
        """The weight at the step, or in evaluation mode the one after the warm-up."""
        return self.likelihood_weight() if self.training else 1.0

    def _effective_beta(self) -> float:
        """The weight at the step, or in evaluation mode after the warm-up, to compare losses."""
        return self.current_beta() if self.training else self.final_beta()

    def _beta_at(self, step: int) -> float:
        return check_not_negative(self.beta(step) if callable(self.beta) else self.beta, "beta")

    def _current_step(self) -> int:
        return max(0, self._counter.value(self.step) + self._counter.offset)

    def _depends_on_step(self) -> bool:
        if callable(self.beta):
            return True
        if self.warmup_steps is None:
            return False
        return not self._counter.is_known_to_reach(self.step, self.warmup_steps[1] + 1)

    def _checked_prior(self, prior: Tensor | None, x: Tensor) -> Tensor | None:
        if self.latent_cycle == 0:
            return None
        if prior is None:
            raise OptionError(
                "latent_cycle needs prior samples: pass prior=, latents of shape (B, ...). "
                "InjectiveNormalizingFlow does so by itself."
            )
        check_same_rows(x=x, prior=prior)
        return prior


def _options(compile: bool | Mapping[str, Any]) -> Mapping[str, Any] | None:
    if isinstance(compile, Mapping) or check_flag(compile, "compile, no dictionary of options,"):
        read_while_tracing()
        return compile if isinstance(compile, Mapping) else {}
    return None

"""The training term of free-form injective flows, as a component of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checks import check_choice, check_count, checks_tensors_of
from .context import read_while_tracing
from .errors import OptionError, ShapeError
from .volume.compiled import CompiledSurrogate
from .volume.estimators import Encoder, NoVolume, estimator_from
from .volume.probes import PROBES, draw_probes
from .volume.products import Map
from .volume.surrogate import DrawProbes, Estimator, SurrogateAndErrors, with_errors

__all__ = ["LossTerms", "SurrogateLikelihood", "SurrogateTerms"]


class SurrogateTerms(NamedTuple):
    r"""What one pass of the training term gives, per sample.

    Attributes:
        z: Latents :math:`f(x)`, shape :math:`(B, *)`.
        reconstruction: :math:`g(f(x))`, shape :math:`(B, *)`.
        volume: Surrogate of the log-volume, shape :math:`(B,)`; its value means nothing, its
            gradient is added to the loss.
        reconstruction_error: :math:`\lVert x - g(f(x)) \rVert^2`, shape :math:`(B,)`.
        latent_cycle_error: :math:`\lVert z' - f(g(z')) \rVert^2` at prior samples :math:`z'`,
            shape :math:`(B,)`; zero where it was not asked for.
    """

    z: Tensor
    reconstruction: Tensor
    volume: Tensor
    reconstruction_error: Tensor
    latent_cycle_error: Tensor


class LossTerms(NamedTuple):
    r"""The parts of the training loss per sample, each of shape (B,).

    Attributes:
        log_prob_latent: Log-density of the encoded data under the latent block, in nats.
        surrogate: Surrogate of the log-volume; only its gradient means something.
        reconstruction_error: :math:`\lVert x - \hat x \rVert^2`, summed over dimensions.
        loss: The weighted sum whose mean ``forward_kld`` returns.

    Examples:
        >>> terms = LossTerms(*torch.ones(4, 3))  # as loss_terms gives them, for three samples
        >>> {name: round(float(term.mean()), 2) for name, term in terms._asdict().items()}
        {'log_prob_latent': 1.0, 'surrogate': 1.0, 'reconstruction_error': 1.0, 'loss': 1.0}
    """

    log_prob_latent: Tensor
    surrogate: Tensor
    reconstruction_error: Tensor
    loss: Tensor


@checks_tensors_of
class SurrogateLikelihood(nn.Module):
    r"""Surrogate likelihood of a free-form injective flow.

    .. math:: \mathcal L = \beta \lVert x - g(f(x)) \rVert^2 - \log p_Z(f(x))
              - \frac1K \sum_k v_k^\top f'(x)\, \mathrm{SG}[g'(f(x)) v_k]

    Works on any pair of callables: ``terms = likelihood(x, encode, decode)`` gives everything but
    :math:`\log p_Z`, and ``likelihood.loss(terms, log_prob)`` puts the loss together. Squared
    error and log-densities are sums over dimensions, in nats, one value per sample.

    Args:
        beta: Weight :math:`\beta \ge 0` of the reconstruction error: a number, or a callable of
            the step. Can be changed at any time by attribute.
        n_probes: Number of probes :math:`K`, at most the latent dimension.
        estimator: ``"encoder"`` (Jacobian at the data), ``"on_manifold"`` (at the reconstruction),
            ``"decoder"``, ``"conditional"``, ``"conditional_opposite"``, ``"conjugate_gradient"``,
            or a :class:`normflows_injective.volume.Estimator`.
        probes: ``"orthonormal"``, ``"sphere"``, ``"gaussian"`` or ``"rademacher"``.
        warmup_steps: ``(start, end)``: reconstruction alone before step ``start``, then the weight
            of likelihood and volume grows linearly to one at step ``end``. The steps before are
            several times faster, so a progress bar is too hopeful at first.
        input_noise: Standard deviation of Gaussian noise added to the data in training mode. The
            reconstruction is compared with the noisy data, which tells the encoder about the
            surroundings of the manifold. ``reconstruction_error`` of the model never adds noise.
        latent_cycle: Weight of :math:`\lVert z' - f(g(z')) \rVert^2` at prior samples.
        compile: True, or a dictionary of keyword arguments for ``torch.compile``, compiles the
            whole term, the networks' derivatives included, for the estimator ``"encoder"``. Pass
            the networks uncompiled. Values and gradients are those of the eager form up to
            rounding. The first step at every batch shape compiles, for ten seconds to minutes.

    Raises:
        OptionError: If an option is unknown or out of range.

    References:
        Sorrenson et al., Lifting architectural constraints of injective flows, arXiv 2306.01843.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> encoder, decoder = nn.Linear(5, 2), nn.Linear(2, 5)
        >>> likelihood = SurrogateLikelihood(beta=10.0)
        >>> terms = likelihood(torch.randn(3, 5), encoder, decoder)
        >>> log_prob = -0.5 * terms.z.square().sum(1) - math.log(2 * math.pi)
        >>> likelihood.loss(terms, log_prob).shape
        torch.Size([3])
    """

    step: Tensor
    # They lead to the weights, which mean the same without them.
    may_differ = frozenset(
        {
            "beta",
            "compile",
            "estimator",
            "input_noise",
            "latent_cycle",
            "n_probes",
            "probes",
            "warmup_steps",
        }
    )

    def __init__(
        self,
        beta: float | Callable[[int], float] = 10.0,
        n_probes: int = 1,
        estimator: str | Estimator = "encoder",
        probes: str = "orthonormal",
        *,
        warmup_steps: tuple[int, int] | None = None,
        input_noise: float = 0.0,
        latent_cycle: float = 0.0,
        compile: bool | Mapping[str, Any] = False,
    ) -> None:
        super().__init__()
        check_choice(probes, PROBES, "probes")
        check_count(n_probes, "n_probes")
        _check_window(warmup_steps)
        self.beta = beta if callable(beta) else _non_negative("beta", beta)
        self.n_probes = n_probes
        self.estimator = estimator_from(estimator)
        if compile is not False:
            _check_compilable(self.estimator)
        self.probes = probes
        self.warmup_steps = warmup_steps
        self.input_noise = _non_negative("input_noise", input_noise)
        self.latent_cycle = _non_negative("latent_cycle", latent_cycle)
        options = _options(compile)
        self._compiled = None if options is None else CompiledSurrogate(options)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

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
            ShapeError: If the decoder does not return the shape of the data.
            NotInjectiveError: If the latents are wider than the data.
            UnsupportedLayerError: If a layer makes the gradient silently wrong.
        """
        if self.training and self.input_noise > 0:
            x = x + self.input_noise * torch.randn_like(x)
        draw = partial(draw_probes, self.probes, self.n_probes)
        prior = self._checked_prior(prior)
        surrogate, reconstruction_error, cycle_error = self._pass(x, encode, decode, draw, prior)
        return SurrogateTerms(
            *surrogate,
            reconstruction_error=reconstruction_error,
            latent_cycle_error=torch.zeros_like(surrogate.volume)
            if cycle_error is None
            else cycle_error,
        )

    def loss(self, terms: SurrogateTerms, log_prob: Tensor) -> Tensor:
        r"""Put the training loss together.

        .. math:: w\,(\text{volume} - \log p_Z) + \beta\, \text{reconstruction error}
                  + \lambda\, \text{latent cycle error}

        Args:
            terms: What :meth:`forward` returned.
            log_prob: :math:`\log p_Z` at ``terms.z``, shape :math:`(B,)` in nats.

        Returns:
            Loss per sample, shape :math:`(B,)`. It is no likelihood: see the package's README.

        Raises:
            ShapeError: If the log-density has another shape.
        """
        if log_prob.shape != terms.volume.shape:
            raise ShapeError(
                f"log_prob must have one value per sample, shape {tuple(terms.volume.shape)}, got "
                f"{tuple(log_prob.shape)}."
            )
        loss = self.current_beta() * terms.reconstruction_error
        if self.latent_cycle > 0:
            loss = loss + self.latent_cycle * terms.latent_cycle_error
        weight = self.likelihood_weight()
        # Left out rather than multiplied by zero: an infinite log-density would give NaN.
        return loss + weight * (terms.volume - log_prob) if weight > 0 else loss

    def current_beta(self) -> float:
        """Weight of the reconstruction error at the current step.

        Returns:
            ``beta``, or what the schedule gives for the step.

        Raises:
            OptionError: If it is negative or not finite.

        Examples:
            >>> SurrogateLikelihood(beta=lambda step: 10.0 + step).current_beta()
            10.0
        """
        value = self.beta(int(self.step)) if callable(self.beta) else self.beta
        return _non_negative("beta", value)

    def likelihood_weight(self) -> float:
        """Weight of likelihood and volume at the current step, between 0 and 1.

        Returns:
            1 without ``warmup_steps``; else 0 before ``start``, 1 from ``end`` on, linear between.

        Examples:
            >>> SurrogateLikelihood(warmup_steps=(10, 20)).likelihood_weight()
            0.0
        """
        if self.warmup_steps is None:
            return 1.0
        start, end = self.warmup_steps
        step = int(self.step)
        if step < start:
            return 0.0
        return min(1.0, (step - start + 1) / (end - start + 1))

    def advance(self) -> None:
        """Count one training step, for schedules and warm-up."""
        self.step += 1

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return (
            f"beta={self.beta}, n_probes={self.n_probes}, estimator={self.estimator}, "
            f"probes={self.probes!r}, warmup_steps={self.warmup_steps}, "
            f"input_noise={self.input_noise}, latent_cycle={self.latent_cycle}, "
            f"compile={False if self._compiled is None else self._compiled.options or True}"
        )

    def _pass(
        self, x: Tensor, encode: Map, decode: Map, draw: DrawProbes, prior: Tensor | None
    ) -> SurrogateAndErrors:
        estimator = estimator_from(self.estimator)
        if self.likelihood_weight() == 0:
            estimator = NoVolume()
        elif self._compiled is not None:
            _check_compilable(estimator)
            return self._compiled(x, encode, decode, draw, prior)
        return with_errors(estimator(x, encode, decode, draw), x, encode, decode, prior)

    def _checked_prior(self, prior: Tensor | None) -> Tensor | None:
        if self.latent_cycle == 0:
            return None
        if prior is None:
            raise OptionError(
                "latent_cycle needs prior samples: pass prior=, latents of shape (B, ...). "
                "InjectiveNormalizingFlow does so by itself."
            )
        return prior


def _check_compilable(estimator: Estimator) -> None:
    if not isinstance(estimator, Encoder):
        raise OptionError(
            "compile= serves the estimator 'encoder' alone. Use it, or compile=False; got "
            f"{estimator}."
        )


def _options(compile: bool | Mapping[str, Any]) -> Mapping[str, Any] | None:
    if not isinstance(compile, bool | Mapping):
        raise OptionError(
            "compile must be True, False or a dictionary of keyword arguments for torch.compile, "
            f"got {compile!r}."
        )
    if compile is False:
        return None
    read_while_tracing()
    return {} if isinstance(compile, bool) else compile


def _non_negative(name: str, value: float) -> float:
    if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
        raise OptionError(f"{name} must be a number, finite and not negative, got {value!r}.")
    return value


def _check_window(steps: tuple[int, int] | None) -> None:
    if steps is None:
        return
    if not isinstance(steps, tuple | list) or len(steps) != 2 or not 0 <= steps[0] <= steps[1]:
        raise OptionError(
            f"warmup_steps must be (start, end) with 0 <= start <= end, got {steps!r}."
        )

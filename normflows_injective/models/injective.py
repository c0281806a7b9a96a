"""The injective normalizing flow, a drop-in model class for normflows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import normflows as nf
import torch
from torch import Tensor, nn

from ..autodiff.settings import as_written
from ..checkpoints import load_checkpoint, save_checkpoint
from ..checks import check_batch, check_event_shape, checks_arguments_of
from ..errors import ContextError
from ..host.bases import base_log_prob, sample_base
from ..host.context import check_context, takes_context
from ..host.first_data import refuse_single_sample
from ..host.first_meeting import meet_first_data
from ..modules.diverged import check_results, names_diverged
from ..volume.reconstruction import squared_error
from . import divergences, training_term
from . import losses as training_loss
from .construction import check_parts, trial_pass
from .loss_terms import LossTerms
from .parts import Parts, dtype_of, look_into, model_dtype, stack_of
from .validation import validation_score


@checks_arguments_of
class InjectiveNormalizingFlow(nf.NormalizingFlow):
    r"""Normalizing flow on a learned :math:`d`-dimensional manifold in :math:`\mathbb R^D`.

    ``flows`` is split at its first injection. The flows before it, the latent block :math:`h`, are
    summed as in normflows. Everything from the injection to the data is one map :math:`G` with
    one encoder :math:`F` and one log-volume, because after an injection log-dets do not add:

    .. math:: \log q(\hat x) = \log q_0(h^{-1}(z)) + \log |\det (h^{-1})'(z)|
              - \tfrac12 \log\det\big(G'(z)^\top G'(z)\big), \quad z = F(x),\ \hat x = G(z)

    This is a density against the manifold's own :math:`d`-dimensional measure, in nats. It is
    blind to the distance from the manifold, so read :meth:`log_prob` with
    :meth:`reconstruction_error`.

    Every method takes an optional ``context`` with one row per sample, which goes to the base, the
    flows and the networks that were built for one, and checks its input, raising ``ShapeError``,
    ``DtypeError``, ``NonFiniteError`` or ``ContextError``, whose messages say what to do.

    Args:
        q0: Base distribution of the latent shape.
        flows: Layers from latent to data, at least one of them an injection.
        likelihood: The training term; by default ``SurrogateLikelihood()``, :math:`\beta = 10`, or
            ``ExactLikelihood()`` after a chart of a known surface, :math:`\beta = 100` if the
            surface is trained.
        p: Target for :meth:`reverse_kld`. It must declare itself a density on the manifold by a
            true attribute ``on_manifold``.

    Raises:
        NotInjectiveError: If no layer raises the dimension.
        ShapeError: If base and layers do not fit.
        UnsupportedLayerError: If a layer would make the density or a gradient silently wrong.

    References:
        Sorrenson et al., Lifting architectural constraints of injective flows, arXiv 2306.01843.

    Examples:
        >>> from normflows_injective.flows import FreeFormInjection
        >>> _ = torch.manual_seed(0)
        >>> model = InjectiveNormalizingFlow(
        ...     nf.distributions.DiagGaussian(2, trainable=False),
        ...     [FreeFormInjection(nn.Linear(5, 2), nn.Linear(2, 5))],
        ... )
        >>> loss = model.forward_kld(torch.randn(8, 5))
        >>> loss.backward()
        >>> x, log_q = model.sample(3)
        >>> x.shape, log_q.shape
        (torch.Size([3, 5]), torch.Size([3]))
    """

    # Names of options, and of parts, on which the meaning of the weights does not depend.
    may_differ = frozenset({"likelihood", "p"})

    def __init__(
        self,
        q0: nn.Module,
        flows: Sequence[nf.flows.Flow],
        likelihood: training_term.TrainingTerm | None = None,
        p: Any = None,
    ) -> None:
        num_latent, likelihood = check_parts(q0, flows, likelihood)
        super().__init__(q0, list(flows), p)
        self.likelihood, self._num_latent = likelihood, num_latent
        self._conditional = [part for part in (q0, *flows) if takes_context(part)]
        self._shapes = trial_pass(self.q0, self.flows, self._num_latent)

    @property
    def latent_block(self) -> list[nf.flows.Flow]:
        """The flows before the first injection."""
        return list(self.flows)[: self._num_latent]

    @property
    def composite(self) -> list[nf.flows.Flow]:
        """The layers from the first injection on, differentiated as one map."""
        return list(self.flows)[self._num_latent :]

    @names_diverged
    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Coordinates :math:`F(x)`, (B, *), of data (B, *), before the latent block."""
        return stack_of(self._check(x, "x", "data", context)).encode(x, context)

    @names_diverged
    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Points on the manifold :math:`G(z)`, (B, *), of coordinates from :meth:`encode`."""
        return stack_of(self._check(z, "z", "latent", context)).decode(z, context)

    @names_diverged
    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Send base variables (B, *) to the data space (B, *), :math:`G(h(z))`."""
        return stack_of(self._check(z, "z", "base", context)).decode_base(z, context)

    @names_diverged
    def inverse(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Send data (B, *) to base variables (B, *), :math:`h^{-1}(F(x))`."""
        return stack_of(self._check(x, "x", "data", context)).encode_to_base(x, context)

    @names_diverged
    def forward_and_log_det(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Send base variables to the data space, with the exact log-volume of the whole map.

        Args:
            z: Base variables of shape :math:`(B, *)`.
            context: One row per sample.

        Returns:
            Data :math:`(B, *)`; :math:`\log|\det h'| + \tfrac12 \log\det G'^\top G'`, (B,), nats.
        """
        return stack_of(self._check(z, "z", "base", context)).push(z, context)

    @names_diverged
    def inverse_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Send data to base variables, with minus the exact log-volume at their projection.

        Args:
            x: Data of shape :math:`(B, *)`.
            context: One row per sample.

        Returns:
            Base variables of shape :math:`(B, *)`, minus the log-volume of shape :math:`(B,)`.
        """
        z, log_volume = stack_of(self._check(x, "x", "data", context)).pull(x, context)
        return z, -log_volume

    @names_diverged
    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Exact log-density of the projection of the data onto the manifold.

        It costs :math:`d` Jacobian-vector products; evaluate under ``torch.no_grad()``, and do not
        train on it: without a reconstruction term the manifold collapses.

        Args:
            x: Data of shape :math:`(B, *)`, on the manifold or not.
            context: One row per sample.

        Returns:
            Log-density :math:`(B,)` in nats against the :math:`d`-dimensional measure.
        """
        z, log_det = self.inverse_and_log_det(x, context)
        return base_log_prob(self.q0, z, context) + log_det

    @names_diverged
    def sample(
        self, num_samples: int = 1, context: Tensor | None = None, log_prob: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        r"""Draw samples on the manifold.

        Args:
            num_samples: Number of samples :math:`n`.
            context: Optional context with :math:`n` rows.
            log_prob: Whether to compute the exact log-density, which costs :math:`d` decodes.

        Returns:
            Samples :math:`(n, *)`, and their log-density :math:`(n,)` in nats or None.
        """
        self._check_call(context, num_samples)
        dtype = model_dtype(self.q0, self.flows)
        z, log_q = sample_base(self.q0, num_samples, context, dtype)
        check_results(self, (z,))
        if not log_prob:
            return self.forward(z, context), None
        x, log_det = self.forward_and_log_det(z, context)
        return x, log_q - log_det

    @as_written
    def forward_kld(
        self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        r"""Training loss: the mean of ``loss_terms(x).loss``.

        With a surrogate the value is *not* a likelihood: watch ``log_prob`` and
        ``reconstruction_error``. With ``ExactLikelihood()`` it is the negative log-likelihood.

        Args:
            x: Data of shape :math:`(B, *)`.
            context: One row per sample.
            weights: Weights :math:`w \ge 0` of the samples, (B,), for :math:`\sum_i w_i \ell_i /
                \sum_i w_i` in place of the mean.

        Returns:
            Loss, 0-dimensional, in the dtype of ``x``.

        Raises:
            NonFiniteError: If the data, a weight or a term of the loss is not finite.
            OptionError: If a weight is negative, or all are zero.
        """
        return training_loss.forward_kld(*self._check_data(x, context), x, context, weights)

    @as_written
    @names_diverged
    def loss_terms(self, x: Tensor, context: Tensor | None = None) -> LossTerms:
        r"""Parts of the training loss per sample, for training and logging.

        In training mode they count as part of a training step, as ``forward_kld`` does.

        Args:
            x: Data of shape :math:`(B, *)`.
            context: One row per sample.

        Returns:
            :class:`LossTerms` ``(log_prob_latent, volume, reconstruction_error, loss)``.
        """
        return training_loss.loss_terms(*self._check_data(x, context), x, context)

    @names_diverged
    def project(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Reconstructions :math:`\hat x = G(F(x))`, (B, *), the points whose density is given."""
        return stack_of(self._check(x, "x", "data", context)).project(x, context)

    @names_diverged
    def reconstruction_error(
        self, x: Tensor, context: Tensor | None = None, *, standardised: bool = False
    ) -> Tensor:
        r"""Squared distances :math:`\lVert x - G(F(x)) \rVert^2`, summed over dimensions, (B,).

        In squared units of the data or, ``standardised``, in the coordinates before the
        ``Standardise`` that stands last, in which models are trained.
        """
        if not standardised:
            return squared_error(x, self.project(x, context))
        stack = stack_of(self._check(x, "x", "data", context))
        x = stack.standardise(x)
        return squared_error(x, stack.inner.project(x, context))

    def reverse_kld(
        self,
        num_samples: int = 1,
        beta: float = 1.0,
        score_fn: bool = True,
        context: Tensor | None = None,
    ) -> Tensor:
        r"""Estimate :math:`\mathrm{KL}(q \| p)` in nats, for a target on the same manifold.

        Args:
            num_samples: Number of samples from the model.
            beta: Annealing weight of the target.
            score_fn: Keep the score term in the gradient.
            context: One row per sample.

        Raises:
            OffManifoldError: Unless ``p`` declares itself a density on the manifold by a true
                attribute ``on_manifold``; else the true divergence is infinite.
        """
        return divergences.reverse_kld(self, num_samples, beta, score_fn, context)

    def reverse_alpha_div(
        self,
        num_samples: int = 1,
        alpha: float = 1,
        dreg: bool = False,
        context: Tensor | None = None,
        beta: float = 1.0,
    ) -> Tensor:
        r"""Estimate an alpha divergence up to a monotonic map, for a target on the same manifold.

        .. math:: \operatorname{sign}(\alpha (\alpha - 1)) \log \sum_i (p(x_i) / q(x_i))^\alpha

        falls with :math:`(\int p^\alpha q^{1-\alpha} - 1) / \alpha (\alpha - 1)`, whose limits are
        :math:`\mathrm{KL}(q \| p)` at order 0 and :math:`\mathrm{KL}(p \| q)` at order 1.

        Args:
            num_samples: Number of samples from the model.
            alpha: Order, any number but 0; 1 needs ``dreg``.
            dreg: Use the doubly reparametrised gradient.
            context: One row per sample.
            beta: Annealing weight of the target.

        Raises:
            OffManifoldError: Unless ``p`` declares itself a density on the manifold.
            OptionError: If ``alpha`` is 0, or 1 without ``dreg``.
        """
        return divergences.reverse_alpha_div(self, num_samples, alpha, dreg, context, beta)

    validation_score = validation_score
    save, load = save_checkpoint, load_checkpoint

    def _check_data(
        self, x: Tensor, context: Tensor | None
    ) -> tuple[InjectiveNormalizingFlow, Parts]:
        """Check data for training; layers keep what they take if the whole loss is finite."""
        parts = look_into(self)
        first = partial(training_loss.first_loss, x, context)
        model = self._check(x, "x", "data", context, first, parts)
        return model, parts if model is self else look_into(model)

    def _check(
        self,
        batch: Tensor,
        name: str,
        space: str,
        context: Tensor | None,
        first: Callable[[InjectiveNormalizingFlow], Tensor] | None = None,
        parts: Parts | None = None,
    ) -> InjectiveNormalizingFlow:
        """Check the arguments, and give what to go on with: see :func:`meet_first_data`."""
        parts = parts or look_into(self)
        check_batch(batch, name, dtype_of(parts.flows, parts.base))
        self._check_call(context, batch.shape[0])
        check_event_shape(batch, self._shapes and getattr(self._shapes, space), name)
        refuse_single_sample(parts.every, batch)
        first = first or partial(training_loss.first_pass, batch, space, context)
        return meet_first_data(self, first, space != "data", parts.every)

    def _check_call(self, context: Tensor | None, length: int) -> None:
        check_context(self._conditional, context, length)
        if self._shapes is None and context is not None:
            # What could not be tried at construction for want of a context.
            two = context[:2] if length > 1 else torch.cat([context, context])
            with suppress(ContextError):  # which the call itself will raise, with its own shape
                self._shapes = trial_pass(self.q0, self.flows, self._num_latent, two)

"""The contract of a training term: the terms of a loss, and the loss that is made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from ..checks import checks_arguments_of
from ..errors import OptionError
from ..flows.stack import Passes
from .loss_terms import SurrogateTerms


@checks_arguments_of
class TrainingTerm(nn.Module, ABC):
    r"""The part of an injective flow's loss beside the latent density.

    .. math:: \mathcal L(x) = \text{loss}\big(\text{terms}(x; F, G), \log p_Z(F(x))\big)

    A model calls :meth:`terms` on its data, adds the density of the latents, and takes the mean of
    :meth:`loss`. A subclass gives these two; the other methods have defaults that do nothing.

    References:
        arXiv 2306.01843 for :class:`SurrogateLikelihood`, arXiv 2406.09116 for
        :class:`ExactLikelihood`.

    Examples:
        >>> import torch
        >>> class Reconstruction(TrainingTerm):
        ...     def terms(self, x, passes, prior=None):
        ...         z = passes.encode(x)
        ...         error = (x - passes.decode(z)).square().sum(1)
        ...         zero = torch.zeros_like(error)
        ...         return SurrogateTerms(z, x, zero, error, zero)
        ...     def loss(self, terms, log_prob):
        ...         return terms.reconstruction_error
        >>> halve = Passes(lambda x: x / 2, lambda z: z, None)
        >>> term = Reconstruction()
        >>> term.loss(term.terms(torch.ones(1, 3), halve), None)
        tensor([0.7500])
    """

    # Names of options on which the meaning of a model's weights does not depend.
    may_differ: frozenset[str] = frozenset()
    # Weight of a term at latents of the model; above zero, :meth:`terms` is given such latents.
    latent_cycle: float = 0.0

    @abstractmethod
    def terms(self, x: Tensor, passes: Passes, prior: Tensor | None = None) -> SurrogateTerms:
        """The terms at data.

        Args:
            x: Data of shape (B, *).
            passes: The directions of the composite: ``encode``, ``decode`` and
                ``decode_and_log_volume``, each called on a batch.
            prior: Latents (B, *) of the model, where ``latent_cycle`` is above zero.
        """

    @abstractmethod
    def loss(self, terms: SurrogateTerms, log_prob: Tensor) -> Tensor:
        """Loss per sample (B,), from the terms and the latent log-densities (B,) in nats."""

    def check_stack(self, starts_with_chart: bool) -> None:
        """Raise OptionError if the term is not for layers that do, or do not, start with a chart.

        Args:
            starts_with_chart: Whether the first injection is a chart of a known surface, whose
                encoder is its inverse there, rather than an encoder that is learned.
        """

    def final_beta(self) -> float:
        """Weight of the reconstruction error when every warm-up is over, for validation scores.

        Raises:
            OptionError: If the term does not say.
        """
        raise OptionError(
            f"{type(self).__name__} does not say how it weighs the reconstruction error in the "
            "end. Give it a method final_beta that returns this number."
        )

    def advance(self) -> None:
        """Count one training step, for terms that depend on it."""

    def watch(self, module: nn.Module, x: Tensor, terms: SurrogateTerms) -> None:
        """Look at the terms (of data x) of a module that is trained, to warn of mistakes."""

    def training_loss(
        self, module: nn.Module, modules: Sequence[nn.Module] | None = None
    ) -> AbstractContextManager[None]:
        """Enclose the computation of a loss, for terms that count training steps."""
        return nullcontext()

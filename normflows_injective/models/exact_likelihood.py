"""The training term of flows on known surfaces, whose log-volume is a closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..autodiff.recording import Map
from ..checks import check_event_shape, check_not_negative, checks_arguments_of
from ..errors import OptionError, ShapeError
from ..flows.stack import Passes
from ..volume.log_volumes import DecodedVolume
from ..volume.reconstruction import squared_error
from .loss_terms import SurrogateTerms, check_log_prob
from .training_term import TrainingTerm


@checks_arguments_of
class ExactLikelihood(TrainingTerm):
    r"""Maximum likelihood, for a chart of a known surface and the layers after it.

    .. math:: \mathcal L = -\log p_Z(z) + \tfrac12 \log\det G'(z)^\top G'(z)
              + \beta \lVert x - G(z) \rVert^2, \qquad z = F(x)

    At :math:`\beta = 0` the loss *is* the negative log-likelihood, in nats. A surface that is
    learned with its density (``nfi.flows.gauges.NetworkRadius``) needs the reconstruction term:
    the likelihood alone is unbounded. Models of free-form injections take
    :class:`~normflows_injective.SurrogateLikelihood`.

    Args:
        beta: Weight :math:`\beta \ge 0` of the reconstruction error.

    Raises:
        OptionError: If the weight is negative or not finite.

    References:
        arXiv 2406.09116.

    Examples:
        >>> from normflows_injective.flows import SphereChart
        >>> chart = SphereChart(3)
        >>> x = torch.eye(3)[1:]
        >>> ExactLikelihood()(x, chart.encode, chart.decode_and_log_volume).volume
        tensor([-0.3466, -0.3466])
    """

    may_differ = frozenset({"beta"})

    def __init__(self, beta: float = 0.0) -> None:
        super().__init__()
        self.beta = float(check_not_negative(beta, "beta"))

    def forward(
        self,
        x: Tensor,
        encode: Map,
        decode: Callable[[Tensor], DecodedVolume],
        prior: Tensor | None = None,
    ) -> SurrogateTerms:
        r"""Encode, and decode with the exact log-volume.

        Args:
            x: Data of shape :math:`(B, *)`.
            encode: :math:`F`, data to latents.
            decode: Latents to data with the log-volume, as
                :meth:`~normflows_injective.flows.Injection.decode_and_log_volume`.
            prior: Not used.

        Returns:
            :class:`SurrogateTerms`, whose ``volume`` is here the log-volume itself.

        Raises:
            DtypeError: If the latents are no tensor.
            ShapeError: If the reconstruction does not have the shape of the data, or the
                log-volume is not one value per sample.
        """
        z = encode(x)
        check_event_shape(z, None, "what encode returns")
        reconstruction, volume = decode(z)
        if reconstruction.shape != x.shape or volume.shape != x.shape[:1]:
            raise ShapeError(
                f"decode must return a reconstruction {tuple(x.shape)} as the data and a "
                f"log-volume {tuple(x.shape[:1])}, one per sample, got tensors of shapes "
                f"{tuple(reconstruction.shape)} and {tuple(volume.shape)}."
            )
        error = squared_error(x, reconstruction)
        return SurrogateTerms(z, reconstruction, volume, error, torch.zeros_like(volume))

    def terms(self, x: Tensor, passes: Passes, prior: Tensor | None = None) -> SurrogateTerms:
        """The terms at data (B, *), by :meth:`forward`."""
        return self(x, passes.encode, passes.decode_and_log_volume)

    def loss(self, terms: SurrogateTerms, log_prob: Tensor) -> Tensor:
        r"""Loss per sample, shape :math:`(B,)`, from the terms and :math:`\log p_Z` in nats."""
        check_log_prob(log_prob, terms)
        loss = terms.volume - log_prob
        return loss + self.beta * terms.reconstruction_error if self.beta > 0 else loss

    def final_beta(self) -> float:
        """The weight of the reconstruction error."""
        return self.beta

    def check_stack(self, starts_with_chart: bool) -> None:
        """Refuse layers that do not start with a chart."""
        if not starts_with_chart:
            raise OptionError(
                "ExactLikelihood is for a chart of a known surface and what stands behind it. A "
                "manifold that is learned with encoder and decoder collapses under it: use "
                "nfi.SurrogateLikelihood."
            )

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"beta={self.beta:g}"

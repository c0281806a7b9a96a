r"""Rules by which the log-volume at the projection of a value is differentiated.

With an encoder :math:`F` and the layers :math:`G` from the injection to the data, every rule gives
the base variables, the reconstruction :math:`G(F(x))`, and the log-volume of the whole map from
the base to the data. The rules have the same values and differ in their gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from ..autodiff.products import out_of_inference
from ..checks import check_choice
from ..errors import OptionError, UnsupportedModelError
from ..flows.layer_stack import LayerStack
from ..flows.stack import Projection, joint_decode, joint_decode_and_log_volume, joint_encode
from ..volume.estimators import EncoderSurrogate, estimator_from
from ..volume.probes import draw_probes
from ..volume.surrogate import Estimator
from .surrogate_likelihood import SurrogateLikelihood

# Up to here the exact volume costs little more than a surrogate whose value is exact.
_CHEAP_DIMENSION = 16


class VolumeRule(ABC):
    """A rule by which the log-volume at the projection of a value is differentiated.

    ``collapses`` tells whether its gradient shrinks a manifold in wide noise: see
    ``noise_width.py``.
    """

    collapses: bool = True

    @abstractmethod
    def project(self, stack: LayerStack, x: Tensor, context: Tensor | None) -> Projection:
        """Project values (B, *) with a context of as many rows."""

    def for_draws(self) -> VolumeRule:
        """The rule for values that the distribution drew itself, by default the exact volume."""
        return ExactVolume()


@final
class ExactVolume(VolumeRule):
    """The exact log-volume, by d Jacobian-vector products, with its own gradient."""

    def project(self, stack: LayerStack, x: Tensor, context: Tensor | None) -> Projection:
        """Encode, and decode with the log-volume."""
        return stack.parts.project_with_log_volume(x, context)


@final
class CorrectedSurrogate(VolumeRule):
    r"""The exact log-volume, with the gradient of a surrogate S.

    .. math:: V = \mathrm{SG}[V_\text{exact}] + S - \mathrm{SG}[S]

    Without gradients it is the exact log-volume and costs no more. For values that the
    distribution drew itself the exact gradient is taken, or refused (``refuses_draws``).
    """

    def __init__(
        self,
        estimator: str | Estimator = "encoder",
        num_probes: int = 1,
        probes: str = "orthonormal",
        refuses_draws: bool = True,
    ) -> None:
        self._estimator = estimator_from(estimator)
        # Its gradient goes to the encoder alone, so the decoder cannot gain by shrinking.
        self.collapses = not isinstance(self._estimator, EncoderSurrogate)
        self._draw_probes = partial(draw_probes, probes, num_probes)
        self._refuses_draws = refuses_draws

    def project(self, stack: LayerStack, x: Tensor, context: Tensor | None) -> Projection:
        """Encode and decode for the surrogate, and decode again for the exact value."""
        if not torch.is_grad_enabled():
            return ExactVolume().project(stack, x, context)
        # The surrogate's products need autograd, which refuses tensors of inference mode.
        context = None if context is None else out_of_inference(context)
        composite = stack.composite
        encode = partial(joint_encode, composite, context=context)
        decode = partial(joint_decode, composite, context=context)
        z, reconstruction, surrogate = self._estimator(x, encode, decode, self._draw_probes)
        with torch.no_grad():
            exact = joint_decode_and_log_volume(composite, z.detach(), context).log_volume
        log_volume = exact + (surrogate - surrogate.detach())
        z, log_volume = stack.parts.to_base(z, log_volume, context)
        return Projection(z, reconstruction, log_volume)

    def for_draws(self) -> VolumeRule:
        """The exact volume, or an error if gradients are wanted and draws are refused."""
        if self._refuses_draws and torch.is_grad_enabled():
            raise UnsupportedModelError(
                "volume='surrogate' was asked for the density of a value that this distribution "
                "drew itself, as a guide does. Such values lie on the manifold, where nothing "
                "trains the encoder's derivative across it, and the surrogate's gradient is "
                "silently wrong. Use volume='exact' or 'auto' there."
            )
        return super().for_draws()


def volume_rule(volume: str, stack: LayerStack, latent_dim: int, likelihood: Any) -> VolumeRule:
    """The rule of a name, for a stack with a number of latent dimensions.

    The surrogate is that of the model's training term, if it has one.
    """
    check_choice(volume, ("auto", "exact", "surrogate"), "volume")
    if volume == "surrogate" and stack.is_closed_form:
        raise OptionError(
            "volume='surrogate' needs an encoder that is a pseudo-inverse of the decoder, which "
            "the inverse of a chart of a known surface is not, and here the exact volume is a "
            "closed form. Use volume='exact' or 'auto'."
        )
    cheap = stack.is_closed_form or latent_dim <= _CHEAP_DIMENSION
    if volume == "exact" or (volume == "auto" and cheap):
        return ExactVolume()
    refuses = volume == "surrogate"
    if not isinstance(likelihood, SurrogateLikelihood):
        return CorrectedSurrogate(refuses_draws=refuses)
    return CorrectedSurrogate(
        likelihood.estimator, likelihood.num_probes, likelihood.probes, refuses
    )

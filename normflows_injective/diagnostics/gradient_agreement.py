"""Agreement of the gradients of surrogates with those of exact log-volumes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import normflows as nf
import torch
from torch import Tensor, nn

from ..autodiff.jacobians import jacobian, jacobian_by_rows
from ..autodiff.products import out_of_inference
from ..errors import UnsupportedModelError
from ..flows.layer_stack import LayerStack
from ..flows.stack import joint_decode, joint_encode
from ..modules.precision import as_factored
from ..volume.log_volumes import matrix_log_volume


class GradientBias(NamedTuple):
    r"""Agreement of an estimated gradient :math:`\hat g` with the exact gradient :math:`g`.

    Attributes:
        relative_error: :math:`\lVert \hat g - g \rVert / \lVert g \rVert`, without unit; 0 for an
            unbiased estimate. NaN if :math:`g` vanishes, as without trained parameters.
        cosine: Cosine of the angle between both; 1 if they point the same way, NaN as above.

    Examples:
        >>> bias = GradientBias(relative_error=0.1, cosine=0.995)
        >>> bias.cosine
        0.995
    """

    relative_error: float
    cosine: float


class SurrogateBias(NamedTuple):
    r"""Bias of the surrogates of the log-volume, from ``InjectiveDistribution.surrogate_bias``.

    Attributes:
        decoder: :class:`GradientBias` of
            :math:`\operatorname{tr}(\mathrm{SG}[F'] G')` against
            :math:`\tfrac12 \log\det G'^\top G'` at the same latents, with respect to the
            parameters of the decoding map.
        encoder: :class:`GradientBias` of :math:`-\operatorname{tr}(F'\, \mathrm{SG}[G'])`, which
            training uses by default, against :math:`-\tfrac12 \log\det F' F'^\top` at the same
            data, with respect to the parameters of the encoding map.

    References:
        Free-form injective flows, arXiv 2306.01843.

    Examples:
        >>> bias = SurrogateBias(GradientBias(0.0, 1.0), GradientBias(0.1, 0.995))
        >>> bias.encoder.relative_error
        0.1
    """

    decoder: GradientBias
    encoder: GradientBias


def measure_bias(stack: LayerStack, x: Tensor, context: Tensor | None) -> SurrogateBias:
    r"""Compare expected gradients of surrogates, in the mean over data (B, \*), with exact ones.

    Both surrogates are exact if :math:`F'(x)` is the Moore-Penrose inverse of :math:`G'`. It is
    not enough that the encoder inverts the decoder on the manifold: its derivative across the
    manifold counts too.
    """
    refuse_closed_form(stack)
    parameters = _trained(stack.composite)
    context = None if context is None else out_of_inference(context)
    encode = partial(joint_encode, stack.composite, context=context)
    decode = partial(joint_decode, stack.composite, context=context)
    with torch.inference_mode(False), torch.enable_grad():
        # One pass of the encoder at the data themselves, as in training.
        z, pulling = jacobian_by_rows(encode, out_of_inference(x).detach(), create_graph=True)
        pushing = jacobian(decode, z.detach()).jacobian
        surrogate, exact = _trace(pulling.detach(), pushing), matrix_log_volume(pushing).mean()
        decoder, _ = _agreement(surrogate, exact, parameters)
        encoder, _ = _agreement_of_encoder(pulling, pushing.detach(), parameters)
        return SurrogateBias(decoder, encoder)


def encoder_agreement(
    composite: Sequence[nf.flows.Flow], x: Tensor, context: Tensor | None
) -> tuple[GradientBias, float]:
    """Compare the expected gradient of the encoder surrogate at data (B, *) with the exact one.

    The bias comes with the ratio of the norms of the two gradients.
    """
    # Under autocast, torch before 2.9 takes casts of weights that were made without gradients.
    torch.clear_autocast_cache()
    with torch.enable_grad():
        encode = partial(joint_encode, composite, context=context)
        z, pulling = jacobian_by_rows(encode, x.detach(), create_graph=True)
    with torch.no_grad():
        pushing = jacobian(partial(joint_decode, composite, context=context), z.detach()).jacobian
    return _agreement_of_encoder(pulling, pushing, _trained(composite))


def refuse_closed_form(stack: LayerStack) -> None:
    """Raise for layers of known surfaces, which have no surrogate."""
    if stack.is_closed_form:
        raise UnsupportedModelError(
            "The layers are a chart of a known surface, whose log-volume is a closed form: no "
            "surrogate is used for it, so there is no bias to measure."
        )


def _trained(layers: Sequence[nf.flows.Flow]) -> list[Tensor]:
    return [p for p in nn.ModuleList(layers).parameters() if p.requires_grad]


def _agreement_of_encoder(
    pulling: Tensor, pushing: Tensor, parameters: list[Tensor]
) -> tuple[GradientBias, float]:
    with torch.enable_grad():
        surrogate, exact = -_trace(pulling, pushing), -matrix_log_volume(pulling.mT).mean()
    return _agreement(surrogate, exact, parameters)


def _trace(pulling: Tensor, pushing: Tensor) -> Tensor:
    return (pulling * pushing.mT).sum((1, 2)).mean()


def _agreement(
    estimate: Tensor, exact: Tensor, parameters: list[Tensor]
) -> tuple[GradientBias, float]:
    """Compare the gradients of two numbers; NaN where there is none to compare with."""
    estimated, true = _flat_gradient(estimate, parameters), _flat_gradient(exact, parameters)
    norms = estimated.norm(), true.norm()
    relative_error = float((estimated - true).norm() / norms[1])
    cosine = float(estimated @ true / (norms[0] * norms[1]))
    return GradientBias(relative_error, cosine), float(norms[0] / norms[1])


def _flat_gradient(value: Tensor, parameters: list[Tensor]) -> Tensor:
    if not (parameters and value.requires_grad):
        return as_factored(value.new_zeros(sum(p.numel() for p in parameters)))
    gradients = torch.autograd.grad(
        value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return as_factored(torch.cat([gradient.detach().flatten() for gradient in gradients]))

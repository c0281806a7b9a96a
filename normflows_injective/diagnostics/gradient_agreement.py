"""Is the gradient of a surrogate of the log-volume to be trusted?"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..autodiff.jacobians import jacobian, jacobian_by_rows
from ..autodiff.products import out_of_inference
from ..errors import UnsupportedModelError
from ..flows.split import joint_decode, joint_encode
from ..flows.stack import LayerStack
from ..modules.precision import as_factored
from ..volume.log_volumes import matrix_log_volume

__all__ = ["GradientBias", "SurrogateBias", "measure_bias"]


class GradientBias(NamedTuple):
    """An estimated gradient beside the exact one.

    Attributes:
        relative_error: Norm of their difference over that of the exact one; 0 is unbiased. NaN if
            the exact one vanishes, as without trained parameters.
        cosine: Cosine of the angle between them.
    """

    relative_error: float
    cosine: float


class SurrogateBias(NamedTuple):
    r"""Bias of the surrogates of the log-volume, in two groups of parameters.

    Attributes:
        decoder: The gradient of
            :math:`\operatorname{tr}(\mathrm{SG}[F'] G')`, in the parameters of the decoding map,
            beside that of :math:`\tfrac12 \log\det G'^\top G'` at the same latents.
        encoder: The gradient of :math:`-\operatorname{tr}(F'\, \mathrm{SG}[G'])`, which training
            uses by default, in the parameters of the encoding map, beside that of
            :math:`-\tfrac12 \log\det F' F'^\top` at the same data.
    """

    decoder: GradientBias
    encoder: GradientBias


def measure_bias(stack: LayerStack, x: Tensor, context: Tensor | None) -> SurrogateBias:
    r"""Compare expected gradients of surrogates with exact ones, without noise of probes.

    Both surrogates are exact if :math:`F'(x)` is the Moore-Penrose inverse of :math:`G'`. That the
    encoder inverts the decoder on the manifold is not enough: its derivative across the manifold
    is part of it.

    Args:
        stack: Layers with an injection among them.
        x: Data (B, *).
        context: Context with B rows, or None.

    Returns:
        :class:`SurrogateBias` of the means over the data.

    Raises:
        UnsupportedModelError: If the layers are charts of known surfaces.

    Examples:
        >>> from normflows_injective.flows import LinearInjection
        >>> bias = measure_bias(LayerStack([LinearInjection(2, 4)]), torch.randn(8, 4), None)
        >>> bias.decoder.relative_error < 1e-4
        True
    """
    refuse_closed_form(stack)
    parameters: list[Tensor] = [
        p for flow in stack.composite for p in flow.parameters() if p.requires_grad
    ]
    context = None if context is None else out_of_inference(context)
    encode = partial(joint_encode, stack.composite, context=context)
    decode = partial(joint_decode, stack.composite, context=context)
    with torch.inference_mode(False), torch.enable_grad():
        x = out_of_inference(x).detach()
        # One pass of the encoder at the data themselves, as in training.
        z, pulling = jacobian_by_rows(encode, x, create_graph=True)
        pushing = jacobian(decode, z.detach()).jacobian

        def bias(surrogate: Tensor, exact: Tensor) -> GradientBias:
            return _compare(_flat(surrogate, parameters), _flat(exact, parameters))

        return SurrogateBias(
            decoder=bias(_trace(pulling.detach(), pushing), matrix_log_volume(pushing).mean()),
            encoder=bias(
                -_trace(pulling, pushing.detach()), -matrix_log_volume(pulling.mT).mean()
            ),
        )


def _trace(pulling: Tensor, pushing: Tensor) -> Tensor:
    return (pulling * pushing.mT).sum((1, 2)).mean()


def _compare(estimated: Tensor, exact: Tensor) -> GradientBias:
    error = (estimated - exact).norm() / exact.norm()
    cosine = estimated @ exact / (estimated.norm() * exact.norm())
    return GradientBias(float(error), float(cosine))


def _flat(value: Tensor, parameters: list[Tensor]) -> Tensor:
    if not (parameters and value.requires_grad):
        return as_factored(value.new_zeros(1))
    found = torch.autograd.grad(
        value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return as_factored(torch.cat([gradient.detach().flatten() for gradient in found]))


def refuse_closed_form(stack: LayerStack) -> None:
    """Raise for layers of known surfaces, which have no surrogate."""
    if stack.is_closed_form:
        raise UnsupportedModelError(
            "The layers are a chart of a known surface, whose log-volume is a closed form: no "
            "surrogate is used for it, so there is no bias to measure."
        )

"""The training loss of an injective flow, from its base, its layers and its training term."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..autodiff.gradients import out_of_inference
from ..checks import check_loss
from ..flows.joint import joint_decode, joint_decode_and_log_volume, joint_encode
from ..host.bases import base_log_prob, sample_base
from ..host.calls import summed_inverse
from ..host.first_meeting import warm_up
from ..modules.behind import Opened
from .exact_likelihood import ExactLikelihood
from .loss_terms import LossTerms, SurrogateTerms
from .parts import InjectiveModel, Parts, look_into, model_dtype
from .weights import mean_loss

__all__ = ["first_loss", "forward_kld", "loss_terms", "prior_samples", "terms"]


def forward_kld(
    model: InjectiveModel,
    parts: Parts,
    x: Tensor,
    context: Tensor | None,
    weights: Tensor | None,
) -> Tensor:
    """Mean of the losses of single samples, weighted if there are weights.

    Args:
        model: Model whose loss it is.
        parts: Its modules.
        x: Data of shape :math:`(B, *)`, checked.
        context: One row per sample, or None.
        weights: Weights of the samples, (B,), or None.

    Returns:
        Loss, 0-dimensional.

    Raises:
        NonFiniteError: If it is not finite; then no training step is counted.
    """
    with model.likelihood.training_loss(model, parts.every):
        found = terms(model, parts, x, context)
        loss = mean_loss(found.loss, weights)
        check_loss(loss, found._asdict())
    return loss


def loss_terms(
    model: InjectiveModel, parts: Parts, x: Tensor, context: Tensor | None
) -> LossTerms:
    """Parts of the loss per sample.

    Args:
        model: Model whose loss it is.
        parts: Its modules.
        x: Data of shape :math:`(B, *)`, checked.
        context: One row per sample, or None.

    Returns:
        :class:`~normflows_injective.LossTerms`.
    """
    with model.likelihood.training_loss(model, parts.every):
        return terms(model, parts, x, context)


def prior_samples(model: InjectiveModel, x: Tensor, context: Tensor | None) -> Tensor | None:
    """As many latents from the model as there are data, where the training term needs them.

    Args:
        model: Model with a training term.
        x: Data of shape :math:`(B, *)`.
        context: One row per sample, or None.

    Returns:
        Latents of shape :math:`(B, *)` without a graph, or None.
    """
    if model.likelihood.latent_cycle == 0:
        return None
    # Layers that initialise themselves must see data first, not prior samples.
    warm_up(partial(joint_encode, model.flows, context=context), x)
    with torch.no_grad():
        dtype = model_dtype(model.q0, model.flows)
        z, _ = sample_base(model.q0, x.shape[0], context, dtype)
        return joint_decode(model.latent_block, z, context)


def first_loss(x: Tensor, context: Tensor | None, model: InjectiveModel) -> Tensor:
    """The loss of a model whose layers meet data (B, *) for the first time."""
    return terms(model, look_into(model), x, context).loss.mean()


def terms(model: InjectiveModel, parts: Parts, x: Tensor, context: Tensor | None) -> LossTerms:
    """Parts of the loss per sample, without counting a step.

    Args:
        model: Model whose loss it is.
        parts: Its modules.
        x: Data of shape :math:`(B, *)`, checked.
        context: One row per sample, or None.
    """
    # The surrogate's products need autograd, which refuses tensors of inference mode.
    context = None if context is None else out_of_inference(context)
    likelihood = model.likelihood
    exact = isinstance(likelihood, ExactLikelihood)
    decode = joint_decode_and_log_volume if exact else joint_decode
    passed: SurrogateTerms = likelihood(
        x,
        _opened(joint_encode, parts, context),
        _opened(decode, parts, context),
        prior_samples(model, x, context),
    )
    z, log_det = summed_inverse(parts.latent_block, passed.z, context)
    log_prob = base_log_prob(model.q0, z, context) + log_det
    likelihood.watch(model, x, passed)
    return LossTerms(
        log_prob_latent=log_prob,
        surrogate=passed.volume,
        reconstruction_error=passed.reconstruction_error,
        loss=likelihood.loss(passed, log_prob),
    )


def _opened(function: Callable[..., Any], parts: Parts, context: Tensor | None) -> Opened:
    call = Opened(function, parts.composite, context=context)
    call.behind = parts.behind
    return call

"""The training loss of an injective flow, from its base, its layers and its training term."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..autodiff.products import out_of_inference
from ..checks import check_loss
from ..flows.stack import (
    Passes,
    joint_decode,
    joint_decode_and_log_volume,
    joint_encode,
    training_inverse,
)
from ..host.bases import base_log_prob, sample_base
from ..host.first_meeting import give_first_data
from ..modules.contents import Opened
from ..volume.reconstruction import squared_error
from .loss_terms import LossTerms, mean_loss
from .parts import InjectiveModel, Parts, look_into, model_dtype, stack_of


def forward_kld(
    model: InjectiveModel,
    parts: Parts,
    x: Tensor,
    context: Tensor | None,
    weights: Tensor | None,
) -> Tensor:
    """Mean of the losses at data (B, *), weighted if there are weights (B,).

    A loss that is not finite raises NonFiniteError, and no training step is counted.
    """
    with model.likelihood.training_loss(model, parts.every):
        terms = _terms(model, parts, x, context)
        loss = mean_loss(terms.loss, weights)
        check_loss(loss, terms._asdict())
    return loss


def loss_terms(
    model: InjectiveModel, parts: Parts, x: Tensor, context: Tensor | None
) -> LossTerms:
    """Parts of the loss at each of the data (B, *)."""
    with model.likelihood.training_loss(model, parts.every):
        return _terms(model, parts, x, context)


def first_loss(x: Tensor, context: Tensor | None, model: InjectiveModel) -> Tensor:
    """Loss of a model whose layers meet data (B, *) for the first time; it must be finite."""
    return _terms(model, look_into(model), x, context).loss.mean()


def first_pass(batch: Tensor, space: str, context: Tensor | None, model: Any) -> Tensor:
    """Images of a batch that layers meet for the first time, which must be finite.

    The images of base variables and latents are data; that of data is the reconstruction error
    less the log-density of the latents.
    """
    stack = stack_of(model)
    if space == "base":
        return stack.decode_base(batch, context)
    if space == "latent":
        return stack.decode(batch, context)
    # In standardised coordinates: the squares of large units would overflow.
    inner, batch = stack.inner, stack.standardise(batch)
    z = inner.encode_to_base(batch, context)
    log_prob = base_log_prob(model.q0, z, context)
    return squared_error(batch, inner.decode_base(z, context)) - log_prob


def prior_samples(model: InjectiveModel, x: Tensor, context: Tensor | None) -> Tensor | None:
    """As many latents from the model as there are data, where the training term needs them."""
    if model.likelihood.latent_cycle == 0:
        return None
    # Layers that initialise themselves must see data first, not prior samples.
    give_first_data(partial(joint_encode, model.flows, context=context), x)
    with torch.no_grad():
        dtype = model_dtype(model.q0, model.flows)
        z, _ = sample_base(model.q0, x.shape[0], context, dtype)
        return joint_decode(model.latent_block, z, context)


def _terms(model: InjectiveModel, parts: Parts, x: Tensor, context: Tensor | None) -> LossTerms:
    """Parts of the loss at each of the data (B, *), without counting a step."""
    # The surrogate's products need autograd, which refuses tensors of inference mode.
    context = None if context is None else out_of_inference(context)
    likelihood = model.likelihood
    directions = joint_encode, joint_decode, joint_decode_and_log_volume
    passes = Passes(*(_opened(direction, parts, context) for direction in directions))
    prior = prior_samples(model, x, context)
    x = parts.stack.standardise(x)
    terms = likelihood.terms(x, passes, prior)
    z, log_det = training_inverse(parts.stack.latent_block, terms.z, context)
    log_prob = base_log_prob(model.q0, z, context) + log_det
    likelihood.watch(model, x, terms)
    return LossTerms(
        log_prob_latent=log_prob,
        volume=terms.volume,
        reconstruction_error=terms.reconstruction_error,
        loss=likelihood.loss(terms, log_prob),
    )


def _opened(direction: Callable[..., Any], parts: Parts, context: Tensor | None) -> Opened:
    call = Opened(direction, parts.inner, context=context)
    call.contents = parts.contents
    return call

"""Reverse divergences, for targets that are densities on the model's own manifold."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..checks import check_event_shape, check_real
from ..errors import OffManifoldError, OptionError, ShapeError
from ..host.context import context_arguments
from .parts import InjectiveModel


def reverse_kld(
    model: InjectiveModel,
    num_samples: int,
    beta: float,
    score_fn: bool,
    context: Tensor | None,
) -> Tensor:
    r"""Monte-Carlo estimate of :math:`\mathbb E_q[\log q(x) - \beta \log p(x)]`.

    Without the score function the base and the latent block get the path gradient alone, whose
    mean is the same where the encoder inverts the decoder exactly. Parameters that move the
    manifold keep their score term, which has no mean of zero, because the support of the density
    moves with them.
    """
    _require_target(model, "reverse_kld")
    x, log_q = _sample_for_gradient(model, num_samples, score_fn, context)
    return log_q.mean() - beta * _target_log_prob(model, x, context).mean()


def reverse_alpha_div(
    model: InjectiveModel,
    num_samples: int,
    alpha: float,
    dreg: bool,
    context: Tensor | None,
    beta: float = 1.0,
) -> Tensor:
    r"""A monotonic function of an alpha divergence, from samples of the model.

    .. math:: D_\alpha(p \| q) = \frac{1}{\alpha (\alpha - 1)}
              \Big(\int p^\alpha q^{1 - \alpha} - 1\Big), \qquad
              \mathcal L = \operatorname{sign}(\alpha (\alpha - 1)) \log \sum_i w_i^\alpha,
              \quad w_i = \frac{p(x_i)}{q(x_i)}, \quad x_i \sim q

    It is the expression of normflows, with the sign that lets the divergence fall for every order.
    The limits are :math:`\mathrm{KL}(q \| p)` at order 0 and :math:`\mathrm{KL}(p \| q)` at order
    1; order 2 is half of :math:`\chi^2(p \| q)`, order -1 half of :math:`\chi^2(q \| p)`. With the
    doubly reparametrised gradient (``dreg``, arXiv 1810.04152) order 1 is the importance-weighted
    bound with as many samples.
    """
    _require_target(model, "reverse_alpha_div")
    alpha = check_real(alpha, "alpha")
    if alpha == 0:
        raise OptionError(
            "reverse_alpha_div with alpha=0 is constant and trains nothing. Its limit is "
            "KL(q | p): use reverse_kld, or another alpha."
        )
    if alpha == 1 and not dreg:
        raise OptionError(
            "reverse_alpha_div with alpha=1 and dreg=False is identically zero and trains "
            "nothing. Use another alpha, dreg=True, or reverse_kld."
        )
    if dreg and any(parameter.requires_grad for parameter in _moving_parameters(model)):
        raise OptionError(
            "dreg=True drops score terms that have no mean of zero while the manifold is being "
            "trained. Freeze the layers from the injection on, or use dreg=False."
        )
    x, log_q = _sample_for_gradient(model, num_samples, not dreg, context)
    log_w = beta * _target_log_prob(model, x, context) - log_q
    sign = 1.0 if alpha * (alpha - 1) > 0 else -1.0
    if not dreg:
        return sign * torch.logsumexp(alpha * log_w, 0)
    # The doubly reparametrised gradient of log sum w^alpha, by normalised weights.
    w_alpha = torch.softmax(alpha * log_w.detach(), 0)
    weights = (1 - alpha) * w_alpha + alpha * w_alpha**2
    return sign * alpha * (weights * log_w).sum()


def _require_target(model: InjectiveModel, name: str) -> None:
    if model.p is None:
        raise OffManifoldError(
            f"{name} compares the model with a target, and p is None. Give p=, a density on the "
            "manifold."
        )
    if not getattr(model.p, "on_manifold", False):
        raise OffManifoldError(
            f"{name} needs a target with the support of the model, but {type(model.p).__name__} "
            "does not declare itself a density on the manifold. Against a density on the data "
            "space the true divergence is infinite, and any finite number would be meaningless. "
            "If p is a density against the manifold's own measure, set p.on_manifold = True; to "
            "learn from data use forward_kld."
        )
    ours = getattr(model.composite[-1], "measure", "hausdorff")
    theirs = getattr(model.p, "measure", ours)
    if ours != theirs:
        raise OffManifoldError(
            f"The model is a density against the measure {ours!r} and p against {theirs!r}, so "
            "their ratio means nothing. Build both with the same measure=."
        )


def _target_log_prob(model: InjectiveModel, x: Tensor, context: Tensor | None) -> Tensor:
    check_event_shape(x, getattr(model.p, "shape", None), "the model's sample, by p's shape,")
    log_p: Tensor = model.p.log_prob(x, **context_arguments(model.p, context, "log_prob"))
    if log_p.shape != (x.shape[0],):
        raise ShapeError(
            f"p.log_prob must give one value per sample, shape ({len(x)},), got "
            f"{tuple(log_p.shape)}."
        )
    return log_p


def _sample_for_gradient(
    model: InjectiveModel, num_samples: int, score_fn: bool, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    x, sampled = model.sample(num_samples, context=context)
    log_q = cast(Tensor, sampled)
    if score_fn:
        return x, log_q
    # Only the gradient through x is taken from the second evaluation: for a free-form pair the
    # encoder finds z only nearly, and so the second value is that of another point.
    moving = [parameter for parameter in _moving_parameters(model) if parameter.requires_grad]
    log_prob = partial(model.log_prob, context=context)
    apply: Any = _PathLogProb.apply
    path: Tensor = apply(log_prob, x, *moving)
    return x, log_q.detach() + path - path.detach()


class _PathLogProb(torch.autograd.Function):
    """A log-density (B,) at x (B, *) whose gradient reaches x and the parameters given alone.

    Without a switch of ``requires_grad``, which other threads would see.
    """

    @staticmethod
    def forward(
        ctx: Any, log_prob: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor
    ) -> Tensor:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            ctx.value = log_prob(point)
        ctx.inputs = (point, *parameters)
        return ctx.value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Retained, because the caller's graph may be.
        through = torch.autograd.grad(
            ctx.value, ctx.inputs, gradient, retain_graph=True, allow_unused=True
        )
        return None, *through


def _moving_parameters(model: InjectiveModel) -> list[nn.Parameter]:
    """Parameters of the layers that move the manifold."""
    moving = [flow for flow in model.composite if not getattr(flow, "keeps_surface", False)]
    return [parameter for flow in moving for parameter in flow.parameters()]

"""Models of normflows as distributions of Pyro."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.distributions import constraints

from ...host.bases import base_log_prob
from ..supports.boxes import Scalars
from ..supports.support import given_support, score_where, support_of
from .model_distribution import ModelDistribution


@final
class FlowDistribution(ModelDistribution):
    r"""A model of normflows, or ours, as a Pyro distribution: prior, likelihood or guide.

    .. math:: \log q(x) = \log q_0(z) - \tfrac12 \log\det G'(z)^\top G'(z), \quad x = G(z)

    in nats, summed in the dtype of the value, unlike the sums of normflows. Draws are
    reparameterised unless the base has trained parameters that its draws carry no gradient to (the
    weights of a mixture); then ``has_rsample`` is false and Pyro uses the score function.

    Draws are scored without an inverse, so that a guide may have layers that lack one; other
    values are always scored by the present parameters. Build it inside the model or guide, and
    register the parameters with ``pyro.module`` or :func:`module`.

    The log-dets of ``nf.flows.Residual`` are random estimates: stochastic variational inference
    may use them, samplers and importance-weighted bounds may not.

    Args:
        model: ``nf.NormalizingFlow``, ``nf.ConditionalNormalizingFlow``, ``nf.ClassCondFlow`` or
            ``nfi.InjectiveNormalizingFlow``. After an injection the density is against the
            surface's measure, and values off the surface have none; for a learned manifold see
            :class:`InjectiveDistribution`, which has more options.
        event_dim: Number of dimensions of an event: 1 for vectors, 3 for images, 0 for scalars
            from a model of one dimension.
        context: Of shape (*batch_shape, C), or class labels of shape (*batch_shape).
        validate_args: As in torch.
        support: Where the values lie, for layers of your own that do not reach all of space, as a
            constraint of events or of their coordinates; None finds the boxes of uniform bases,
            logit and circular layers, the images of these under later layers, and surfaces. Values
            outside have no density.

    Raises:
        OptionError: If this is no such model, or the support no such constraint.
        ShapeError: If its events have another number of dimensions.
        ContextError: If a context is missing or superfluous.
        UnsupportedLayerError: If a layer has no density.
        UnsupportedModelError: When a value is scored that it did not draw, through a layer
            without an inverse.

    References:
        Change of variables.

    Examples:
        >>> import normflows as nf
        >>> import pyro
        >>> flow = nf.NormalizingFlow(
        ...     nf.distributions.DiagGaussian(2),
        ...     [nf.flows.AffineCouplingBlock(nf.nets.MLP([1, 8, 2]))],
        ... )
        >>> def model():
        ...     pyro.module("flow", flow)
        ...     with pyro.plate("data", 5):
        ...         return pyro.sample("x", FlowDistribution(flow))
        >>> model().shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        model: Any,
        event_dim: int | None = 1,
        context: Tensor | None = None,
        validate_args: bool | None = None,
        *,
        support: constraints.Constraint | None = None,
    ) -> None:
        super().__init__(model, event_dim, context, validate_args)
        self._own_support = (
            None if support is None else given_support(support, self.event_dim, "support")
        )

    @property
    def support(self) -> constraints.Constraint:
        """The given support, or else real space, a box or its image, or the surface."""
        if self._own_support is not None:
            return self._own_support
        support = self._support_of_rows(self.context)
        if self.event_dim > 0:
            return support
        return getattr(support, "base_constraint", None) or Scalars(support)

    def draw(self, num_samples: int, context: Tensor | None) -> tuple[Tensor, Any]:
        """Draw values (n, *) with their log-density (n,)."""
        z, log_q = self.base_draws(num_samples, context)
        x, log_volume = self.stack.push(z, context)
        return x, log_q - log_volume

    def score(self, x: Tensor, context: Tensor | None, drawn: Any) -> Tensor:
        """Log-density (B,) in nats of values (B, *)."""
        if drawn is not None:
            return drawn
        support = self._own_support or self._support_of_rows(context)
        if isinstance(getattr(support, "base_constraint", support), type(constraints.real)):
            return self._score(x, context)
        # Outside, an encoder projects and an inverse may be none: such a point has no density.
        inside = support.check(x)
        inside = inside.flatten(1).all(1) if inside.dim() > 1 else inside
        if not self.stack.raises_dimension:
            # On the faces of a box latents are infinite.
            with torch.no_grad():
                inside = inside & score_where(inside, self._reach, x, context).isfinite()
        return score_where(inside, self._score, x, context)

    def _support_of_rows(self, context: Tensor | None) -> Any:
        if self._surface is not None:
            return self._surface
        return support_of(self.stack, len(self._model_shape), context, self.model.q0)

    def _score(self, x: Tensor, context: Tensor | None) -> Tensor:
        z, log_volume = self.stack.pull(x, context)
        return base_log_prob(self.model.q0, z, context) - log_volume

    def _reach(self, x: Tensor, context: Tensor | None) -> Tensor:
        z, log_volume = self.stack.pull(x, context)
        return z.flatten(1).sum(1) + log_volume

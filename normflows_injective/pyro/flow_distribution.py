"""Models of normflows as distributions of Pyro."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor
from torch.distributions import constraints

from ..bases import base_log_prob
from .constraints import score_where, support_of
from .model_distribution import ModelDistribution

__all__ = ["FlowDistribution"]


@final
class FlowDistribution(ModelDistribution):
    r"""A model of normflows, or ours, as a Pyro distribution: prior, likelihood or guide.

    .. math:: \log q(x) = \log q_0(z) - \tfrac12 \log\det G'(z)^\top G'(z), \quad x = G(z)

    in nats, summed in the dtype of the value, which the host's own sums are not. Draws are
    reparameterised unless the base has trained parameters that its draws carry no gradient to (the
    weights of a mixture); then ``has_rsample`` is false and Pyro uses the score function.

    What was drawn is scored without an inverse, so that a guide may have layers that lack one;
    what was given is always scored by the present parameters. Build it inside the model or guide,
    and register the parameters with ``pyro.module`` or :func:`module`.

    The log-dets of ``nf.flows.Residual`` are random estimates: stochastic variational inference
    may use them, samplers and importance-weighted bounds may not.

    Args:
        model: ``nf.NormalizingFlow``, ``nf.ConditionalNormalizingFlow``, ``nf.ClassCondFlow`` or
            ``nfi.InjectiveNormalizingFlow``. Behind an injection the density is against the
            surface's measure, and values off the surface have none; for a learned manifold see
            :class:`InjectiveDistribution`, which has more to choose from.
        event_dim: Number of dimensions of an event: 1 for vectors, 3 for images, 0 for scalars
            from a model of one dimension.
        context: Of shape (*batch_shape, C), or class labels of shape (*batch_shape).
        validate_args: As in torch.

    Raises:
        OptionError: If this is no such model.
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

    @property
    def support(self) -> constraints.Constraint:
        """All of space, or the surface."""
        support: Any = support_of(self.stack, self.event_dim, self.context)
        return support.base_constraint if self.event_dim == 0 else support

    def draw(self, num_samples: int, context: Tensor | None) -> tuple[Tensor, Any]:
        """Draw values (n, *) with their log-density (n,)."""
        z, log_q = self.base_draws(num_samples, context)
        x, log_volume = self.stack.push(z, context)
        return x, log_q - log_volume

    def score(self, x: Tensor, context: Tensor | None, drawn: Any) -> Tensor:
        """Log-density (B,) in nats of values (B, *)."""
        if drawn is not None:
            return drawn
        if not self.stack.raises_dimension:
            return self._score(x, context)
        # An encoder projects, and a point off the image has no density there.
        near = support_of(self.stack, len(self._model_shape), context).check(x)
        return score_where(near, self._score, x, context)

    def _score(self, x: Tensor, context: Tensor | None) -> Tensor:
        z, log_volume = self.stack.pull(x, context)
        return base_log_prob(self.model.q0, z, context) - log_volume

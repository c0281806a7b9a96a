"""Layers of normflows as a transform of Pyro."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import normflows as nf
import torch
from pyro.distributions import TransformModule
from torch import Tensor
from torch.distributions import constraints

from ..checks import check_count, checks_arguments
from ..checks.sizes import as_size
from ..distributions.sample_cache import SampleCache, State, state_of
from ..errors import ContextError, UnsupportedLayerError
from ..flows.layer_stack import LayerStack, flatten_events
from ..host.context import needs_context
from ..modules.constants import ConstantCopies
from .memory.buffers import make_contiguous, watch_buffers
from .supports.boxes import bounded_domain
from .supports.support import given_support, support_of, whole_space


@final
class FlowTransform(TransformModule):
    r"""Layers of normflows, or of ``nfi.flows``, as a transform with trainable parameters.

    .. math:: y = G(z), \qquad \texttt{log\_abs\_det\_jacobian}(z, y)
              = \tfrac12 \log\det G'(z)^\top G'(z)

    It serves ``TransformedDistribution``, ``AutoNormalizingFlow``, NeuTra and ``ManifoldReparam``.
    The layers may end in charts of known surfaces, surfaces or simplex layers: then the dimension
    grows, the codomain is the surface, and the measure is that of the last layer.

    It remembers its own draws, so that they are scored without an inverse, and nothing else: a
    tensor of data is always scored by the present parameters. Register it with ``pyro.module``, or
    as an attribute of a ``PyroModule``.

    Args:
        flow: A layer, or layers from latent to data.
        event_dim: Number of dimensions of an event: 1 for vectors, 3 for images.
        cache_size: 1, or 0 to remember nothing.
        codomain: Where the layers lead, for layers of your own that do not reach all of space;
            None finds the boxes of logit and circular layers, the images of these under later
            layers, and surfaces.

    Raises:
        OptionError: If there is no layer, or the codomain is no constraint of such events.
        UnsupportedLayerError: If a layer has no density, if the manifold is learned (use
            :class:`InjectiveDistribution`), or if layers are in an order that cannot be scored.
        ContextError: If a layer needs a context (use :class:`FlowDistribution`).
        UnsupportedModelError: When a value is scored that it did not draw, through a layer
            without an inverse.

    References:
        Change of variables; arXiv 2406.09116 for surfaces.

    Examples:
        >>> import pyro.distributions as dist
        >>> from normflows_injective.flows import RadialSurface, SphereChart
        >>> from normflows_injective.flows.gauges import LpGauge
        >>> lift = FlowTransform([SphereChart(3, "stereographic"), RadialSurface(LpGauge(1.0))])
        >>> prior = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1).to_event(1), lift)
        >>> prior.event_shape, round(prior.sample().abs().sum().item(), 4)
        (torch.Size([3]), 1.0)
    """

    bijective = True

    def __init__(
        self,
        flow: nf.flows.Flow | Iterable[nf.flows.Flow],
        *,
        event_dim: int = 1,
        cache_size: int = 1,
        codomain: constraints.Constraint | None = None,
    ) -> None:
        super().__init__(cache_size=check_count(cache_size, "cache_size", least=0, most=1))
        event_dim = check_count(event_dim, "event_dim")
        self.stack = flow if isinstance(flow, LayerStack) else LayerStack(flow)
        make_contiguous(self.stack)
        _check_without_context(self.stack)
        self._events = event_dim
        self.domain = bounded_domain(self.stack, event_dim) or whole_space(event_dim)
        self.codomain = (
            support_of(self.stack, event_dim)
            if codomain is None
            else given_support(codomain, event_dim, "codomain")
        )
        # Draws, known by the sample, and latest inverses, known by their latents.
        self._drawn, self._inverted = SampleCache(), SampleCache()
        self._constants = ConstantCopies()

    @property
    def measure(self) -> str:
        """The measure that densities of its values are against."""
        return getattr(self.stack.flows[-1], "measure", "hausdorff")

    @checks_arguments
    def __call__(self, x: Tensor) -> Tensor:
        """Send latents (*, *event) to the data."""
        watch_buffers(self)
        y, log_det = flatten_events(self.stack.push, x, self._events)
        if self._cache_size:
            self._drawn.store(y, (x, log_det), self._state())
        return y

    @checks_arguments
    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log-volume (*) in nats of the map from latents x to data y = self(x)."""
        drawn = self.drawn_from(y)
        if drawn is not None and drawn[0] is x:
            return drawn[1]
        inverted = self._inverted.find(x, self._state, self._trains)
        if inverted is not None:
            return inverted
        return flatten_events(self.stack.push, x, self._events)[1]

    def has_drawn(self, y: Tensor) -> bool:
        """Whether y is the latest draw itself."""
        return self._drawn.holds(y)

    def drawn_from(self, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """Latents and log-volumes (*) of the latest draw, None for others and after changes."""
        found: tuple[Tensor, Tensor] | None = self._drawn.find(y, self._state, self._trains)
        return found

    def pull_by_constants(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (*, *event) of data and log-volumes (*), whose gradients see the data alone."""
        (stack,) = self._constants.of([self.stack])
        return flatten_events(stack.pull, y, self._events)

    def forward_shape(self, shape: Iterable[int]) -> torch.Size:
        """Shape of data for latents of a shape."""
        return self.stack.shape_of_data(as_size(shape, "shape"), self._events)

    def inverse_shape(self, shape: Iterable[int]) -> torch.Size:
        """Shape of latents for data of a shape."""
        return self.stack.shape_of_latents(as_size(shape, "shape"), self._events)

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """The transform by the same layers, with or without memory of their draws."""
        cache_size = check_count(cache_size, "cache_size", least=0, most=1)
        if cache_size == self._cache_size:
            return self
        return FlowTransform(
            self.stack, event_dim=self._events, cache_size=cache_size, codomain=self.codomain
        )

    def clear_cache(self) -> None:
        """Forget all draws."""
        self._drawn.clear()
        self._inverted.clear()

    def extra_repr(self) -> str:
        """Options as shown by ``print(transform)``."""
        return f"event_dim={self._events}, cache_size={self._cache_size}"

    @property
    def _trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    def _state(self) -> State:
        return state_of([self.stack])

    def _call(self, x: Tensor) -> Tensor:
        return flatten_events(self.stack.push, x, self._events)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return flatten_events(self.stack.pull, y, self._events)[0]

    @checks_arguments
    def _inv_call(self, value: Tensor) -> Tensor:
        watch_buffers(self)
        drawn = self.drawn_from(value)
        if drawn is not None:
            return drawn[0]
        x, log_volume = flatten_events(self.stack.pull, value, self._events)
        # The latents are new at every call, so this entry is never out of date.
        self._inverted.store(x, log_volume, self._state())
        return x


def _check_without_context(stack: LayerStack) -> None:
    needing = [type(flow).__name__ for flow in stack.flows if needs_context(flow)]
    if needing:
        raise ContextError(
            f"{' and '.join(sorted(set(needing)))} needs a context, which a transform does not "
            "get. Use FlowDistribution(model, context=...)."
        )
    if stack.is_learned:
        raise UnsupportedLayerError(
            "The inverse of a learned injection is a learned encoder, which is no exact inverse, "
            "so this is no transform. Use nfp.InjectiveDistribution(model), or sample its latents "
            "and decode them."
        )

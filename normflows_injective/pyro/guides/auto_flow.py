"""A guide by a stack of normflows layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, final

import normflows as nf
import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_feasible
from torch import Tensor

from ...checks import check_flag, check_positive, describe
from ...errors import ContextError, InjectiveFlowError, OptionError, ShapeError
from ...flows.coupling.steady_linear import SteadyLinear
from ...flows.stack import LayerStack
from ...flows.surfaces.angular_spline import AngularSpline
from ...host.context import needs_context
from ...host.first_data import awaits_first_data
from ...models.parts import model_dtype
from ..flow_transform import FlowTransform
from .joint_guide import JointGuide

__all__ = ["AutoFlow"]

FlowFactory = Callable[[int], nf.flows.Flow | Iterable[nf.flows.Flow]]
# Layers after which no coordinate is left where the last coupling could not reach it.
_MIXING = (
    nf.flows.Permute,
    nf.flows.LULinearPermute,
    nf.flows.InvertibleAffine,
    nf.flows.Invertible1x1Conv,
)
_ELEMENTWISE = (nf.flows.AffineConstFlow, nf.flows.PeriodicShift, nf.flows.PeriodicWrap)


@final
class AutoFlow(JointGuide):
    r"""A guide over all latent variables at once by a stack of normflows layers.

    .. math:: \theta = \text{loc} + s \odot (f_K \circ \pi_{K-1} \circ \dots \circ \pi_1 \circ f_1)
              (z), \qquad z \sim N(0, I_D)

    on the unconstrained latents :math:`\theta`, with permutations :math:`\pi_k` between the layers
    of the factory, so that couplings reach every coordinate, and a trained location and scale
    behind them, which start at the prototype. ``NeuTraReparam`` takes it. The default layers bear
    a learning rate of 0.01, and the JIT; the host's own layers want 0.001 to 0.003, and
    its splines cannot be traced by the JIT.

    Args:
        model: A Pyro model whose latent variables are continuous.
        flow_factory: Takes :math:`D` and gives a layer or a list of layers from latent to data;
            by default four rational-quadratic splines with LU linear maps between them.
        init_loc_fn: Pyro's initialisation, for the starting location.
        init_scale: Starting scale of the guide, the same in all directions.
        permute: Whether permutations are put between layers that have none between them.

    Raises:
        OptionError: If an option is out of range, or the factory gives no layers.
        ShapeError: If the layers do not keep the dimension.
        UnsupportedModelError: If a latent variable lies in a subsampled plate.

    References:
        Rezende and Mohamed, Variational inference with normalizing flows, arXiv 1505.05770.

    Examples:
        >>> import pyro
        >>> def model():
        ...     pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        >>> def couplings(dim):
        ...     halves = [dim - dim // 2, 64, 2 * (dim // 2)]
        ...     return [
        ...         nf.flows.AffineCouplingBlock(nf.nets.MLP(halves), scale_map="sigmoid")
        ...         for _ in range(4)
        ...     ]
        >>> guide = AutoFlow(model, couplings).build()
        >>> guide.median()["x"].shape
        torch.Size([3])
    """

    recipe = ("_factory",)

    def __init__(
        self,
        model: Callable[..., Any],
        flow_factory: FlowFactory | None = None,
        *,
        init_loc_fn: Callable[..., Any] = init_to_feasible,
        init_scale: float = 0.1,
        permute: bool = True,
    ) -> None:
        super().__init__(model, init_loc_fn=init_loc_fn)
        self._init_scale = float(check_positive(init_scale, "init_scale"))
        self._permutes = check_flag(permute, "permute")
        is_layer = isinstance(flow_factory, torch.nn.Module)
        if flow_factory is not None and (is_layer or not callable(flow_factory)):
            raise OptionError(
                "flow_factory must take the number of latent dimensions and give layers, got "
                f"{describe(flow_factory)}. Write lambda dim: [...]."
            )
        self._factory = spline_layers if flow_factory is None else flow_factory
        self.transform: FlowTransform | None = None

    def make_parameters(self) -> None:
        """Create the layers, in the dtype and on the device of the model's latents."""
        loc = self._init_loc()
        layers = checked_layers(self._factory(self.latent_dim), self.latent_dim)
        if self._permutes:
            layers = interleaved(layers, self.latent_dim)
        place = nf.flows.AffineConstFlow((self.latent_dim,))
        with torch.no_grad():
            place.t.copy_(loc)
            place.s.fill_(torch.tensor(self._init_scale).log())
        # Not a parameter of the transform under a second name: the JIT refuses that.
        self.register_buffer("_origin", torch.zeros_like(loc), persistent=False)
        transform = FlowTransform([*layers, place]).to(loc)
        self.transform = transform
        if any(awaits_first_data(module) for module in transform.modules()):
            with torch.no_grad():
                transform(self.get_base_dist().sample(torch.Size([64])))

    def get_base_dist(self) -> dist.TorchDistribution:
        """The standard normal of the latents."""
        origin: Any = self._origin
        return dist.Normal(origin, torch.ones_like(origin)).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> FlowTransform:
        """The layers as a transform."""
        self.build(*args, **kwargs)
        transform: Any = self.transform
        return transform

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        """The guide's distribution over the unconstrained latents (D,)."""
        transform = self.get_transform(*args, **kwargs)
        return dist.TransformedDistribution(self.get_base_dist(), transform)


def checked_layers(made: Any, dim: int) -> list[nf.flows.Flow]:
    """The layers that a factory gave, if they can be those of a guide.

    Args:
        made: What the factory gave.
        dim: Number of latent dimensions D that it got.

    Returns:
        The layers as a list.

    Raises:
        OptionError: If these are no layers, or none.
        ContextError: If a layer needs a context.
        ShapeError: If they do not map vectors (B, D) to vectors (B, D).

    Examples:
        >>> len(checked_layers(nf.flows.Permute(3), 3))
        1
    """
    try:
        stack = LayerStack(made)
    except OptionError as error:
        raise OptionError(
            f"flow_factory({dim}) must give a layer of normflows or a list of at least one, got "
            f"{describe(made)}. Give the layers alone, without a base or a transform around them; "
            "a guide without layers between is AutoDiagonalNormal."
        ) from error
    for flow in stack.flows:
        if needs_context(flow):
            raise ContextError(
                f"flow_factory({dim}) gave a {type(flow).__name__} that needs a context, which a "
                "guide over all latents does not get. Build it without context features."
            )
    advice = (
        "Build them for as many dimensions as the factory is told. A guide on a manifold needs "
        "noise around it: use AutoInjective."
    )
    try:
        shape = tuple(_trial(stack, dim)[1].shape[1:])
    except InjectiveFlowError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ShapeError(
            f"The layers of flow_factory({dim}) must take vectors of {dim} latents, but fail on "
            f"them: {error}. {advice}"
        ) from error
    if shape != (dim,):
        raise ShapeError(
            f"The layers must keep the {dim} latent dimensions, but lead to shape {shape}. "
            f"{advice}"
        )
    return list(stack.flows)


def interleaved(layers: Iterable[nf.flows.Flow], dim: int) -> list[nf.flows.Flow]:
    """Put permutations between layers, except where one of the two mixes coordinates itself.

    They are random, but no coordinate is moved by a coupling again before all others were moved
    once, whichever coordinates the couplings leave alone.

    Args:
        layers: Layers of vectors (B, D).
        dim: D.

    Returns:
        The layers with permutations between them.

    Examples:
        >>> spline = nf.flows.AutoregressiveRationalQuadraticSpline(3, 1, 8)
        >>> [type(layer).__name__ for layer in interleaved([spline, spline], 3)][1]
        'Permute'
    """
    result: list[nf.flows.Flow] = []
    waiting = torch.ones(dim, dtype=torch.bool)
    # Whether a layer stands before that was not followed by a mixing of the coordinates.
    follows = False
    for layer in layers:
        if dim > 1 and not isinstance(layer, _ELEMENTWISE):
            mixes = isinstance(layer, _MIXING)
            moved = torch.ones_like(waiting) if mixes else _moved_by(layer, dim)
            if follows and not mixes:
                order = _order(waiting, moved)
                result.append(_permutation(order))
                waiting = waiting[order]
            follows = not mixes
            waiting = waiting & ~moved
            if not waiting.any():
                waiting = torch.ones_like(waiting)
        result.append(layer)
    return result


def _moved_by(layer: nf.flows.Flow, dim: int) -> Tensor:
    """Which positions (D,) a layer changes, whatever it does at its initial parameters."""
    z, x = _trial(LayerStack(layer), dim)
    if x.shape != z.shape:
        return torch.ones(dim, dtype=torch.bool)
    return (x != z).any(dim=0).cpu()


@torch.no_grad()
def _trial(stack: LayerStack, dim: int) -> tuple[Tensor, Tensor]:
    """Latents (8, D) and where a copy of layers with other parameters sends them."""
    stack = deepcopy(stack).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in stack.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(0.1 * noise.to(parameter))
    z = torch.randn(8, dim, generator=generator).to(model_dtype(stack, stack))
    z = z.to(next(stack.parameters(), z).device)
    return z, stack.push(z, None)[0]


def _order(waiting: Tensor, moved: Tensor) -> Tensor:
    """A random order (D,) that puts coordinates that wait where they will be moved."""
    dim = len(waiting)
    ranked = (waiting + torch.rand(dim)).argsort(descending=True)
    places = (moved + torch.rand(dim)).argsort(descending=True)
    order = torch.empty_like(ranked)
    order[places] = ranked
    return order


def _permutation(order: Tensor) -> nf.flows.Permute:
    layer = nf.flows.Permute(len(order), "shuffle")
    layer.perm, layer.inv_perm = order, order.argsort()
    return layer


def spline_layers(dim: int) -> list[nf.flows.Flow]:
    """Four rational-quadratic spline couplings, which start as the identity, with LU linear maps.

    Args:
        dim: Number of dimensions; with one, a single spline.

    Returns:
        Layers of vectors (B, D).

    Examples:
        >>> len(spline_layers(3))
        8
    """
    if dim == 1:
        return [AngularSpline(1, max_log_scale=0.0)]
    layers: list[nf.flows.Flow] = []
    for layer in range(4):
        # Not the host's spline: that picks values by boolean indices, which torch.jit freezes. The
        # gain bears the learning rate of 0.01 that other guides are trained with.
        spline = AngularSpline(
            dim, num_blocks=1, reverse_mask=layer % 2 == 1, max_log_scale=0.0, gain=0.1
        )
        layers += [spline, SteadyLinear(dim)]
    return layers

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
from ...flows.layer_stack import LayerStack
from ...flows.surfaces.angular_spline import AngularSpline
from ...host.context import needs_context
from ...host.first_data import awaits_first_data
from ...models.parts import model_dtype
from ..flow_transform import FlowTransform
from .joint_guide import JointGuide

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
    of the factory, so that couplings reach every coordinate, and after them a trained location and
    scale, which start at the prototype. ``NeuTraReparam`` takes it. The default layers can be
    trained with a learning rate of 0.01 and traced by the JIT; layers of normflows need 0.001 to
    0.003, and the splines of normflows cannot be traced.

    Args:
        model: A Pyro model whose latent variables are continuous.
        flow_factory: Takes :math:`D` and returns a layer or a list of layers from latent to data;
            by default four rational-quadratic splines with LU linear maps between them.
        init_loc_fn: Pyro's initialisation, for the starting location.
        init_scale: Starting scale of the guide, the same in all directions.
        permute: Whether permutations are put between layers that have none between them.

    Raises:
        OptionError: If an option is out of range, or the factory returns no layers.
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
    """The layers that a factory made, checked to map vectors (B, D) to vectors (B, D)."""
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
    """Put random permutations between layers of which neither mixes all coordinates itself."""
    result: list[nf.flows.Flow] = []
    # No coordinate is changed by a coupling again before all others were changed once, whichever
    # coordinates the couplings leave alone.
    unchanged = torch.ones(dim, dtype=torch.bool)
    needs_mixing = False
    for layer in layers:
        if dim > 1 and not isinstance(layer, _ELEMENTWISE):
            mixes = isinstance(layer, _MIXING)
            positions = torch.ones_like(unchanged) if mixes else _changed_by(layer, dim)
            if needs_mixing and not mixes:
                order = _order(unchanged, positions)
                result.append(_permutation(order))
                unchanged = unchanged[order]
            needs_mixing = not mixes
            unchanged = unchanged & ~positions
            if not unchanged.any():
                unchanged = torch.ones_like(unchanged)
        result.append(layer)
    return result


def _changed_by(layer: nf.flows.Flow, dim: int) -> Tensor:
    """Positions (D,) that a layer changes, whatever it does at its initial parameters."""
    z, x = _trial(LayerStack(layer), dim)
    if x.shape != z.shape:
        return torch.ones(dim, dtype=torch.bool)
    return (x != z).any(dim=0).cpu()


@torch.no_grad()
def _trial(stack: LayerStack, dim: int) -> tuple[Tensor, Tensor]:
    """Latents (8, D) and their images under a copy of layers with other parameters."""
    stack = deepcopy(stack).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in stack.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(0.1 * noise.to(parameter))
    z = torch.randn(8, dim, generator=generator).to(model_dtype(stack, stack))
    z = z.to(next(stack.parameters(), z).device)
    return z, stack.push(z, None)[0]


def _order(unchanged: Tensor, positions: Tensor) -> Tensor:
    """A random order (D,) that puts unchanged coordinates at positions that will be changed."""
    dim = len(unchanged)
    ranked = (unchanged + torch.rand(dim)).argsort(descending=True)
    places = (positions + torch.rand(dim)).argsort(descending=True)
    order = torch.empty_like(ranked)
    order[places] = ranked
    return order


def _permutation(order: Tensor) -> nf.flows.Permute:
    layer = nf.flows.Permute(len(order), "shuffle")
    layer.perm, layer.inv_perm = order, order.argsort()
    return layer


def spline_layers(dim: int) -> list[nf.flows.Flow]:
    """Four rational-quadratic spline couplings that start as the identity, with LU linear maps."""
    if dim == 1:
        return [AngularSpline(1, max_log_scale=0.0)]
    layers: list[nf.flows.Flow] = []
    for layer in range(4):
        # The spline of normflows picks values by boolean indices, which torch.jit freezes. The
        # gain allows the learning rate of 0.01 that other guides are trained with.
        spline = AngularSpline(
            dim, num_blocks=1, reverse_mask=layer % 2 == 1, max_log_scale=0.0, gain=0.1
        )
        layers += [spline, SteadyLinear(dim)]
    return layers

"""A guide by a stack of normflows layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, final

import normflows as nf
import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor

from ...checks import check_choice, check_flag, describe
from ...errors import InjectiveFlowError, OptionError
from ...flows.guides.factories import checked_layers, interleaved
from ...flows.guides.layers import couplings
from ...flows.guides.normal_fit import LARGEST_COVARIANCE, NormalFit
from ...flows.guides.places import DiagonalPlace, LowRankPlace, Place, TriangularPlace
from ...host.first_data import awaits_first_data
from ...modules.random_numbers import OwnRandomNumbers
from ..flow_transform import FlowTransform
from ..laws.pathwise import PathwiseFlow
from .joint_guide import JointGuide
from .log_joint import LogJoint

FlowFactory = Callable[[int], nf.flows.Flow | Iterable[nf.flows.Flow]]
_PLACES = ("auto", "triangular", "low_rank", "diagonal")
# The largest rank of a place of more latents than have a triangular one.
_RANK = 32
# How far a draw may be from itself after both directions of the layers, in units of its size.
_ROUND_TRIP = 1e-3


@final
class AutoFlow(JointGuide):
    r"""A guide over all latent variables at once by a stack of normflows layers.

    .. math:: \theta = \mathrm{loc} + \operatorname{diag}(s)\, A\,
              (f_K \circ \pi_{K-1} \circ \dots \circ \pi_1 \circ f_1)(z), \qquad z \sim N(0, I_D)

    on the unconstrained latents :math:`\theta`, with permutations :math:`\pi_k` between the layers
    of the factory, so that couplings reach every coordinate. The matrix A is unit triangular, so
    that the guide contains ``AutoMultivariateNormal``, with which it starts. ``NeuTraReparam``
    takes it.

    The entropy is differentiated along the path of the draw alone: the gradient is unbiased, and
    its variance vanishes where the guide is the posterior. That takes an inverse of the layers;
    those without one are differentiated as usual. Default layers can be trained with a learning
    rate of 0.01 to 0.03 and traced by the JIT; layers of normflows need 0.001 to 0.003, and the
    splines of normflows cannot be traced.

    Args:
        model: A Pyro model whose latent variables are continuous.
        flow_factory: Takes :math:`D` and returns a layer or a list of layers from latent to data;
            by default ``nfp.flows.couplings``, six bounded affine couplings.
        place: A: ``"triangular"``; ``"low_rank"``, :math:`I + V V^\top`, whose cost is linear in
            D; ``"diagonal"``, none; or ``"auto"``, triangular for up to 256 latents and low rank
            beyond.
        init_loc_fn: Pyro's initialisation, for the starting location.
        init_scale: Starting scale of the guide, the same in all directions; None takes those of
            the curvature of the model's density at the start, from 0.1 to 1.
        permute: Whether permutations are put between layers that have none between them.
        path_gradient: Whether the entropy is differentiated along the path alone, if the layers
            have an inverse.
        guard: Multiple of the usual gradient of a draw to which a larger one is scaled down; None
            for no limit.

    Raises:
        OptionError: If an option is out of range, or the factory returns no layers.
        ShapeError: If the layers do not keep the dimension.
        UnsupportedModelError: If a latent variable lies in a subsampled plate.
        NonFiniteError: When called, if a draw is not finite.

    References:
        Rezende and Mohamed, Variational inference with normalizing flows, arXiv 1505.05770; the
        gradient: Roeder et al., arXiv 1703.09194, derived in ``pyro/laws/pathwise.py``.

    Examples:
        >>> import pyro
        >>> def model():
        ...     pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        >>> AutoFlow(model).build().median()["x"].shape
        torch.Size([3])
        >>> def layers(dim):
        ...     halves = [dim - dim // 2, 64, 2 * (dim // 2)]
        ...     return [
        ...         nf.flows.AffineCouplingBlock(nf.nets.MLP(halves), scale_map="sigmoid")
        ...         for _ in range(4)
        ...     ]
        >>> guide = AutoFlow(model, layers).build()
    """

    recipe = ("_factory",)

    def __init__(
        self,
        model: Callable[..., Any],
        flow_factory: FlowFactory | None = None,
        *,
        place: str = "auto",
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float | None = None,
        permute: bool = True,
        path_gradient: bool = True,
        guard: float | None = 50.0,
    ) -> None:
        super().__init__(model, init_loc_fn, init_scale, guard)
        self._permutes = check_flag(permute, "permute")
        self._path_gradient = check_flag(path_gradient, "path_gradient")
        self._place = check_choice(place, _PLACES, "place")
        is_layer = isinstance(flow_factory, torch.nn.Module)
        if flow_factory is not None and (is_layer or not callable(flow_factory)):
            raise OptionError(
                "flow_factory must take the number of latent dimensions and give layers, got "
                f"{describe(flow_factory)}. Write lambda dim: [...]."
            )
        self._factory = couplings if flow_factory is None else flow_factory
        self.transform: FlowTransform | None = None

    def make_parameters(self, log_joint: LogJoint) -> None:
        """Create the layers, in the dtype and on the device of the model's latents."""
        loc = self._init_loc()
        scales = self._init_scales(loc, log_joint)
        layers = checked_layers(self._factory(self.latent_dim), self.latent_dim)
        if self._permutes:
            layers = interleaved(layers, self.latent_dim)
        # Not a parameter of the transform under a second name: the JIT refuses that.
        self.register_buffer("_origin", torch.zeros_like(loc), persistent=False)
        transform = FlowTransform([*layers, self._make_place(loc, scales)]).to(loc)
        self.transform = transform
        if any(awaits_first_data(module) for module in transform.modules()):
            with torch.no_grad():
                transform(self.get_base_dist().sample(torch.Size([64])))
        self._takes_path = self._path_gradient and self._has_inverse(transform)

    def start_at(self, fit: NormalFit) -> None:
        """Let the place take location and covariance; layers before it stay as they are."""
        transform: Any = self.transform
        transform.stack.flows[-1].move_to(fit.mean, fit.root)

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
        law = PathwiseFlow if self._takes_path else dist.TransformedDistribution
        return law(self.get_base_dist(), transform)

    def _make_place(self, loc: Tensor, scales: Tensor) -> Place:
        kind = self._place
        if kind == "auto":
            kind = "triangular" if len(loc) <= LARGEST_COVARIANCE else "low_rank"
        if kind == "low_rank":
            return LowRankPlace(loc, scales, max(1, min(_RANK, round(len(loc) ** 0.5))))
        return {"triangular": TriangularPlace, "diagonal": DiagonalPlace}[kind](loc, scales)

    def _has_inverse(self, transform: FlowTransform) -> bool:
        """Whether the layers return to latents that they were sent, with the same log-det."""
        with torch.no_grad(), OwnRandomNumbers():
            z = self.get_base_dist().sample(torch.Size([8]))
            x, log_det = transform.stack.push(z, None)
            try:
                back, log_det_back = transform.stack.pull(x, None)
            except (InjectiveFlowError, NotImplementedError):
                return False
        pairs = (back, z), (log_det_back, log_det)
        return all(torch.allclose(a, b, rtol=_ROUND_TRIP, atol=_ROUND_TRIP) for a, b in pairs)

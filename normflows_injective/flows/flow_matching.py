r"""A density that is trained by flow matching, as a layer next to the base.

Let :math:`\epsilon \sim \mathcal N(0, I)` and codes :math:`x` be independent, and :math:`t`
uniform on [0, 1]. The point :math:`x_t = (1 - t) \epsilon + t x` of the straight path has the law
:math:`p_t`, from the base at :math:`t = 0` to the codes at :math:`t = 1`. The field

.. math:: v(y, t) = \mathbb E[x - \epsilon \mid x_t = y]

moves :math:`p_t` along (continuity equation), and minimises the loss

.. math:: \mathbb E \lVert v(x_t, t) - (x - \epsilon) \rVert^2.

**Split of a joint training.** The loss is no likelihood, and its gradient with respect to the
codes does not improve one: codes that shrink to a point make it small. So the layer learns on
detached codes, and hands them to the base as they are. Encoder and decoder then see the plain
base, under which they are a free-form injective flow of their own, whose codes tend to a standard
normal. That is right as long as the base can nearly be met: the codes come close to it, and the
field, which starts from it, has little left to learn. It is not where no change of coordinates
makes the density of the manifold normal (parts that are apart, holes): there the base pulls codes
together that are better kept apart, and the weight beta of the reconstruction decides how far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from ..autodiff.jacobians import trace_of_jacobian
from ..autodiff.settings import differentiable_attention
from ..checks import check_count, check_event_shape, check_positive
from ..host.context import context_arguments, needs_context, takes_context
from ..nets.mlp import SmoothMLP, start_at_zero
from ..volume.probes import draw_probes
from .integration import ORDERS, check_method, integrate, method_in_words, time_grid
from .layer import LayerWithLoss

_MAX_STEPS = 1024


@final
class FlowMatching(LayerWithLoss):
    r"""The flow of a velocity that is learned by flow matching, from a standard normal base.

    .. math:: \dot y = v(y, t), \quad y_0 = z, \; y_1 = x, \qquad
              \log\det = \int_0^1 \operatorname{tr} \partial_y v(y_t, t)\, dt

    It stands first in ``flows``, next to a base ``DiagGaussian(dim, trainable=False)``. In
    ``forward_kld`` of an :class:`~normflows_injective.InjectiveNormalizingFlow` it is trained by

    .. math:: \lVert v\big((1 - t) \epsilon + t x, t\big) - (x - \epsilon) \rVert^2

    on codes :math:`x` that are detached, while injection and later layers are trained against the
    base. Everywhere else both directions solve the differential equation, with ``steps`` equal
    steps. They undo each other up to the error of the steps, :math:`O(h^4)` for ``"rk4"``, which
    :meth:`density_error` measures. Containers of normflows train it by its likelihood, through the
    solver: there take :meth:`matching_loss` as the loss.

    Args:
        dim: Number of coordinates :math:`d`.
        net: Network of rows (B, d + 1), coordinates and then the time, and of a context if it
            takes one, to velocities (B, d). By default a
            :class:`~normflows_injective.nets.SmoothMLP` whose last layer starts at zero, so that
            the layer starts as the identity.
        hidden: Widths of the default network.
        context_dim: Number of context features of the default network; 0 for none.
        steps: Number of steps. It may be set later.
        solver: ``"rk4"``, ``"midpoint"`` or ``"euler"``.
        divergence: ``"exact"``, by :math:`d` products for every evaluation of the velocity, or
            ``"hutchinson"``, by random probes, whose noise is that of the estimate.
        num_probes: Number of Rademacher probes for ``"hutchinson"``.

    Raises:
        OptionError: If an option is unknown or out of range.

    References:
        Lipman et al., Flow matching for generative modeling, arXiv 2210.02747; Liu et al.,
        Flow straight and fast, arXiv 2209.03003. Field and split are derived in
        ``flows/flow_matching.py``.

    Examples:
        >>> layer = FlowMatching(2, hidden=(8,))
        >>> x, log_det = layer(torch.zeros(3, 2))
        >>> x.shape, log_det.shape
        (torch.Size([3, 2]), torch.Size([3]))
        >>> layer.matching_loss(x).shape
        torch.Size([3])
    """

    # Other steps follow the same flow.
    may_differ = frozenset({"divergence", "num_probes", "solver", "steps"})

    def __init__(
        self,
        dim: int,
        net: nn.Module | None = None,
        *,
        hidden: Sequence[int] = (256, 256, 256),
        context_dim: int = 0,
        steps: int = 8,
        solver: str = "rk4",
        divergence: str = "exact",
        num_probes: int = 2,
    ) -> None:
        super().__init__()
        check_method(solver, divergence)
        self.dim, self.shape = dim, (dim,)
        self.net: Any = _network_at_rest(dim, hidden, context_dim) if net is None else net
        self.takes_context, self.needs_context = takes_context(self.net), needs_context(self.net)
        self.hidden, self.context_dim = tuple(hidden), context_dim
        self.steps, self.solver = steps, solver
        self.divergence, self.num_probes = divergence, num_probes

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents (B, d) to data (B, d), with the log-det (B,) in nats."""
        return self._carry(z, context, time_grid(self.steps, 1.0))

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (B, d) to latents (B, d), with the log-det (B,) in nats."""
        return self._carry(x, context, time_grid(self.steps, 1.0)[::-1])

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Latents (B, d) to data (B, d), without the log-det, which costs most."""
        return self._move(z, context, time_grid(self.steps, 1.0))

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Data (B, d) to latents (B, d), without the log-det."""
        return self._move(x, context, time_grid(self.steps, 1.0)[::-1])

    def training_inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The data (B, d) themselves, with minus the loss (B,) of their detached copy."""
        return x, -self.matching_loss(x.detach(), context)

    def matching_loss(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Loss (B,) of data (B, d), each at a random time and of random noise.

        Args:
            x: Data of shape :math:`(B, d)`.
            context: One row per sample.

        Returns:
            Losses of shape :math:`(B,)`, whose mean is to be minimised.

        Raises:
            ShapeError: If x has another shape.
            ContextError: If a context is missing, superfluous or of another length.
        """
        check_event_shape(x, self.shape, "x")
        noise = torch.randn_like(x)
        t = torch.rand(x.shape[0], 1, dtype=x.dtype, device=x.device)
        velocity = self._velocity((1 - t) * noise + t * x, t, context)
        return (velocity - (x - noise)).square().sum(1)

    def _velocity(self, y: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Velocities (B, d) at points (B, d) and times (B, 1)."""
        value: Tensor = self.net(torch.cat([y, t], 1), **context_arguments(self.net, context))
        check_event_shape(value, self.shape, "the velocity that net returns")
        return value

    @torch.no_grad()
    def density_error(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Error of the log-density of data that the steps make, in nats.

        .. math:: \lvert \ell_n(x) - \ell_{2n}(x) \rvert, \qquad
                  \ell_n(x) = -\tfrac12 \lVert z_n \rVert^2 + \log\det{}_n

        with :math:`n` steps and twice as many. The error of :math:`n` steps is :math:`2^p / (2^p -
        1)` times as large for a solver of order :math:`p`, once the steps are small.

        Args:
            x: Data of shape :math:`(B, d)`.
            context: One row per sample.

        Returns:
            Errors of shape :math:`(B,)`; without an exact divergence, the noise of the probes too.

        References:
            Richardson extrapolation; Hairer, Nørsett, Wanner, Solving ordinary differential
            equations I, section II.4.
        """
        check_event_shape(x, self.shape, "x")
        return self._density_error(x, context, check_count(self.steps, "steps"))

    @torch.no_grad()
    def steps_for(self, x: Tensor, tolerance: float = 0.01, context: Tensor | None = None) -> int:
        """The least power of two of steps whose :meth:`density_error` stays below a tolerance.

        Args:
            x: Data of shape :math:`(B, d)`; the worst of them decides.
            tolerance: Largest error of a log-density, in nats.
            context: One row per sample.

        Returns:
            A number of steps, at most 1024, to which ``steps`` may be set.

        Raises:
            OptionError: If the tolerance is not positive.
        """
        check_event_shape(x, self.shape, "x")
        check_positive(tolerance, "tolerance")
        steps = 1
        while steps < _MAX_STEPS:
            if float(self._density_error(x, context, steps).max()) <= tolerance:
                break
            steps *= 2
        return steps

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        method = self.steps, self.solver, self.divergence, self.num_probes
        return f"dim={self.dim}, {method_in_words(*method)}"

    def _density_error(self, x: Tensor, context: Tensor | None, steps: int) -> Tensor:
        densities = []
        for count in (steps, 2 * steps):
            z, log_det = self._carry(x, context, time_grid(count, 1.0)[::-1])
            densities.append(log_det - 0.5 * z.square().sum(1))
        factor = 2 ** ORDERS[self.solver]
        return (densities[0] - densities[1]).abs() * factor / (factor - 1)

    def _move(self, y: Tensor, context: Tensor | None, times: Sequence[float]) -> Tensor:
        check_event_shape(y, self.shape, "z")

        def rate(point: Tensor, t: float) -> Tensor:
            return self._velocity(point, point.new_full((len(point), 1), t), context)

        return integrate(rate, y, times, self.solver)

    def _carry(
        self, y: Tensor, context: Tensor | None, times: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """A batch (B, d) through times, with the integral (B,) of the divergence."""
        dim = self.dim

        def rate(state: Tensor, t: float) -> Tensor:
            point = state[:, :dim]
            probes = None
            if self.divergence == "hutchinson" and self.num_probes < dim:
                probes = draw_probes("rademacher", self.num_probes, point)
            velocity, trace = trace_of_jacobian(
                lambda p: self._velocity(p, p.new_full((len(p), 1), t), context), point, probes
            )
            return torch.cat([velocity, trace.mean(1, keepdim=True)], 1)

        state = torch.cat([y, torch.zeros_like(y[:, :1])], 1)
        with differentiable_attention():
            state = integrate(rate, state, times, self.solver)
        return state[:, :dim], state[:, dim]


def _network_at_rest(dim: int, hidden: Sequence[int], context_dim: int) -> SmoothMLP:
    net = SmoothMLP(dim + 1, dim, hidden, context_dim)
    start_at_zero(net.layers[-1])
    return net

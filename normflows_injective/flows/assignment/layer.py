"""An assignment flow as a layer of normflows, on orthonormal coordinates of the logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ...autodiff.jacobians import trace_of_jacobian
from ...autodiff.settings import differentiable_attention
from ...checks import check_event_shape, check_same_rows
from ...errors import OptionError, ShapeError
from ...host.refusals import refuse_unsupported
from ...volume.probes import draw_probes
from ..integration import Times, as_times, check_method, integrate, method_in_words
from ..layer import Layer
from .field import AssignmentField


@final
class AssignmentLayer(Layer):
    r"""The flow of a field of logits, :math:`m_0 \mapsto m_T` in :math:`\mathbb R^d`.

    .. math:: \dot m = Q^\top F(Q m, t), \qquad
              \texttt{log\_det} = \int_0^T \operatorname{div}(Q^\top F)(m_t, t)\, dt

    with :math:`d = \sum_i (c_i - 1)` coordinates, :math:`m = Q^\top V`. Its base is
    ``nf.distributions.DiagGaussian(d, trainable=False)``. Both directions take the same steps. Up
    to the error of the steps, :math:`O(h^4)` for ``"rk4"``, they undo each other, and the log-det
    belongs to the map.

    Args:
        field: The field of logits.
        steps: Number of equal steps, or their times from zero to the end of the horizon. The
            default follows the horizon:
            :meth:`~normflows_injective.flows.assignment.AssignmentPath.times`.
        solver: ``"euler"``, ``"midpoint"`` or ``"rk4"``.
        divergence: ``"exact"``, by :math:`d` forward-mode products for every evaluation, or by
            none where the network leaves each variable out; ``"hutchinson"``, by random probes,
            which are unbiased and new for every evaluation, so their noise averages out along the
            path.
        num_probes: Number of Rademacher probes for ``"hutchinson"``. With :math:`d` or more the
            exact divergence is taken, which then costs no more.

    Raises:
        OptionError: If an option is unknown or out of range.

    References:
        Neural ordinary differential equations, arXiv 1806.07366; Hutchinson's estimator along a
        path, arXiv 1810.01367. Coordinates: arXiv 2406.04527.

    Examples:
        >>> from normflows_injective.nets.fields import DenseField
        >>> from normflows_injective import AssignmentFlow
        >>> flow = AssignmentFlow(DenseField(2, 3, hidden=(8,)), 2, 3)
        >>> layer = flow.layer(steps=10)
        >>> m, log_det = layer(torch.zeros(5, 4))
        >>> m.shape, log_det.shape
        (torch.Size([5, 4]), torch.Size([5]))
    """

    # Other steps follow the same flow.
    may_differ = frozenset({"divergence", "num_probes", "solver", "steps", "times"})

    def __init__(
        self,
        field: AssignmentField,
        steps: Times | None = None,
        solver: str = "rk4",
        divergence: str = "exact",
        num_probes: int = 2,
    ) -> None:
        super().__init__()
        check_method(solver, divergence)
        self.field, self.steps, self.solver = field, steps, solver
        self.divergence, self.num_probes = divergence, num_probes
        self.times = field.path.times(steps)
        self.latent_shape = self.data_shape = (field.path.simplices.dim,)

    @property
    def takes_context(self) -> bool:
        """Whether the network can use a context."""
        return self.field.takes_context

    @property
    def needs_context(self) -> bool:
        """Whether the network cannot be called without a context."""
        return self.field.needs_context

    @property
    def estimates(self) -> bool:
        """Whether the divergence is estimated by probes."""
        few = self.divergence == "hutchinson" and self.num_probes < self.latent_shape[0]
        return few and not self.field.knows_divergence

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise (B, d) to coordinates (B, d) at the end, with the log-det (B,) in nats."""
        m, integrals = self.transport(z, self.times, context)
        return m, integrals.mean(1)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coordinates (B, d) at the end to noise (B, d), with the log-det (B,) in nats."""
        m, integrals = self.transport(x, self.times[::-1], context)
        return m, integrals.mean(1)

    def transport(
        self,
        m: Tensor,
        times: Sequence[float],
        context: Tensor | None = None,
        mask: Tensor | None = None,
        probes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Carry coordinates (B, d) through times, with the integrals of the divergence.

        Variables that a mask (B, n) declares missing stay where they are. Integrals (B, K) have
        one column of independent noise for every probe, and a single column where they are exact.
        Probes (K, B, d) serve for the whole path; without them every evaluation draws new ones.

        Raises:
            ShapeError: If the coordinates, mask or probes have another shape.
            OptionError: If times are empty or not finite.
            UnsupportedLayerError: If a network that must be differentiated is in a state in which
                it has no Jacobian of each sample, such as dropout in training mode.
        """
        times = self._checked_times(m, times, mask, probes)
        if not self.field.knows_divergence:
            refuse_unsupported(self.field.net.modules())

        # The noise of a finite horizon shrinks as 1 - t, whatever the field has learned. Its part
        # of the divergence, -d / (1 - t), is steep near the end and has a known integral, so the
        # steps are left with the part that decays.
        contraction, dim = self.field.path.horizon.contraction, m.shape[1]
        num_moving = self._num_moving(m, mask)

        def rate(y: Tensor, time: float) -> Tensor:
            velocity, divergence = self._rates(y[:, :dim], time, context, mask, probes)
            steep = num_moving * contraction / (1 - contraction * time)
            return torch.cat([velocity, divergence + steep], 1)

        num_integrals = self.num_probes if self.estimates else 1
        state = torch.cat([m, m.new_zeros(m.shape[0], num_integrals)], 1)
        with differentiable_attention():
            state = integrate(rate, state, times, self.solver)
        first, last = (1 - contraction * t for t in (times[0], times[-1]))
        return state[:, :dim], state[:, dim:] + num_moving * math.log(last / first)

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        steps = len(self.times) - 1
        return method_in_words(steps, self.solver, self.divergence, self.num_probes)

    def _num_moving(self, m: Tensor, mask: Tensor | None) -> Tensor:
        """Numbers (B, 1) of the coordinates that are not missing, as floats."""
        if mask is None:
            return torch.full_like(m[:, :1], m.shape[1])
        return self.field.path.simplices.coordinate_mask(mask).to(m).sum(1, keepdim=True)

    def _rates(
        self,
        m: Tensor,
        time: float,
        context: Tensor | None,
        mask: Tensor | None,
        probes: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Velocities (B, d) of coordinates (B, d) and divergences (B, K) at a time."""
        simplices = self.field.path.simplices
        t = torch.full((m.shape[0],), time, dtype=m.dtype, device=m.device)
        if self.field.knows_divergence:
            v = simplices.from_coordinates(m)
            velocity, divergence = self.field.field_and_divergence(v, t, context, mask)
            return simplices.to_coordinates(velocity), divergence.unsqueeze(1)

        def velocity_of(coordinates: Tensor) -> Tensor:
            v = simplices.from_coordinates(coordinates)
            return simplices.to_coordinates(self.field(v, t, context, mask))

        if probes is None and self.estimates:
            return trace_of_jacobian(velocity_of, m, draw_probes("rademacher", self.num_probes, m))
        return trace_of_jacobian(velocity_of, m, probes)

    def _checked_times(
        self, m: Tensor, times: Sequence[float], mask: Tensor | None, probes: Tensor | None
    ) -> list[float]:
        check_event_shape(m, self.latent_shape, "coordinates")
        plain = as_times(times, "times")
        if not plain:
            raise OptionError(
                "times must hold the first time at least, got []. Give two for a step."
            )
        if mask is not None:
            check_event_shape(mask, (self.field.path.simplices.num_variables,), "mask")
            check_same_rows(m=m, mask=mask)
        if probes is not None and probes.shape[1:] != m.shape:
            raise ShapeError(
                f"probes must have shape (K, {m.shape[0]}, {m.shape[1]}), some for every "
                f"coordinate, got {tuple(probes.shape)}."
            )
        return plain

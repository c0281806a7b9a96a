r"""How an angle drawn from a tilted law moves with its concentration: its implicit derivative.

A law about a direction draws the angle :math:`\theta \in (0, \pi)` from it with density
proportional to

.. math:: q(\theta) = e^{\kappa T(\theta)} \sin^{n-1}\theta, \quad n = D - 1,

with a statistic T that falls with the angle: :math:`\cos\theta` for von Mises-Fisher laws,
:math:`\log(1 + \cos\theta)` for power spherical ones. Whatever the sampler, an angle that keeps
its probability :math:`F(\theta; \kappa)` obeys :math:`F_\kappa + F_\theta\, \theta' = 0`, so that

.. math:: \theta'(\kappa) = -\frac{1}{q(\theta)} \int_0^\theta (T(\phi) - E T)\, q(\phi)\, d\phi
              = \frac{1}{q(\theta)} \int_\theta^\pi (T(\phi) - E T)\, q(\phi)\, d\phi .

To differentiate the accepted proposals of a rejection sampler instead is wrong: whether a proposal
is accepted depends on the concentration too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

NODES = 96
# The logarithm of what is left out beside what is kept, 2e-22.
LEFT_OUT = 50.0


class Tilt(NamedTuple):
    """The law of an angle: T of angles, E T of concentrations, a rate, and n = D - 1.

    T falls by at least the rate times any rise of 1 - cos.
    """

    statistic: Callable[[Tensor], Tensor]
    mean: Callable[[Tensor], Tensor]
    rate: float
    n: int


def moving_angle(drop: Tensor, concentration: Tensor, tilt: Tilt) -> Tensor:
    """Angles, from their drops 1 - cos, with the derivative in their concentrations.

    Differentiable any number of times. Concentrations broadcast with the drops, and must not be
    negative.
    """
    # The ends, where the sine is zero, have no probability; rounding may lead there.
    eps = torch.finfo(drop.dtype).eps
    inside = drop.detach().clamp(torch.finfo(drop.dtype).tiny, 2 - 2 * eps)
    angle: Tensor = _Implicit.apply(  # type: ignore[no-untyped-call]
        concentration, 2 * (inside / 2).sqrt().asin(), tilt
    )
    return angle


class _Implicit(torch.autograd.Function):
    """The identity of angles, with the implicit derivative in their concentrations."""

    @staticmethod
    def forward(concentration: Tensor, angle: Tensor, tilt: Tilt) -> Tensor:
        return angle.clone()

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        known: Any = ctx
        concentration, _, known.tilt = inputs
        # The output, not the input: further derivatives also follow the angle.
        known.save_for_backward(concentration, output)
        known.save_for_forward(concentration, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        concentration, angle = ctx.saved_tensors
        moved = grads[0] * angle_slope(angle, concentration, ctx.tilt)
        return moved.sum_to_size(concentration.shape), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        concentration, angle = ctx.saved_tensors
        return tangents[0] * angle_slope(angle, concentration, ctx.tilt)


def angle_slope(angle: Tensor, concentration: Tensor, tilt: Tilt) -> Tensor:
    r"""The derivative of angles (*) in concentrations that broadcast with them, by quadrature.

    The relative error is below 1e-9 for :math:`\kappa \le 10^5` and :math:`D \le 1000`.
    """
    # T - E T changes its sign once. The integral is taken over the side where it does not, between
    # the angle and an end E, so that nothing cancels: in both cases
    # theta' = - int_E^theta (T - E T) q(phi) / q(theta) dphi.
    # With phi = E + (theta - E) u^4 a power of the distance of E, that of sin^(n-1) or of 1 + cos,
    # becomes smooth enough for the rule of Gauss and Legendre.
    power = 4
    mean = tilt.mean(concentration)[..., None]
    kappa, theta = concentration[..., None], angle[..., None]
    own = tilt.statistic(theta)
    with torch.no_grad():
        is_upper = own >= mean
        end = torch.where(is_upper, _near_end(theta, tilt), _far_end(theta, kappa, tilt))
    u, weights = _rule(angle.dtype, angle.device)
    length = theta - end
    phi = end + length * u**power
    statistic = tilt.statistic(phi)
    log_ratio = kappa * (statistic - own)
    if tilt.n > 1:
        log_ratio = log_ratio + (tilt.n - 1) * (phi.sin() / theta.sin()).log()
    integrand = (statistic - mean) * log_ratio.exp()
    return -(length * integrand * (power * u ** (power - 1) * weights)).sum(-1)


def _near_end(theta: Tensor, tilt: Tilt) -> Tensor:
    """The angle below which nothing is left of the law, seen from an angle above it."""
    # In s = artanh cos(theta), that is tan(theta / 2) = exp(-s), the density is e^(kappa T) /
    # cosh(s)^n. Beyond the peak it falls within a distance delta by cosh(delta)^n at least
    # (see log_normaliser), which is more than exp(n delta - n log 2) and than what this allows.
    return 2 * ((theta / 2).tan() * math.exp(-_reach(tilt))).atan()


def _far_end(theta: Tensor, kappa: Tensor, tilt: Tilt) -> Tensor:
    """The angle above which nothing is left of the law, seen from an angle below it."""
    # By the same bound, and by one that sees large concentrations. Let w = 1 - cos(theta), r the
    # rate, k = (n - 1) / 2. At w + delta the density in the angle is lower by
    # r delta - k log(1 + delta / w) at least. With rho = max(2 k / (r w), 1) the logarithm is
    # below its tangent at w + delta = rho w, whose slope is r / 2 at most, so that the fall is
    # at least r delta / 2 - k (log rho - 1 + 1 / rho).
    k = (tilt.n - 1) / 2
    drop = drop_of(theta)
    rate = (tilt.rate * kappa).clamp(min=1e-6)
    rho = (2 * k / (rate * drop)).clamp(min=1)
    delta = (2 / rate) * (LEFT_OUT + k * (rho.log() - 1 + 1 / rho))
    by_rate = 2 * ((drop + delta).clamp(max=2) / 2).sqrt().asin()
    return torch.minimum(by_rate, 2 * ((theta / 2).tan() * math.exp(_reach(tilt))).atan())


def _reach(tilt: Tilt) -> float:
    return LEFT_OUT / tilt.n + math.sqrt(2 * LEFT_OUT / tilt.n)


def drop_of(angle: Tensor) -> Tensor:
    """1 - cos, with its digits."""
    return 2 * (angle / 2).sin().square()


def _rule(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the rule of Gauss and Legendre on the unit interval."""
    nodes, weights = _gauss_legendre()
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    return torch.tensor(nodes, **like), torch.tensor(weights, **like)


@functools.cache
def _gauss_legendre() -> tuple[list[float], list[float]]:
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()

"""The gauge of p-norms, for every positive p and for the cube."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from ...checks import check_not_negative
from ...errors import OptionError
from .gauge import HomogeneousGauge, RadiusAndSecant, unit_rows, with_random_signs


@final
class LpGauge(HomogeneousGauge):
    r"""The :math:`\ell_p` spheres :math:`\lVert x \rVert_p = t`, for every :math:`p > 0`.

    .. math:: \log r = \log t - \tfrac1p \operatorname{logsumexp}_k (p \log|u_k|), \qquad
              \log\sec\psi = \tfrac12 \operatorname{logsumexp}_k ((2p - 2) \log|u_k|)
              - \operatorname{logsumexp}_k (p \log|u_k|)

    **Choosing p.** At :math:`u_k \to 0` the gradient of the surface measure's log-volume grows as
    :math:`1/|u_k|` for :math:`p < 1` and as :math:`|u_k|^{2p-3}` for :math:`1 < p < 1.5`.
    Gradients of a reverse divergence then have

    ======================  ====================================================
    :math:`p < 1`           no finite mean: averages of stochastic gradients do not settle
    :math:`p = 1`           a bounded gradient whose sign jumps at the kink
    :math:`1 < p \le 1.25`  a finite mean, no finite variance
    :math:`1.25 < p < 1.5`  finite variance, unbounded
    :math:`p \ge 1.5`       bounded gradients
    ======================  ====================================================

    For :math:`p < 1` clip gradients, smooth, or take ``measure="cone"``, whose log-volume
    :math:`D \log r` always has a finite mean, and a finite variance for :math:`p > 1/2`; the two
    measures give different posteriors there. The area is finite for every :math:`p`. Smoothing by
    :math:`\epsilon` keeps the function homogeneous,

    .. math:: F_\epsilon(x) = \Big(\sum_k (x_k^2 + \epsilon^2 \lVert x \rVert^2)^{p/2}\Big)^{1/p}

    No density on such a surface has exact zeros with positive probability.

    Args:
        p: :math:`p > 0`; ``math.inf`` gives the cube.
        eps: :math:`\epsilon \ge 0`.

    Raises:
        OptionError: If an option is out of range.

    References:
        arXiv 2406.09116; tail indices and the smoothing are derived from the formulas above.

    Examples:
        >>> u = torch.tensor([[0.6, 0.8]])
        >>> LpGauge(1.0).log_radius(u, torch.tensor(1.0)).exp()
        tensor([0.7143])
    """

    def __init__(self, p: float, eps: float = 0.0) -> None:
        super().__init__()
        if not p > 0:
            raise OptionError(f"p must be positive, got {p!r}.")
        self.p = float(p)
        self.eps = float(check_not_negative(eps, "eps"))
        self._norm = _Cube(self.eps) if self.p == math.inf else _PowerSum(self.p, self.eps)

    def value(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The p-norm (B,) of points (B, D)."""
        return self.log_value(x).exp()

    def log_value(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log of the p-norm, which does not overflow for small p."""
        return self._norm.log_value(_log_sizes(x, self.eps))

    def radius_and_secant(
        self, u: Tensor, level: Tensor, context: Tensor | None = None
    ) -> RadiusAndSecant:
        r"""Log-radius and log-secant in closed form, without a gradient."""
        log_sizes = _log_sizes(u, self.eps)
        log_value = self._norm.log_value(log_sizes)
        log_secant = self._norm.log_secant(u, log_sizes, log_value)
        return RadiusAndSecant(torch.as_tensor(level).log() - log_value, log_secant)

    def unit_cone_mass(self, dim: int) -> Tensor | None:
        r""":math:`\log D + D \log(2\Gamma(1 + 1/p)) - \log\Gamma(1 + D/p)`, without smoothing."""
        if self.eps > 0:
            return None
        inverse = 1 / self.p
        log_volume = dim * (math.log(2) + math.lgamma(1 + inverse)) - math.lgamma(
            1 + dim * inverse
        )
        return torch.tensor(math.log(dim) + log_volume, dtype=torch.float64)

    def log_slope_bounds(self, dim: int) -> tuple[float, float] | None:
        """Bounds from the dual norm, |grad F|_q = 1 with 1/p + 1/q = 1, for p >= 1."""
        return None if self.eps > 0 else self._norm.log_slope_bounds(dim)

    def log_area(self, dim: int, level: Tensor) -> Tensor | None:
        r"""Log-area in closed form for p of 1, 2 and infinity."""
        if self.p == 1 and self.eps == 0:
            mass = self.log_cone_mass(dim, level)
            # |grad F| is sqrt(D) wherever no coordinate is zero.
            return None if mass is None else mass + 0.5 * math.log(dim) - level.log()
        return super().log_area(dim, level)

    def sample_cone(self, num_samples: int, dim: int, like: Tensor) -> Tensor | None:
        r"""Directions of variables of density :math:`\propto e^{-\lVert x \rVert_p^p}`."""
        if self.eps > 0:
            return None
        uniform = torch.rand(num_samples, dim, dtype=like.dtype, device=like.device)
        log_sizes = self._norm.sample_log_sizes(uniform)
        sizes = (log_sizes - log_sizes.amax(1, keepdim=True)).exp()
        return unit_rows(with_random_signs(sizes))

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"{self.p:g}" + (f", eps={self.eps:g}" if self.eps else "")


class _PowerSum:
    """The p-norm of finite p, as the sum of the powers of sizes."""

    def __init__(self, p: float, eps: float) -> None:
        self.p, self.eps = p, eps

    def log_value(self, log_sizes: Tensor) -> Tensor:
        return (self.p * log_sizes).logsumexp(1) / self.p

    def log_secant(self, u: Tensor, log_sizes: Tensor, log_value: Tensor) -> Tensor:
        # grad F / F of the smoothed norm is u_k (v_k^(p/2-1) + eps^2 sum_j v_j^(p/2-1)) / F^p with
        # v = u^2 + eps^2; without smoothing it is |u_k|^(p-1) / F^p.
        if self.eps == 0:
            log_slopes = (self.p - 1) * log_sizes
        else:
            weights = (self.p - 2) * log_sizes
            common = weights.logsumexp(1, keepdim=True) + 2 * math.log(self.eps)
            log_slopes = _log_abs(u) + torch.logaddexp(weights, common)
        return 0.5 * (2 * log_slopes).logsumexp(1) - self.p * log_value

    def log_slope_bounds(self, dim: int) -> tuple[float, float] | None:
        if self.p < 1:
            return None
        # |g|_2 lies between 1 and D^(1/2 - 1/q), and 1/2 - 1/q = 1/p - 1/2.
        other = (1 / self.p - 0.5) * math.log(dim)
        return min(0.0, other), max(0.0, other)

    def sample_log_sizes(self, uniform: Tensor) -> Tensor:
        # |x|^p is Gamma(1/p), and Gamma(a) is Gamma(a + 1) U^(1/a), which does not underflow.
        shape = torch.full_like(uniform, 1 / self.p + 1)
        return torch.distributions.Gamma(shape, 1.0).sample().log() / self.p + uniform.log()


class _Cube:
    """The norm of infinite p, the largest size."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def log_value(self, log_sizes: Tensor) -> Tensor:
        return log_sizes.amax(1)

    def log_secant(self, u: Tensor, log_sizes: Tensor, log_value: Tensor) -> Tensor:
        if self.eps == 0:
            return -log_value
        # F^2 = u_k^2 + eps^2 |u|^2 at the largest coordinate, so F grad F = u_k e_k + eps^2 u.
        square, eps2 = (2 * log_value).exp(), self.eps**2
        return 0.5 * ((1 + 2 * eps2) * square - eps2 * (1 + eps2)).log() - 2 * log_value

    def log_slope_bounds(self, dim: int) -> tuple[float, float]:
        return 0.0, 0.0

    def sample_log_sizes(self, uniform: Tensor) -> Tensor:
        face = torch.randint(uniform.shape[1], (len(uniform), 1), device=uniform.device)
        return uniform.scatter(1, face, 1.0).log()


def _log_sizes(x: Tensor, eps: float) -> Tensor:
    if eps == 0:
        return _log_abs(x)
    squares = x.square()
    return 0.5 * (squares + eps**2 * squares.sum(1, keepdim=True)).log()


def _log_abs(x: Tensor) -> Tensor:
    # Clamped where even the second derivative of the logarithm, 1/x^2, is still finite.
    return x.abs().clamp_min(math.sqrt(torch.finfo(x.dtype).tiny)).log()

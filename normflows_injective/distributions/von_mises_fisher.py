r"""The von Mises-Fisher distribution on the unit sphere, in any dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from ..checks import as_floating, check_finite
from ..errors import OptionError, ShapeError
from ..modules.precision import factored_dtype
from .spherical import SphericalLaw, check_sphere_dim, log_sphere_area

NODES = 129


@final
class VonMisesFisher(SphericalLaw):
    r"""The von Mises-Fisher distribution, the isotropic bump on the unit sphere.

    .. math:: \log p(x) = \kappa\, \mu^\top x - \log N_D(\kappa)

    normalised exactly in any dimension. Densities are computed in float64 and rounded to the dtype
    of ``loc``. Samples carry no gradient, because rejection has none. ``forward`` returns them
    with log-densities that carry one, as a score-function estimator needs.

    A trainable concentration is the parameter itself. If a step takes it below zero, the law has
    direction :math:`-\mu` and concentration :math:`|\kappa|`.

    Args:
        loc: Mean direction :math:`\mu` of shape (D,), :math:`D \ge 2`, of any positive length.
        concentration: :math:`\kappa \ge 0`; 0 is the uniform distribution.
        trainable: Whether both are parameters.
        off_manifold: Treatment by ``log_prob`` of points off the sphere: ``"reject"`` raises where
            a norm is more than 1e-4 from one, ``"project"`` takes their directions.

    Raises:
        ShapeError: If the mean direction is no vector or the concentration no number.
        OptionError: If the mean direction is zero or of one dimension, the concentration negative,
            or the policy unknown.
        NonFiniteError: If one of them holds NaN or infinity.

    References:
        Mardia and Jupp, *Directional Statistics*, Wiley 2000, chapter 9. Wood, *Simulation of
        the von Mises Fisher distribution*, Communications in Statistics 23 (1994).

    Examples:
        >>> base = VonMisesFisher([0.0, 0.0, 2.0], concentration=5.0)
        >>> base.log_prob(torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])).exp()
        tensor([7.9581e-01, 3.6130e-05])
    """

    def __init__(
        self,
        loc: Tensor | Sequence[float],
        concentration: float | Tensor,
        trainable: bool = False,
        *,
        off_manifold: str = "reject",
    ) -> None:
        mean = as_floating(loc, "loc")
        if mean.dim() != 1:
            raise ShapeError(f"loc must be a vector of shape (D,), got {tuple(mean.shape)}.")
        super().__init__(len(mean), off_manifold)
        lifted = mean.to(factored_dtype(mean.device))  # its square may leave the range of float32
        length = torch.linalg.vector_norm(lifted)
        if not length > 0:
            raise OptionError("loc must have a positive length, got zeros. Give a direction.")
        kappa = as_floating(concentration, "concentration", mean)
        if kappa.dim() != 0:
            raise ShapeError(f"concentration must be one number, got shape {tuple(kappa.shape)}.")
        if kappa < 0:
            raise OptionError(
                f"concentration must not be negative, got {float(kappa):g}. "
                "Turn loc round instead."
            )
        kind = nn.Parameter if trainable else nn.Buffer
        self.loc = kind((lifted / length).to(mean.dtype))
        self.concentration = kind(kappa.detach().clone())

    def forward(self, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        """Draw samples (num_samples, D) without a gradient, with log-densities (num_samples,).

        Args:
            num_samples: Number of samples.

        Returns:
            Samples, and their log-densities in nats, whose gradient reaches the parameters.

        Raises:
            NonFiniteError: If a parameter has become NaN or infinite.
        """
        for name in ("loc", "concentration"):
            check_finite(getattr(self, name), name, "Load an earlier state; lower the step size.")
        with torch.no_grad():
            mean, kappa = self._lifted()
            drop = _sample_drop(kappa.abs(), len(mean), num_samples).clamp(max=2)
            tangent = nn.functional.normalize(
                torch.randn(num_samples, len(mean) - 1, dtype=mean.dtype, device=mean.device)
            )
            height = (drop * (2 - drop)).sqrt()
            at_pole = torch.cat([(1 - drop)[:, None], height[:, None] * tangent], dim=1)
            x = _turn_pole(at_pole, torch.where(kappa < 0, -mean, mean))
        return x.to(self.loc.dtype), self._log_density(x)

    @property
    def trainable(self) -> bool:
        """Whether direction and concentration are parameters."""
        return isinstance(self.loc, nn.Parameter)

    def _log_density(self, u: Tensor) -> Tensor:
        mean, kappa = self._lifted()
        return (kappa * (u @ mean) - log_normaliser(kappa, len(mean))).to(self.loc.dtype)

    def _lifted(self) -> tuple[Tensor, Tensor]:
        dtype = factored_dtype(self.loc.device)
        mean = self.loc.to(dtype)
        return mean / torch.linalg.vector_norm(mean), self.concentration.to(dtype)


def log_normaliser(concentration: Tensor, dim: int) -> Tensor:
    r"""Log of the integral that normalises von Mises-Fisher densities, in float64 where possible.

    .. math::

        N_D(\kappa) = \int_{S^{D-1}} e^{\kappa \mu^\top u}\, du
            = A_{D-2} \int_{-1}^1 e^{\kappa t} (1 - t^2)^{(D-3)/2}\, dt
            = (2\pi)^{D/2}\, \kappa^{1 - D/2} I_{D/2-1}(\kappa)
    """
    # A_{D-2} is the area of the sphere of tangent directions. The result is even in kappa and can
    # be differentiated any number of times, also at zero. A log-density is a small difference of
    # it and kappa t, so round that difference, not this.
    #
    # No Bessel function is used. With t = tanh s and n = D - 1 the integrand is
    # exp(kappa tanh s) cosh(s)^-n, analytic around the real line, with one peak at
    # kappa = n sinh(s*) cosh(s*), that is s* = asinh(2 kappa / n) / 2, of width
    # sigma = (n (1 + tanh(s*)^2))^(-1/2). At a distance delta from the peak its logarithm is lower
    # by n (log(c + a) - a / (c + a)) >= n log cosh(delta), with c = cosh(delta) and
    # a = tanh(s*) sinh(delta) (the derivative in a has the sign of a), so that beyond
    # 45 / n + sqrt(90 / n) less than 1e-19 is left. A second substitution,
    # delta = sigma sinh(tau), makes tails that are slow for small n doubly exponential. The
    # trapezoid rule in tau then converges exponentially: 97 nodes give 12 digits or more, 129 give
    # all of float64.
    check_sphere_dim(dim)
    n = dim - 1
    kappa = concentration.to(factored_dtype(concentration.device))[..., None]
    # The grid follows the integrand, but the integral does not depend on it: no graph.
    peak = torch.asinh(2 * kappa.detach() / n) / 2
    width = (n * (1 + peak.tanh().square())).rsqrt()
    reach = torch.asinh((45 / n + math.sqrt(90 / n)) / width)
    tau = reach * torch.linspace(-1, 1, NODES, dtype=kappa.dtype, device=kappa.device)
    step = width * tau.sinh()
    s = peak + step
    log_cosh = s.abs() + torch.log1p((-2 * s.abs()).exp()) - math.log(2.0)
    log_weight = (width * tau.cosh() * reach * (2 / (NODES - 1))).log() - n * log_cosh
    # tanh s - tanh s_*, which would cancel where both are close to one.
    rise = step.sinh() / s.cosh() / peak.cosh()
    log_sum = torch.logsumexp(kappa * rise + log_weight, dim=-1)
    return log_sphere_area(n) + (kappa * peak.tanh())[..., 0] + log_sum


def _sample_drop(kappa: Tensor, dim: int, count: int) -> Tensor:
    r"""Draw :math:`1 - t`, which keeps its digits where the distribution is narrow.

    In three dimensions :math:`t` has a truncated exponential law, which is inverted. Otherwise
    Wood's envelope is the law of :math:`w = (1 - (1+b) z) / (1 - (1-b) z)` with
    :math:`z \sim \mathrm{Beta}(n/2, n/2)`, a ratio :math:`g_1 / (g_1 + g_2)` of gamma variates:

    .. math:: 1 - w = \frac{2 b z}{1 - (1-b) z} = \frac{2 b g_1}{g_2 + b g_1},

    and with :math:`x_0 = (1-b)/(1+b)` a proposal is accepted with probability
    :math:`e^{\kappa (w - x_0)} \big((1 - x_0 w)/(1 - x_0^2)\big)^n`.
    """
    if dim == 3:
        uniform = torch.rand(count, dtype=kappa.dtype, device=kappa.device)
        drop = -torch.log1p(uniform * torch.expm1(-2 * kappa)) / kappa
        return torch.where(kappa > 0, drop, 2 * uniform)
    n = dim - 1
    b = n / (2 * kappa + torch.hypot(2 * kappa, kappa.new_tensor(n)))
    gap = 2 * b / (1 + b)  # 1 - x_0
    shape = kappa.new_tensor(n / 2)
    gamma = torch.distributions.Gamma(shape, torch.ones_like(shape))
    drop = kappa.new_empty(count)
    pending = torch.arange(count, device=kappa.device)
    while len(pending):
        first, second = gamma.sample((2, len(pending)))
        proposal = 2 * b * first / (second + b * first)
        ratio = (gap + (1 - gap) * proposal) / (gap * (2 - gap))
        log_accept = kappa * (gap - proposal) + n * ratio.log()
        accepted = torch.rand_like(proposal).log() <= log_accept
        drop[pending[accepted]] = proposal[accepted]
        pending = pending[~accepted]
    return drop


def _turn_pole(x: Tensor, mean: Tensor) -> Tensor:
    """Turn the sphere so that the first axis goes to the mean direction, by one reflection."""
    # Of the two reflections that do so up to a sign, this one never subtracts equal numbers.
    sign = torch.where(mean[0] < 0, -1.0, 1.0).to(mean)
    normal = torch.cat([(mean[0] + sign)[None], mean[1:]])
    along = (x @ normal) / (1 + mean[0].abs())
    return -sign * (x - along[:, None] * normal)

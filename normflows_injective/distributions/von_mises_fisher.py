r"""The von Mises-Fisher distribution on the unit sphere, in any dimension."""

from __future__ import annotations

import math
from typing import NamedTuple, final

import torch
from torch import Tensor

from ..modules.precision import factored_dtype
from .axial import AxialLaw
from .spherical import check_sphere_dim, log_sphere_area
from .tilted_angle import Tilt, drop_of

NODES = 129


@final
class VonMisesFisher(AxialLaw):
    r"""The von Mises-Fisher distribution, the isotropic bump on the unit sphere.

    .. math:: \log p(x) = \kappa\, \mu^\top x - \log N_D(\kappa)

    normalised exactly in any dimension. Densities are computed in float64 and rounded to the dtype
    of ``loc``.

    ``forward`` returns samples without a gradient, and log-densities with one, as a score-function
    estimator needs; :meth:`rsample` returns samples that move with the parameters. Two methods,
    because the gradients of their log-densities differ: a score-function estimator would be wrong
    without a notice if its samples began to move.

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

    def forward(self, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        """Draw samples (num_samples, D) without a gradient, with log-densities (num_samples,).

        Args:
            num_samples: Number of samples.

        Returns:
            Samples, and their log-densities in nats, whose gradient reaches the parameters.

        Raises:
            NonFiniteError: If a parameter has become NaN or infinite.
        """
        with torch.no_grad():
            x, _ = self._moving_draws(num_samples)
        return x.to(self.loc.dtype), self._log_density(x)

    def _log_density(self, u: Tensor) -> Tensor:
        mean, kappa = self._lifted()
        return (kappa * (u @ mean) - log_normaliser(kappa, len(mean))).to(self.loc.dtype)

    def _log_density_at(self, angle: Tensor, kappa: Tensor) -> Tensor:
        return -kappa * drop_of(angle) - log_normaliser_from_mode(kappa, *self.shape)

    def _sample_drop(self, kappa: Tensor) -> Tensor:
        return sample_drop(kappa, *self.shape)

    def _tilt(self) -> Tilt:
        return tilt(*self.shape)

    def _entropy(self) -> Tensor:
        _, kappa = self._folded()
        return entropy(kappa, *self.shape)


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
    kappa = concentration.to(factored_dtype(concentration.device))
    terms = _terms(kappa, dim)
    return log_sphere_area(dim - 1) + kappa * terms.peak.tanh() + terms.log.logsumexp(-1)


def log_normaliser_from_mode(concentration: Tensor, dim: int) -> Tensor:
    r"""Log-normaliser of :math:`e^{-\kappa (1 - t)}`, which is small for large concentrations."""
    kappa = concentration.to(factored_dtype(concentration.device))
    terms = _terms(kappa, dim)
    return log_sphere_area(dim - 1) - kappa * _drop(terms.peak) + terms.log.logsumexp(-1)


def mean_drop(concentration: Tensor, dim: int) -> Tensor:
    r"""The mean of :math:`1 - t`, with a small relative error for all concentrations."""
    terms = _terms(concentration.to(factored_dtype(concentration.device)), dim)
    return (terms.log.softmax(-1) * _drop(terms.s)).sum(-1)


def entropy(concentration: Tensor, dim: int) -> Tensor:
    r"""The entropies (*) in nats of laws with concentrations (*), :math:`\log N - \kappa E t`."""
    from_mode = log_normaliser_from_mode(concentration, dim)
    return from_mode + concentration * mean_drop(concentration, dim)


def tilt(dim: int) -> Tilt:
    """The law of the angle to the mean direction."""
    mean = lambda kappa: -mean_drop(kappa, dim)  # noqa: E731
    return Tilt(lambda angle: -drop_of(angle), mean, rate=1.0, n=dim - 1)


class _Terms(NamedTuple):
    """Nodes in s = artanh t, logarithms of the integrand with its weights, and the peak's s."""

    s: Tensor
    log: Tensor
    peak: Tensor


def _terms(kappas: Tensor, dim: int) -> _Terms:
    """Terms (*, nodes) of the integral over the height, divided by the exponential at the peak."""
    check_sphere_dim(dim)
    n = dim - 1
    kappa = kappas[..., None]
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
    return _Terms(s, kappa * rise + log_weight, peak[..., 0])


def _drop(s: Tensor) -> Tensor:
    """1 - tanh s, with its digits."""
    return 2 * torch.sigmoid(-2 * s)


def sample_drop(kappas: Tensor, dim: int) -> Tensor:
    r"""Draw :math:`1 - t` for each concentration, with the digits that a narrow law needs.

    In three dimensions :math:`t` has a truncated exponential law, which is inverted. Otherwise
    Wood's envelope is the law of :math:`w = (1 - (1+b) z) / (1 - (1-b) z)` with
    :math:`z \sim \mathrm{Beta}(n/2, n/2)`, a ratio :math:`g_1 / (g_1 + g_2)` of gamma variates:

    .. math:: 1 - w = \frac{2 b z}{1 - (1-b) z} = \frac{2 b g_1}{g_2 + b g_1},

    and with :math:`x_0 = (1-b)/(1+b)` a proposal is accepted with probability
    :math:`e^{\kappa (w - x_0)} \big((1 - x_0 w)/(1 - x_0^2)\big)^n`.
    """
    if dim == 3:
        uniform = torch.rand_like(kappas)
        inverted = -torch.log1p(uniform * torch.expm1(-2 * kappas)) / kappas
        return torch.where(kappas > 0, inverted, 2 * uniform)
    n = dim - 1
    kappa = kappas.flatten()
    b = n / (2 * kappa + torch.hypot(2 * kappa, kappa.new_tensor(n)))
    gap = 2 * b / (1 + b)  # 1 - x_0
    shape = kappa.new_tensor(n / 2)
    gamma = torch.distributions.Gamma(shape, torch.ones_like(shape))
    drop = torch.empty_like(kappa)
    pending = torch.arange(len(kappa), device=kappa.device)
    while len(pending):
        first, second = gamma.sample((2, len(pending)))
        its_b, its_gap = b[pending], gap[pending]
        proposal = 2 * its_b * first / (second + its_b * first)
        ratio = (its_gap + (1 - its_gap) * proposal) / (its_gap * (2 - its_gap))
        log_accept = kappa[pending] * (its_gap - proposal) + n * ratio.log()
        accepted = torch.rand_like(proposal).log() <= log_accept
        drop[pending[accepted]] = proposal[accepted]
        pending = pending[~accepted]
    return drop.view_as(kappas)

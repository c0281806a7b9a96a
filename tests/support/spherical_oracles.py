"""Laws on the unit sphere, with quadrature and ratios of Bessel functions."""

from __future__ import annotations

import scipy.integrate
import scipy.special
import scipy.stats
import torch

from normflows_injective.distributions.spherical import AngularCentralGaussian, UniformSphere
from normflows_injective.distributions.von_mises_fisher import VonMisesFisher
from support.points import double


def von_mises_fisher(loc, kappa, trainable=False, **options):
    return VonMisesFisher(double(loc), kappa, trainable, **options).double()


def skewed(dim):
    noise = torch.randn(dim, dim, dtype=torch.float64)
    # Well conditioned for all seeds, as quadrature needs.
    return torch.eye(dim, dtype=torch.float64) + 0.5 * noise / torch.linalg.matrix_norm(noise, 2)


def distributions(dim, trainable=False):
    return [
        UniformSphere(dim).double(),
        AngularCentralGaussian(skewed(dim), trainable),
        VonMisesFisher(torch.randn(dim, dtype=torch.float64), 2.5, trainable),
    ]


def bessel_ratio(dim, kappa):
    """The mean I_{D/2} / I_{D/2-1}: by scipy, or by its continued fraction where it underflows."""
    order = dim / 2 - 1
    scaled = scipy.special.ive(order, kappa)
    if scaled > 1e-200:
        return scipy.special.ive(order + 1, kappa) / scaled
    ratio = 0.0
    for term in reversed(range(2000)):
        ratio = 1 / ((dim + 2 * term) / kappa + ratio)
    return ratio

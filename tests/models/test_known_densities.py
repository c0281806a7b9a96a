"""Densities in closed form on known manifolds, and their normalisation: oracles 14 and 15."""

import math

import normflows as nf
import numpy as np
import pytest
import torch
from support.geometry import (
    Chart,
    Map,
    Pair,
    Warp,
    circle,
    flow_on,
    seeded,
    stereographic_sphere,
    warped,
)
from support.points import legendre
from torch import Tensor, nn

import normflows_injective as nfi
from normflows_injective.volume import log_volume


class VonMises(nn.Module):
    """Base on the angle, e^(kappa cos) / (2 pi I_0(kappa))."""

    kappa = torch.tensor(1.7, dtype=torch.float64)

    def log_prob(self, z: Tensor) -> Tensor:
        normaliser = math.log(2 * math.pi) + torch.special.i0(self.kappa).log()
        return (self.kappa * z.cos()).sum(1) - normaliser

    def forward(self, num_samples: int) -> tuple[Tensor, Tensor]:
        law = torch.distributions.VonMises(torch.zeros_like(self.kappa), self.kappa)
        z = law.sample((num_samples, 1))
        return z, self.log_prob(z)


def stacked(*columns: Tensor) -> Tensor:
    return torch.stack(columns, dim=1)


def latitude_sphere(z: Tensor) -> Tensor:
    a, b = z.T
    return 2.5 * stacked(b.cos() * a.cos(), b.cos() * a.sin(), b.sin())


def torus(z: Tensor) -> Tensor:
    a, b = z.T
    return stacked((2 + 0.7 * b.cos()) * a.cos(), (2 + 0.7 * b.cos()) * a.sin(), 0.7 * b.sin())


def flat(z: Tensor) -> Tensor:
    a, b = z.T
    return stacked(0.4 * a.cos(), 0.4 * a.sin(), 3 * b.cos(), 3 * b.sin())


def helix(z: Tensor) -> Tensor:
    (a,) = z.T
    return stacked(1.2 * a.cos(), 1.2 * a.sin(), 0.5 * a)


def paraboloid(z: Tensor) -> Tensor:
    return torch.cat([z, z.square().sum(1, keepdim=True)], dim=1)


def sine_curve(z: Tensor) -> Tensor:
    return torch.cat([z, (math.pi / 2 * z).sin()], dim=1)


def sine_speed(z: Tensor) -> Tensor:
    return (1 + (math.pi / 2 * (math.pi / 2 * z[:, 0]).cos()) ** 2).sqrt()


VOLUMES: dict[str, tuple[int, Map, Map]] = {
    "circle": (1, circle(0.6).decode, lambda z: torch.full((len(z),), 0.6)),
    "sphere": (2, latitude_sphere, lambda z: 2.5**2 * z[:, 1].cos()),
    "torus": (2, torus, lambda z: 0.7 * (2 + 0.7 * z[:, 1].cos())),
    "flat torus": (2, flat, lambda z: torch.full((len(z),), 0.4 * 3)),
    "helix": (1, helix, lambda z: torch.full((len(z),), math.hypot(1.2, 0.5))),
    "paraboloid": (2, paraboloid, lambda z: (1 + 4 * z.square().sum(1)).sqrt()),
    "sine curve": (1, sine_curve, sine_speed),
}


@pytest.mark.parametrize("manifold", VOLUMES)
@seeded(140)
def test_oracle_14_volume_elements(manifold, device):
    """The log-volume is the logarithm of the known line or area element."""
    dimension, decode, element = VOLUMES[manifold]
    z = (1.5 * (2 * torch.rand(9, dimension, dtype=torch.float64) - 1)).to(device)
    torch.testing.assert_close(log_volume(decode, z), element(z).to(z).log())


@seeded(141)
def test_oracle_14_torus_area():
    """The volume element of the torus integrates to 4 pi^2 R r."""
    grid = 2 * math.pi * torch.arange(24, dtype=torch.float64) / 24
    z = torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        area = log_volume(torus, z).exp().mean() * (2 * math.pi) ** 2
    assert float(area) == pytest.approx(4 * math.pi**2 * 2 * 0.7, rel=1e-12)


@seeded(142)
def test_oracle_14_von_mises_on_a_circle():
    """log_prob, sample and sign: density p_Theta / r on a circle of radius r."""
    radius = 0.6
    model = nfi.InjectiveNormalizingFlow(VonMises(), [Chart(circle(radius))])
    x, log_q = model.sample(20)
    torch.testing.assert_close(x.norm(dim=1), torch.full_like(log_q, radius))
    kappa = 1.7
    bessel = np.i0(kappa)
    expected = kappa * x[:, 0] / radius - math.log(2 * math.pi * bessel * radius)
    torch.testing.assert_close(log_q, expected)
    torch.testing.assert_close(model.log_prob(x), expected)
    # Off the manifold, the density is that of the projection.
    torch.testing.assert_close(model.log_prob(1.8 * x), expected)


@seeded(143)
def test_oracle_14_uniform_on_a_sphere():
    """Uniform points have density 1 / (4 pi R^2) from their density in the chart."""
    radius = 2.5
    sphere = stereographic_sphere(radius)
    z = torch.randn(20, 2, dtype=torch.float64)
    # Area of the unit sphere per area of the stereographic plane, over the total.
    latent = (4 / (1 + z.square().sum(1)).square() / (4 * math.pi)).log()
    x, log_det = Chart(sphere)(z)
    expected = torch.full_like(latent, -math.log(4 * math.pi * radius**2))
    torch.testing.assert_close(latent - log_det, expected)
    z_again, log_det = Chart(sphere).inverse(x)
    torch.testing.assert_close(z_again, z)
    torch.testing.assert_close(latent + log_det, expected)


@seeded(150)
def test_oracle_15_normalisation_on_a_sphere():
    """A warped normal in one chart integrates to one by quadrature in another chart."""
    radius, warp = 1.3, Warp()
    model = flow_on(warped(stereographic_sphere(radius), warp), 2, warp)
    heights, weights = legendre(160)
    longitudes = 2 * math.pi * torch.arange(160, dtype=torch.float64) / 160
    height, longitude = torch.cartesian_prod(heights, longitudes).T
    ring = (1 - height**2).sqrt()
    x = radius * stacked(ring * longitude.cos(), ring * longitude.sin(), height)
    with torch.no_grad():
        density = model.log_prob(x).exp().view(160, 160)
    # By Archimedes, the area element is R^2 d(height) d(longitude).
    total = radius**2 * 2 * math.pi * (weights * density.mean(1)).sum()
    assert float(total) == pytest.approx(1, abs=1e-6)


@seeded(151)
def test_oracle_15_normalisation_on_a_curve():
    """A sum over the chords of a fine polygon: no derivative of any map is used."""
    shape = nn.Parameter(torch.tensor([0.7, 0.4], dtype=torch.float64))

    def decode(z: Tensor) -> Tensor:
        return sine_curve(shape[0] * z.sinh() + shape[1])

    def encode(x: Tensor) -> Tensor:
        return ((x[:, :1] - shape[1]) / shape[0]).asinh()

    model = flow_on(Pair(encode, decode, torch.zeros), 1, nn.ParameterList([shape]))
    ends = sine_curve(torch.linspace(-60, 60, 40_001, dtype=torch.float64).unsqueeze(1))
    with torch.no_grad():
        density = model.log_prob((ends[1:] + ends[:-1]) / 2).exp()
    total = (density * (ends[1:] - ends[:-1]).norm(dim=1)).sum()
    assert float(total) == pytest.approx(1, abs=1e-4)


def mixture() -> nn.Module:
    return nf.distributions.GaussianMixture(3, 2, loc=[[0, 0], [1, 2], [-2, 1]])


BASES = {
    "normal, d = 1": lambda: nf.distributions.DiagGaussian(1),
    "normal, d = 2": lambda: nf.distributions.DiagGaussian(2),
    "mixture, d = 2": mixture,
}


@pytest.mark.parametrize("name", BASES)
@seeded(152)
def test_oracle_15_latent_densities(name):
    """Latent densities integrate to one: a dimension forgotten in a normaliser shows here."""
    base = BASES[name]().double()
    dimension = 1 if name.endswith("1") else 2
    axis = torch.linspace(-14, 14, 281, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * dimension).view(-1, dimension)
    with torch.no_grad():
        total = base.log_prob(grid).exp().sum() * 0.1**dimension
    assert float(total) == pytest.approx(1, abs=1e-10)

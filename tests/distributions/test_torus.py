"""Laws of angles: densities, moments and entropies against quadrature, special values, types."""

from __future__ import annotations

import copy
import math

import pytest
import scipy.integrate
import scipy.interpolate
import scipy.stats
import torch
from support.moving_draws import circle_points
from support.points import double
from support.seeds import manual_seed

import normflows_injective as nfi
from normflows_injective.distributions import (
    UniformTorus,
    VonMises,
    VonMisesFisher,
    WrappedNormal,
)

LAWS = {
    "uniform": lambda: UniformTorus(1).double(),
    "von_mises": lambda: VonMises(double([2.0]), 3.0, True),
    "flat": lambda: VonMises(double([2.0]), 0.0, True),
    "normal": lambda: WrappedNormal(double([3.0]), 0.4, True),
    "wide_normal": lambda: WrappedNormal(double([3.0]), 2.0, True),
}


@pytest.mark.parametrize("name", LAWS)
def test_total_mass_is_one_and_the_density_is_periodic(name):
    law, x = LAWS[name](), circle_points()
    mass = law.log_prob(x).exp().sum() * 2 * math.pi / len(x)
    assert mass.item() == pytest.approx(1, abs=1e-12)
    turned = x + 2 * math.pi * torch.arange(-200, 200).double()[:, None]
    torch.testing.assert_close(law.log_prob(turned), law.log_prob(x), rtol=0, atol=1e-11)


def test_total_mass_on_a_torus_is_one():
    each = circle_points(120)[:, 0]
    x = torch.cartesian_prod(each, each)
    for build in (VonMises, WrappedNormal):
        law = build(double([1.0, -3.0]), double([0.6, 1.5]))
        mass = law.log_prob(x).exp().sum() * (2 * math.pi / 120) ** 2
        assert mass.item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 0.9, 1.0, 1.0 + 1e-12, 1.5, 4.0, 50.0])
def test_wrapped_normal_against_eighty_windings(scale):
    """The densities of angles everywhere, to rounding, on both sides of the switch."""
    x = torch.linspace(-math.pi, math.pi, 101, dtype=torch.float64)
    windings = math.ceil(40 + 8 * scale)
    turns = 2 * math.pi * torch.arange(-windings, windings + 1, dtype=torch.float64)
    normal = torch.distributions.Normal(double(0.0), double(scale))
    expected = normal.log_prob(x[:, None] + turns).logsumexp(1)
    found = WrappedNormal(double([0.0]), scale).log_prob(x[:, None])
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_derivatives_of_the_wrapped_normal_agree_where_its_series_change():
    slopes = []
    for scale in (1.0, 1.0 + 1e-9):
        law = WrappedNormal(double([0.3]), scale, True)
        slopes.append(torch.autograd.grad(law.log_prob(circle_points(9)).sum(), law.parameters()))
    torch.testing.assert_close(*slopes, rtol=1e-7, atol=1e-7)


def test_wide_laws_and_narrow_ones_are_finite_with_finite_gradients():
    x = double([[0.0], [3.0], [-3.1415926]])
    for build, values in ((WrappedNormal, (1e-4, 1e4)), (VonMises, (0.0, 1e-12, 1e8))):
        for value in values:
            law = build(double([0.1]), value, True)
            found = [law.log_prob(x), *law(20)]
            assert all(part.isfinite().all() for part in found)
            grads = torch.autograd.grad(sum(part.sum() for part in found), law.parameters())
            assert all(g.isfinite().all() for g in grads)


def test_von_mises_is_the_law_of_a_direction_in_the_plane():
    law = VonMises(double([2.0]), 3.0)
    planar = VonMisesFisher(double([math.cos(2.0), math.sin(2.0)]), 3.0)
    x = circle_points(20)
    points = torch.cat([x.cos(), x.sin()], dim=1)
    torch.testing.assert_close(law.log_prob(x), planar.log_prob(points))
    reference = scipy.stats.vonmises(3.0, loc=2.0)
    torch.testing.assert_close(law.log_prob(x), double(reference.logpdf(x[:, 0].numpy())))
    torch.testing.assert_close(law.entropy(), planar.entropy())
    torch.testing.assert_close(law.kl_uniform(), planar.kl_uniform())


def test_entropy_of_von_mises_and_its_gradient_against_quadrature():
    law = VonMises(double([2.0, 1.0]), double([3.0, 0.2]), True)
    x = circle_points()
    log_p = [VonMises(law.loc[i : i + 1].detach(), 1.0) for i in range(2)]
    expected = 0
    for i, one in enumerate(log_p):
        # The same density, with a graph to the concentrations of the law.
        each = torch.func.functional_call(
            _LogProb(one), {"law.concentration": law.concentration[i : i + 1]}, x
        )
        expected = expected - (each.exp() * each).sum() * 2 * math.pi / len(x)
    torch.testing.assert_close(law.entropy(), expected)
    grads = [torch.autograd.grad(h, law.concentration)[0] for h in (law.entropy(), expected)]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(law.kl_uniform(), 2 * math.log(2 * math.pi) - expected)
    assert UniformTorus(2).double().entropy().item() == pytest.approx(2 * math.log(2 * math.pi))


class _LogProb(torch.nn.Module):
    def __init__(self, law):
        super().__init__()
        self.law = law

    def forward(self, x):
        return self.law.log_prob(x)


@pytest.mark.parametrize("name", LAWS)
def test_draws_follow_the_density(name):
    """By Kolmogorov's test of angles, with four standard errors."""
    manual_seed(1)
    law = LAWS[name]()
    x, log_p = law(20_000)
    assert ((x >= -math.pi) & (x < math.pi)).all()
    torch.testing.assert_close(log_p, law.log_prob(x))
    grid = torch.linspace(-math.pi, math.pi, 4001, dtype=torch.float64)
    density = law.log_prob(grid[:, None]).detach().exp().numpy()
    cumulated = scipy.integrate.cumulative_simpson(density, x=grid.numpy(), initial=0)
    cdf = lambda v: scipy.interpolate.make_interp_spline(grid.numpy(), cumulated, 1)(v)  # noqa: E731
    assert scipy.stats.kstest(x[:, 0].detach().numpy(), cdf).pvalue > 6e-5


def test_coordinates_are_independent():
    law = VonMises(double([0.0, 1.0, 2.0]), double([0.5, 4.0, 4.0]))
    x = (law(20_000)[0] - law.loc).sin()
    correlation = torch.corrcoef(x.T) - torch.eye(3)
    assert correlation.abs().max() < 4 / math.sqrt(20_000)


def test_angles_stay_in_the_box_in_single_precision():
    for law in (UniformTorus(2), VonMises([3.1415, -3.1415], 1e6), WrappedNormal([3.1416], 1e-6)):
        x, log_p = law(5000)
        assert x.dtype == log_p.dtype == torch.float32
        assert ((x.double() >= -math.pi) & (x.double() < math.pi)).all()
        assert law.log_prob(x).dtype == torch.float32


def test_a_concentration_below_zero_turns_the_mode():
    law = VonMises(double([1.0, 0.5]), double([2.0, 1.0]), True)
    other = VonMises(double([1.0 + math.pi, 0.5]), double([2.0, 1.0]))
    with torch.no_grad():
        law.concentration[0].neg_()
    x = circle_points(9).expand(9, 2)
    torch.testing.assert_close(law.log_prob(x).detach(), other.log_prob(x))
    mean = (law(20_000)[0] - other.loc).cos().mean(0)
    wanted = (other(20_000)[0] - other.loc).cos().mean(0)
    # Four standard errors of the difference, of at most 1 / 100 each.
    assert ((mean - wanted).abs() < 0.04).all()


def test_state_and_copies():
    x = circle_points(5)
    for name in ("uniform", "von_mises", "normal"):
        law = LAWS[name]()
        expected = law.log_prob(x)
        assert torch.equal(copy.deepcopy(law).log_prob(x), expected)
        if name != "uniform":
            other = type(law)(double([0.0]), 1.0)
            other.load_state_dict(law.state_dict())
            assert torch.equal(other.log_prob(x), expected)
            assert law.trainable
            assert not other.trainable
        assert law.rsample(3)[0].shape == (3, 1)
        assert law.sample(2).shape == (2, 1)


def test_refusals():
    with pytest.raises(nfi.errors.ShapeError, match=r"loc must be a vector of shape \(d,\), got"):
        VonMises(torch.ones(1, 2), 1.0)
    with pytest.raises(nfi.errors.ShapeError, match=r"scale must be one number or have the shape"):
        WrappedNormal([0.0, 1.0], [1.0, 2.0, 3.0])
    with pytest.raises(nfi.errors.OptionError, match="concentration must not be negative, got -2"):
        VonMises([0.0, 1.0], [1.0, -2.0])
    with pytest.raises(nfi.errors.OptionError, match="scale must be positive, got 0"):
        WrappedNormal([0.0, 1.0], 0.0)
    with pytest.raises(nfi.errors.OptionError, match="dim must be a positive integer"):
        UniformTorus(0)
    with pytest.raises(nfi.errors.NonFiniteError, match="x has 1 of 2 values NaN"):
        UniformTorus(2).log_prob(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(nfi.errors.ShapeError, match=r"x must have shape \(B, 2\)"):
        UniformTorus(2).log_prob(torch.zeros(3, 1))
    law = WrappedNormal([0.0], 1.0, True)
    law.scale.data.fill_(math.nan)
    with pytest.raises(nfi.errors.NonFiniteError, match="lower the step size"):
        law(2)

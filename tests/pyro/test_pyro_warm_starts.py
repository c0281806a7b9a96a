"""Warm starts: normal fits along paths, of other guides, and given ones."""

from __future__ import annotations

import math
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from support.comparison import close
from support.seeds import manual_seed, seeded_generator

import normflows_injective.pyro as nfp
from normflows_injective import errors
from normflows_injective.flows.guides.pathfinder import _climb, _dense
from normflows_injective.flows.guides.places import LowRankPlace
from normflows_injective.pyro.guides import guide_fit
from normflows_injective.pyro.guides.log_joint import LogJoint

pytestmark = pytest.mark.usefixtures("float64_by_default")


def law(dim, seed=0):
    """A normal law with correlations, whose evidence is one."""
    draws = torch.randn(dim, dim, generator=seeded_generator(seed), dtype=torch.float64)
    covariance = draws @ draws.mT / dim + 0.05 * torch.eye(dim, dtype=torch.float64)
    mean = torch.linspace(-3.0, 3.0, dim, dtype=torch.float64)
    return dist.MultivariateNormal(mean, covariance)


def target(dim):
    normal = law(dim)
    return lambda: pyro.sample("x", normal)


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_a_normal_posterior_is_found(dim):
    guide = nfp.AutoFlow(target(dim)).build(warm_start="pathfinder")
    fit = guide.start
    # Draws choose between fits that are all but equal.
    assert -fit.elbo + 4 * fit.error > -0.3
    assert -fit.elbo < 0.1 * dim + 4 * fit.error
    assert bool(((fit.mean - law(dim).mean).abs() < law(dim).variance.sqrt()).all())
    assert "best of" in fit.source


def test_second_derivatives_give_the_covariance():
    dim = 5
    guide = nfp.AutoFlow(target(dim)).build()
    found = _dense(LogJoint(guide, (), {}), torch.randn(dim))
    values, vectors = torch.linalg.eigh(law(dim).covariance_matrix)
    # No direction is taken to be wider than that of a precision of 0.1.
    expected = (vectors * values.clamp(max=10.0)) @ vectors.mT
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dim", "part"), [(60, 0.35), (300, 0.5)])
def test_many_latents_take_the_curvature_of_the_optimiser(dim, part):
    """Sixty latents have a matrix, three hundred its diagonal."""
    fit = nfp.AutoFlow(target(dim)).build(warm_start="pathfinder").start
    assert fit.covariance.dim() == (2 if dim == 60 else 1)
    assert float((fit.mean - law(dim).mean).abs().max()) < 3.0
    # The gap of a law of the same mean with unit variances.
    plain = dist.Normal(law(dim).mean, 1.0).to_event(1).sample((500,))
    crude = dist.Normal(law(dim).mean, 1.0).to_event(1).log_prob(plain) - law(dim).log_prob(plain)
    assert -fit.elbo < part * float(crude.mean())


def test_paths_end_before_a_singularity():
    """Toward small scales the density grows without limit, and a mode would be no fit."""

    def centred():
        log_scale = pyro.sample("s", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(9), log_scale.exp()).to_event(1))

    fit = nfp.AutoFlow(centred).build(warm_start="pathfinder").start
    assert math.isfinite(fit.elbo)
    assert float(fit.mean[0]) > -6


def test_a_path_looks_at_no_place_twice():
    class Counted:
        def __init__(self):
            self.places = []

        def __call__(self, latent):
            return law(5).log_prob(latent)

        def gradient(self, latent):
            self.places.append(tuple(latent.tolist()))
            with torch.enable_grad():
                at = latent.detach().requires_grad_()
                value = self(at)
                return value.detach(), torch.autograd.grad(value, at)[0]

    density = Counted()
    path = _climb(density, torch.zeros(5))
    assert len(path) > 4
    assert len(set(density.places)) == len(density.places)
    assert all(point.value < later.value for point, later in pairwise(path))


def test_building_twice_gives_the_same_start_and_draws_no_numbers():
    manual_seed(0)
    first = nfp.AutoFlow(target(3), permute=False).build(warm_start="pathfinder").start
    found = torch.rand(1)
    manual_seed(0)
    second = nfp.AutoFlow(target(3), permute=False).build().build(warm_start="pathfinder").start
    assert torch.equal(found, torch.rand(1))
    close(first.mean, second.mean, 1e-12)


MEAN = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
WIDTHS = torch.tensor([0.3, 2.0, 1.0, 0.1], dtype=torch.float64)


def pair():
    factor = torch.tril(
        torch.tensor(
            [[1.0, 0, 0, 0], [0.5, 0.8, 0, 0], [-0.3, 0.2, 0.9, 0], [0.4, -0.3, 0.1, 0.7]],
            dtype=torch.float64,
        )
    )
    factor = WIDTHS.unsqueeze(1) * factor
    return MEAN, factor @ factor.mT


@pytest.mark.parametrize("place", ["triangular", "low_rank", "diagonal"])
@pytest.mark.parametrize("matrix", [True, False])
def test_a_flow_takes_a_given_law(place, matrix):
    mean, covariance = pair()
    given = covariance if matrix else covariance.diagonal()
    guide = nfp.AutoFlow(target(4), place=place, permute=False).build(warm_start=(mean, given))
    posterior = guide.get_posterior()
    if place == "triangular" and matrix:
        expected = dist.MultivariateNormal(mean, covariance)
    else:
        expected = dist.Normal(mean, covariance.diagonal().sqrt()).to_event(1)
    x = expected.sample((20,))
    tolerance = 0.2 if place == "low_rank" else 1e-9
    close(posterior.log_prob(x).detach(), expected.log_prob(x), tolerance)
    assert isinstance(guide.transform.stack.flows[-1], LowRankPlace) == (place == "low_rank")


@pytest.mark.parametrize("noise", ["mvn", "diagonal", "low_rank"])
@pytest.mark.parametrize("matrix", [True, False])
def test_a_sheet_takes_a_given_law(noise, matrix):
    mean, covariance = pair()
    given = covariance if matrix else covariance.diagonal()
    guide = nfp.AutoInjective(target(4), 2, noise=noise, decoder="linear")
    guide.build(warm_start=(mean, given))
    scale, slope = guide.frame.scale.detach(), guide.decoder.slope.detach()
    precision = guide.noise.times_precision(torch.eye(4)).detach()
    spread = slope.mT @ slope + torch.linalg.inv(precision)
    found = scale.unsqueeze(1) * spread * scale
    close(guide.frame.loc.detach(), mean, 1e-12)
    if matrix:
        close(found.diagonal(), covariance.diagonal(), 1e-9)
        if noise == "mvn":
            close(found, covariance, 1e-9)
    # With a linear sheet the reverse model is exact, draw by draw.
    law = guide.get_posterior()
    value = law.rsample((6,))
    exact = dist.MultivariateNormal(mean, found)
    close(law.log_prob(value).detach(), exact.log_prob(value.detach()), 1e-8)


def test_a_sheet_measures_in_deviations_given_the_other_latents():
    mean, covariance = pair()
    guide = nfp.AutoInjective(target(4), 2).build(warm_start=(mean, covariance))
    expected = torch.linalg.inv(covariance).diagonal().rsqrt()
    close(guide.frame.scale.detach(), expected, 1e-9)


def test_a_curved_sheet_starts_near_a_given_law():
    mean, covariance = pair()
    guide = nfp.AutoInjective(target(4), 2).build(warm_start=(mean, covariance))
    draws = guide.sample_posterior(20_000)["x"]
    torch.testing.assert_close(
        draws.mT.cov() / covariance.diagonal().outer(covariance.diagonal()).sqrt(),
        covariance / covariance.diagonal().outer(covariance.diagonal()).sqrt(),
        rtol=0,
        atol=0.06,
    )


@pytest.mark.parametrize(
    "make", [autoguide.AutoMultivariateNormal, autoguide.AutoNormal, nfp.AutoInjective]
)
def test_another_guide_gives_its_mean_and_covariance(make):
    def positive():
        pyro.sample("a", dist.LogNormal(1.0, 0.5))
        pyro.sample("b", dist.Normal(torch.ones(2), 2.0).to_event(1))

    other = make(positive, 1) if make is nfp.AutoInjective else make(positive)
    other()
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    guide = nfp.AutoFlow(positive).build(warm_start=other)
    assert guide.start.source == make.__name__
    if make is autoguide.AutoMultivariateNormal:
        expected = other.get_posterior()
        error = expected.variance.sqrt() / 500**0.5
        assert bool(((guide.start.mean - expected.mean).abs() < 4 * error).all())
        ratio = guide.start.variances / expected.variance
        assert bool(((ratio - 1).abs() < 4 * (2 / 500) ** 0.5).all())
    assert guide()["a"] > 0


def test_of_many_latents_another_guide_gives_variances(monkeypatch):
    monkeypatch.setattr(guide_fit, "LARGEST_COVARIANCE", 3)
    other = autoguide.AutoMultivariateNormal(target(4))
    other()
    other.scale.data.mul_(3.0)
    start = nfp.AutoFlow(target(4)).build(warm_start=other).start
    assert start.covariance.shape == (4,)
    ratio = start.variances / other.get_posterior().variance
    assert bool(((ratio - 1).abs() < 4 * (2 / 500) ** 0.5).all())


def test_a_guide_of_other_sites_is_refused():
    other = autoguide.AutoNormal(lambda: pyro.sample("y", dist.Normal(0.0, 1.0)))
    other()
    with pytest.raises(errors.OptionError, match="does not draw 'x'"):
        nfp.AutoFlow(target(2)).build(warm_start=other)


@pytest.mark.parametrize(
    ("start", "error", "says"),
    [
        ("laplace", errors.OptionError, "one of pathfinder"),
        (3.0, errors.OptionError, "another guide"),
        ((torch.zeros(3), torch.eye(2)), errors.ShapeError, r"mean \(2,\)"),
        ((torch.zeros(2), torch.ones(2, 2)), errors.OptionError, "positive definite"),
        ((torch.zeros(2), torch.tensor([1.0, -1.0])), errors.OptionError, "positive definite"),
        ((torch.full((2,), math.nan), torch.eye(2)), errors.NonFiniteError, "mean"),
    ],
)
def test_starts_that_make_no_sense(start, error, says):
    with pytest.raises(error, match=says):
        nfp.AutoFlow(target(2)).build(warm_start=start)


def test_the_log_joint_is_that_of_the_objective():
    def model(y):
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", 3):
            p = pyro.sample("p", dist.Beta(2.0, 2.0))
            pyro.sample("y", dist.Normal(p * a, 1.0), obs=y)

    y = torch.tensor([0.3, -1.0, 2.0])
    guide = nfp.AutoFlow(model).build(y)
    latent = torch.randn(4)
    values = {"a": latent[0].exp(), "p": latent[1:].sigmoid()}
    expected = (
        dist.Gamma(2.0, 1.0).log_prob(values["a"])
        + latent[0]
        + dist.Beta(2.0, 2.0).log_prob(values["p"]).sum()
        + (values["p"] * (1 - values["p"])).log().sum()
        + dist.Normal(values["p"] * values["a"], 1.0).log_prob(y).sum()
    )
    close(LogJoint(guide, (y,), {})(latent), expected, 1e-10)

"""Reports on guides: importance weights with their tail, moved components, resampled draws."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from pyro.ops.stats import fit_generalized_pareto
from support.seeds import manual_seed, seeded_generator

import normflows_injective.pyro as nfp
from normflows_injective import errors
from normflows_injective.diagnostics.importance import _pareto, smoothed

Y = torch.tensor([0.5, 1.5, -0.3])


def model(y=Y):
    """A normal posterior, of evidence and moments in closed form."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x, 0.5), obs=y)


PRECISION = 1 + 3 / 0.25
MEAN = float(Y.sum()) / 0.25 / PRECISION
EVIDENCE = float(
    dist.MultivariateNormal(torch.zeros(3), 0.25 * torch.eye(3) + torch.ones(3, 3)).log_prob(Y)
)


def normal_guide(mean=MEAN, deviation=PRECISION**-0.5):
    guide = nfp.AutoFlow(model)
    return guide.build(Y, warm_start=(torch.tensor([mean]), torch.tensor([deviation**2])))


@pytest.mark.parametrize("parallel", [True, False])
def test_an_exact_guide_has_equal_weights(parallel):
    report = nfp.diagnose(normal_guide(), Y, num_samples=300, parallel=parallel)
    assert report.elbo == pytest.approx(EVIDENCE, abs=1e-3)
    assert report.error < 1e-3
    assert report.pareto_k < 0.5
    assert report.effective > 299
    assert "close to the posterior" in report.verdict
    assert report.samples["x"].shape == (300,)
    assert all(site.size < 0.01 for site in report.sites)


@pytest.mark.parametrize("parallel", [True, False])
def test_the_bound_of_a_wide_guide_and_its_correction(parallel):
    manual_seed(1)
    wide = 2 * PRECISION**-0.5
    report = nfp.diagnose(normal_guide(MEAN + 0.1, wide), Y, num_samples=1500, parallel=parallel)
    # KL of a normal law to one of half its width, which is moved by 0.1.
    gap = 0.5 * (4 + 0.1**2 * PRECISION - 1 - math.log(4))
    assert abs(report.elbo - (EVIDENCE - gap)) < 4 * report.error
    assert report.pareto_k < 0.5
    draws = report.resample(2000, generator=seeded_generator(0))["x"]
    error = PRECISION**-0.5 * (1 / 2000 + 1 / report.effective) ** 0.5
    assert abs(float(draws.mean()) - MEAN) < 4 * error
    (site,) = report.sites
    assert site.name == "x"
    assert site.ratio == pytest.approx(0.5, abs=0.06)
    assert site.shift == pytest.approx(-0.1 / wide, abs=0.1)


def test_a_narrow_guide_is_not_to_be_trusted():
    manual_seed(2)
    report = nfp.diagnose(
        normal_guide(MEAN, 0.3 * PRECISION**-0.5), Y, num_samples=2000, parallel=True
    )
    assert report.pareto_k > 0.7
    assert "not to be trusted" in report.verdict
    assert report.sites[0].ratio > 1.5
    assert "not to be trusted" in str(report)


@pytest.mark.parametrize(
    "make",
    [autoguide.AutoNormal, autoguide.AutoMultivariateNormal, lambda m: nfp.AutoInjective(m, 1)],
)
def test_other_guides_and_several_sites(make):
    def several():
        with pyro.plate("two", 2):
            pyro.sample("a", dist.Gamma(2.0, 1.0))
        pyro.sample("b", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))

    guide = make(several)
    guide()
    report = nfp.diagnose(guide, num_samples=60)
    assert report.samples["a"].shape == (60, 2)
    assert report.samples["b"].shape == (60, 2, 3)
    assert {site.name for site in report.sites} >= {"a[0]", "a[1]", "b[1, 2]"}
    assert len(report.sites) == 8
    assert report.resample(7)["b"].shape == (7, 2, 3)
    assert "effective number" in repr(report)


def test_figures():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figure = nfp.diagnose(normal_guide(0.0, 1.0), Y, num_samples=200).plot()
    assert len(figure.axes) == 2
    figure.canvas.draw()


def test_a_plain_guide_needs_its_model():
    def guide(y):
        pyro.sample("x", dist.Normal(MEAN, PRECISION**-0.5))

    with pytest.raises(errors.OptionError, match="model="):
        nfp.diagnose(guide, Y)
    report = nfp.diagnose(guide, Y, model=model, num_samples=50)
    assert report.elbo == pytest.approx(EVIDENCE, abs=1e-3)


def test_weights_that_are_not_finite():
    def impossible():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("no", torch.where(x > -1e9, -math.inf, 0.0))

    guide = nfp.AutoFlow(impossible, init_scale=0.1).build()
    with pytest.raises(errors.NonFiniteError, match="finite weight"):
        nfp.diagnose(guide, num_samples=20)


def test_nothing_is_left_in_handlers_around():
    guide = normal_guide()
    with pyro.poutine.trace() as trace:
        nfp.diagnose(guide, Y, num_samples=5)
    assert not trace.trace.nodes


# The tail.


def pareto_draws(shape, count, seed):
    u = torch.rand(count, generator=seeded_generator(seed), dtype=torch.float64)
    return (u.pow(-shape) - 1) / shape


@pytest.mark.parametrize("shape", [-0.3, 0.2, 0.6, 1.2])
def test_the_shape_of_a_pareto_law_is_found(shape):
    found = torch.tensor(
        [_pareto(pareto_draws(shape, 2000, s).sort().values)[0] for s in range(20)]
    )
    # Asymptotic standard error (1 + k) / sqrt(n), and the prior's pull to 0.5.
    bias = 10 / 2010 * abs(0.5 - shape)
    assert abs(float(found.mean()) - shape) < 4 * (1 + shape) / math.sqrt(20 * 2000) + bias + 0.01


def test_the_shape_is_that_of_pyro():
    for seed in range(5):
        excess = pareto_draws(0.4, 300, seed).sort().values
        theirs, _ = fit_generalized_pareto(excess)
        assert _pareto(excess)[0] == pytest.approx(float(theirs), abs=1e-6)


def test_weights_keep_their_order_and_sum_to_one():
    log_weights = torch.randn(500, generator=seeded_generator(3)) * 2
    result = smoothed(log_weights)
    assert float(result.log_weights.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(result.log_weights.argsort(), log_weights.argsort())
    # The tail is drawn in, never out, beside the weights that are left as they are.
    reach = result.log_weights.max() - result.log_weights.median()
    assert float(reach) <= float(log_weights.max() - log_weights.median()) + 1e-5
    assert 1 < result.effective < 500
    assert smoothed(torch.zeros(10)).shape == math.inf
    assert smoothed(torch.zeros(100)).shape == -math.inf

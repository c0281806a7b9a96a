"""Medians and quantiles of guides, against those of their own draws."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from support.seeds import manual_seed
from torch.distributions import biject_to, constraints, transforms

import normflows_injective.pyro as nfp
from normflows_injective.errors import OptionError
from normflows_injective.flows.gauges import LpGauge
from normflows_injective.pyro.guides.site_quantiles import site_quantiles

LEVELS = torch.tensor([0.05, 0.25, 0.5, 0.9])
BY_COMPONENT = {
    "real": constraints.real,
    "positive": constraints.positive,
    "above": constraints.greater_than(2.0),
    "below": constraints.less_than(2.0),
    "interval": constraints.interval(-1.0, 3.0),
    "falling interval": constraints.interval(3.0, -1.0),
    "vector": constraints.independent(constraints.positive, 1),
    "both ways": constraints.interval(
        torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 2.0])
    ),
}
TOGETHER = {
    "simplex": (constraints.simplex, (2,)),
    "ordered": (dist.constraints.ordered_vector, (3,)),
    "correlation": (constraints.corr_cholesky, (3,)),
    "surface": (nfp.StarLikeConstraint(LpGauge(1.0), dim=3), (2,)),
}


@pytest.mark.parametrize("name", BY_COMPONENT)
def test_quantiles_go_through_monotone_transforms(name):
    """Falling ones exchange the levels; the image of an order statistic is an order statistic."""
    transform = biject_to(BY_COMPONENT[name])
    draws = torch.randn(401, 3, dtype=torch.float64)
    levels = LEVELS.double()  # 400 steps between draws: every level is that of a draw.
    found = site_quantiles(transform, draws, levels)
    torch.testing.assert_close(found, transform(draws).quantile(levels, dim=0))
    assert (found.diff(dim=0) > 0).all()


def test_falling_transforms_without_a_sign():
    class Falling(transforms.Transform):
        domain = codomain = constraints.real
        bijective = True

        def _call(self, x):
            return -x.sinh()

    draws = torch.randn(401, 2, dtype=torch.float64)
    found = site_quantiles(Falling(), draws, LEVELS.double())
    torch.testing.assert_close(found, (-draws.sinh()).quantile(LEVELS.double(), dim=0))


@pytest.mark.parametrize("name", TOGETHER)
def test_quantiles_where_components_hang_together_are_those_of_the_draws(name):
    constraint, shape = TOGETHER[name]
    transform = biject_to(constraint)
    draws = torch.randn(500, *shape, dtype=torch.float64)
    found = site_quantiles(transform, draws, LEVELS.double())
    torch.testing.assert_close(found, transform(draws).quantile(LEVELS.double(), dim=0))
    assert (found.diff(dim=0) >= 0).all()


@pytest.mark.slow
def test_many_components():
    """More elements than torch.quantile takes at once."""
    draws = torch.linspace(0, 1, 1000).unsqueeze(1).expand(1000, 17_000)
    found = site_quantiles(transforms.ExpTransform(), draws, torch.tensor([0.5]))
    assert found.shape == (1, 17_000)
    torch.testing.assert_close(found, torch.full_like(found, 0.5).exp())


def sites():
    """Every kind of site at once, some in a plate."""
    pyro.sample("positive", dist.LogNormal(0.0, 1.0))
    pyro.sample(
        "order",
        dist.TransformedDistribution(
            dist.Normal(torch.zeros(3), 1.0).to_event(1), dist.transforms.OrderedTransform()
        ),
    )
    with pyro.plate("rows", 2):
        pyro.sample("simplex", dist.Dirichlet(torch.tensor([5.0, 1.0, 1.0])))
        pyro.sample("surface", nfp.UniformOnSurface(LpGauge(2.0), dim=3))
        pyro.sample("pair", dist.Beta(2.0, 2.0).expand([2]).to_event(1))
    pyro.sample("correlation", dist.LKJCholesky(3, 1.0))


SHAPES = {
    "positive": (),
    "order": (3,),
    "simplex": (2, 3),
    "surface": (2, 3),
    "pair": (2, 2),
    "correlation": (3, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", [nfp.AutoFlow, lambda model: nfp.AutoInjective(model, 2)])
def test_of_all_sites_of_a_guide(make):
    guide = make(sites).build()
    manual_seed(1)
    draws = guide.sample_posterior(guide.num_quantile_samples)
    manual_seed(1)
    found = guide.quantiles(LEVELS)
    manual_seed(1)
    median = guide.median()
    assert {name: tuple(value.shape) for name, value in median.items()} == SHAPES
    for name, shape in SHAPES.items():
        assert found[name].shape == (4, *shape)
        # Between two draws a level is interpolated, in the coordinates where they are single.
        torch.testing.assert_close(
            found[name], draws[name].quantile(LEVELS, dim=0), rtol=1e-3, atol=1e-3
        )
        torch.testing.assert_close(median[name], found[name][2])
        assert (found[name].diff(dim=0) >= 0).all()


@pytest.mark.slow
def test_draws_of_all_sites_lie_in_their_supports():
    guide = nfp.AutoFlow(sites).build()
    trace = pyro.poutine.trace(sites).get_trace()
    draws = guide.sample_posterior(5)
    for name, shape in SHAPES.items():
        assert draws[name].shape == (5, *shape)
        assert trace.nodes[name]["fn"].support.check(draws[name]).all()


@pytest.mark.parametrize(
    "levels",
    [
        0.5,
        None,
        "0.5",
        [],
        [1.5],
        [-0.1],
        [float("nan")],
        [[0.5]],
        ["a"],
        [True],
        torch.tensor(0.5),
        torch.ones(2, dtype=torch.bool),
        {0.5: 1},
        object(),
    ],
    ids=lambda levels: type(levels).__name__,
)
def test_levels_that_make_no_sense(levels):
    guide = nfp.AutoFlow(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
    with pytest.raises(OptionError, match="quantiles must be a list or vector of numbers"):
        guide.quantiles(levels)


def test_levels_of_every_kind():
    np = pytest.importorskip("numpy")
    guide = nfp.AutoFlow(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
    for levels in (
        [0, 1],
        (0.1, 0.9),
        np.array([0.1, 0.9]),
        [np.float32(0.1), torch.tensor(0.9)],
        torch.tensor([0.1, 0.9], dtype=torch.float64),
    ):
        assert guide.quantiles(levels)["x"].shape == (2,)

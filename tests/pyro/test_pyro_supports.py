"""Supports of flows whose values do not fill all of space."""

from __future__ import annotations

import math

import normflows as nf
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from support.models import coupling, spline
from support.seeds import manual_seed
from torch.distributions import biject_to, constraints

import normflows_injective.pyro as nfp
from normflows_injective.errors import (
    NonFiniteError,
    OffManifoldError,
    OptionError,
    UnsupportedModelError,
)
from normflows_injective.flows.surfaces.angular_spline import AngularSpline

PI = math.pi
# Of normflows' uniform base, by numpy's logarithm of a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")


class Sigmoid(nf.flows.Flow):
    """All of space to the unit cube, which the package knows nothing of."""

    def forward(self, z, context=None):
        x = z.sigmoid()
        return x, (x.log() + (1 - x).log()).sum(1)

    def inverse(self, x, context=None):
        return x.logit(), -(x.log() + (1 - x).log()).sum(1)


def affine(dim=2, scale=0.5, shift=1.0):
    layer = nf.flows.AffineConstFlow((dim,))
    with torch.no_grad():
        layer.s.fill_(math.log(scale))
        layer.t.fill_(shift)
    return layer


def angles(dim=2, index=1):
    return AngularSpline(dim, [index])


def normal(dim=2):
    return nf.distributions.DiagGaussian(dim, trainable=False)


def half_uniform(width=2 * PI):
    return nf.distributions.UniformGaussian(2, [1], torch.tensor([1.0, width]))


# Layers and base -> points inside, points outside.
CASES = {
    "logit": (
        [nf.transforms.Logit(alpha=0.0)],
        normal,
        [[0.5, 0.9]],
        [[1.1, 0.5], [0.5, -0.1]],
    ),
    "logit with margins": (
        [nf.transforms.Logit(alpha=0.05)],
        normal,
        [[-0.05, 1.05]],
        [[-0.06, 0.5]],
    ),
    "logit, then affine": (
        [nf.transforms.Logit(alpha=0.0), affine()],
        normal,
        [[1.01, 1.49]],
        [[0.9, 1.2], [1.2, 1.6]],
    ),
    "logit, then shift": (
        [nf.transforms.Logit(alpha=0.0), nf.transforms.Shift(3.0)],
        normal,
        [[-2.5, -2.9]],
        [[0.5, 0.5], [-3.1, -2.5]],
    ),
    "logit, then coupling": (
        [nf.transforms.Logit(alpha=0.0), coupling(2)],
        normal,
        [],
        [[50.0, 0.5], [-1.0, 0.5]],
    ),
    "logit, then permutation and spline": (
        [nf.transforms.Logit(alpha=0.0), nf.flows.Permute(2, "swap"), spline(2)],
        normal,
        [],
        [[50.0, 0.5], [0.5, -40.0]],
    ),
    "logit twice": (
        [nf.transforms.Logit(alpha=0.0), nf.transforms.Logit(alpha=0.0)],
        normal,
        [[0.51, 0.7]],
        [[0.4, 0.6], [0.6, 0.74]],
    ),
    "composite": (
        [nf.flows.Composite([nf.flows.Permute(2), nf.transforms.Logit(alpha=0.0)])],
        normal,
        [[0.5, 0.9]],
        [[1.1, 0.5]],
    ),
    "angles": ([angles()], half_uniform, [[9.0, 3.1]], [[0.0, 3.2], [0.0, -3.2]]),
    "wrap": (
        [nf.flows.PeriodicWrap([1], PI)],
        half_uniform,
        [[9.0, 3.1]],
        [[0.0, 3.2]],
    ),
    "wraps of two coordinates": (
        [nf.flows.PeriodicWrap([0], 1.0), nf.flows.PeriodicWrap([1], PI)],
        lambda: nf.distributions.base.Uniform((2,), -1.0, 1.0),
        [[0.9, 0.9]],
        [[1.1, 0.0], [0.0, 1.1]],
    ),
    "wrap with bounds by coordinate": (
        [nf.flows.PeriodicWrap([0, 1], torch.tensor([1.0, 2.0]))],
        normal,
        [[0.9, 1.9]],
        [[1.1, 0.0], [0.0, 2.1]],
    ),
    "shift of a circle": (
        [nf.flows.PeriodicShift([1], PI, 0.5)],
        half_uniform,
        [[9.0, 3.1]],
        [[0.0, 3.2]],
    ),
    "circular coupling": (
        [nf.flows.CircularCoupledRationalQuadraticSpline(2, 1, 8, [1], tail_bound=PI)],
        half_uniform,
        [[1.0, 3.1]],
        [[0.0, 3.2]],
    ),
    "circular coupling, the other half": (
        [
            nf.flows.CircularCoupledRationalQuadraticSpline(
                2, 1, 8, [1], tail_bound=PI, reverse_mask=True
            )
        ],
        half_uniform,
        [[1.0, 3.1]],
        [[0.0, 3.2]],
    ),
    "circular autoregression": (
        [nf.flows.CircularAutoregressiveRationalQuadraticSpline(2, 1, 8, [1], tail_bound=PI)],
        half_uniform,
        [[1.0, 3.1]],
        [[0.0, 3.2]],
    ),
    "uniform base": (
        [affine()],
        lambda: nf.distributions.base.Uniform((2,), 0.0, 1.0),
        [[1.01, 1.49]],
        [[0.9, 1.2]],
    ),
}


def law_of(name, validate=None):
    layers, make_base, inside, outside = CASES[name]
    law = nfp.FlowDistribution(nf.NormalizingFlow(make_base(), layers), validate_args=validate)
    return law, torch.tensor(inside).view(-1, 2), torch.tensor(outside)


@pytest.mark.parametrize("name", CASES)
def test_the_support_holds_what_can_be_drawn_and_nothing_else(name):
    law, inside, outside = law_of(name)
    draws = law.sample((200,))
    kept = law.support.check(draws)
    if name != "wrap with bounds by coordinate":  # whose base reaches beyond the circle
        assert kept.all()
    assert law.support.check(inside).all()
    assert not law.support.check(outside).any()
    assert law.log_prob(draws[kept].clone()).isfinite().all()
    # Bounds and layers broadcast over whatever the shape of the batch.
    assert law.support.check(draws.view(2, 100, 2)).shape == (2, 100)


@pytest.mark.parametrize("name", CASES)
def test_values_outside_have_no_density_and_are_refused_under_validation(name):
    strict, inside, outside = law_of(name, validate=True)
    with pytest.raises(OffManifoldError, match="lie outside the support"):
        strict.log_prob(outside)
    law = law_of(name, validate=False)[0]
    mixed = torch.cat([inside, outside]).requires_grad_()
    scores = law.log_prob(mixed)
    assert scores[len(inside) :].eq(-math.inf).all()
    assert scores[: len(inside)].isfinite().all()
    for bad in (math.nan, math.inf):
        assert law.log_prob(torch.full((1, 2), bad)).eq(-math.inf).all()
    if len(inside) and scores.requires_grad:
        total = scores[: len(inside)].sum()
        (gradient,) = torch.autograd.grad(total, mixed, allow_unused=True, materialize_grads=True)
        assert gradient.isfinite().all()


def test_faces_of_a_box_have_no_density():
    law = nfp.FlowDistribution(
        nf.NormalizingFlow(normal(), [nf.transforms.Logit(alpha=0.0)]), validate_args=False
    )
    faces = torch.tensor([[0.0, 0.5], [1.0, 0.5], [0.5, 0.5]])
    assert law.log_prob(faces).isneginf().tolist() == [True, True, False]


@pytest.mark.parametrize("name", CASES)
def test_charts_lead_from_all_of_space_to_the_support(name):
    law = law_of(name)[0]
    chart = biject_to(law.support)
    u = torch.randn(5, 2)
    x = chart(u)
    assert law.support.check(x).all()
    torch.testing.assert_close(chart.inv(x), u, rtol=1e-2, atol=1e-3)
    dense = torch.stack(
        [
            torch.autograd.functional.jacobian(lambda row: chart(row.unsqueeze(0))[0], row)
            for row in u
        ]
    )
    found = chart.log_abs_det_jacobian(u, x)
    torch.testing.assert_close(found, torch.linalg.slogdet(dense).logabsdet, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_density_integrates_to_one():
    """Over the support, by the midpoint rule on a grid that covers it."""
    flow = nf.NormalizingFlow(normal(), [nf.transforms.Logit(alpha=0.0), affine(), coupling(2)])
    law = nfp.FlowDistribution(flow.double(), validate_args=False)
    corners = flow.flows[2](torch.tensor([[1.0, 1.0], [1.5, 1.5]], dtype=torch.float64))[0]
    count = 400
    low, high = float(corners.min().detach()) - 2, float(corners.max().detach()) + 2
    cells = low + (high - low) * (torch.arange(count, dtype=torch.float64) + 0.5) / count
    grid = torch.cartesian_prod(cells, cells)
    mass = law.log_prob(grid).detach().exp().sum() * ((high - low) / count) ** 2
    assert float(mass) == pytest.approx(1.0, abs=0.02)


def test_the_support_follows_parameters_as_they_change():
    place = affine()
    law = nfp.FlowDistribution(nf.NormalizingFlow(normal(), [nf.transforms.Logit(0.0), place]))
    support = law.support
    point = torch.tensor([7.2, 7.3])
    assert not support.check(point)
    with torch.no_grad():
        place.t.fill_(7.0)
    assert support.check(point)


def test_no_question_initialises_a_layer():
    norm = nf.flows.ActNorm((2,))
    law = nfp.FlowDistribution(nf.NormalizingFlow(normal(), [nf.transforms.Logit(0.0), norm]))
    law.support.check(torch.rand(10, 2))
    assert not norm.data_dep_init_done.any()


def test_scalars():
    flow = nf.NormalizingFlow(normal(1), [nf.transforms.Logit(0.0), affine(1)])
    law = nfp.FlowDistribution(flow, event_dim=0, validate_args=False)
    assert law.support.check(torch.tensor([0.9, 1.2, 1.6])).tolist() == [False, True, False]
    assert law.log_prob(torch.tensor([0.9, 1.6])).eq(-math.inf).all()
    chart = biject_to(law.support)
    u = torch.randn(7)
    torch.testing.assert_close(chart.inv(chart(u)), u, rtol=1e-3, atol=1e-3)
    slope = torch.autograd.functional.jacobian(lambda u: chart(u).sum(), u)
    torch.testing.assert_close(chart.log_abs_det_jacobian(u, chart(u)), slope.log())
    assert law.support.check(chart(u)).all()


def test_contexts():
    layers = [nf.transforms.Logit(0.0), nf.flows.MaskedAffineAutoregressive(2, 8, 3)]
    flow = nf.ConditionalNormalizingFlow(normal(), layers)
    law = nfp.FlowDistribution(flow, context=torch.randn(4, 3))
    assert law.support.check(law.sample()).all()
    assert not law.support.check(torch.full((4, 2), 99.0)).any()


# What a caller says.


def test_a_support_that_was_given():
    cube = constraints.unit_interval
    for support in (cube, constraints.independent(cube, 1)):
        law = nfp.FlowDistribution(
            nf.NormalizingFlow(normal(), [Sigmoid()]), support=support, validate_args=False
        )
        assert law.support.event_dim == 1
        points = torch.tensor([[5.0, -3.0], [0.5, 0.5], [0.0, 0.5]])
        assert law.log_prob(points).isneginf().tolist() == [True, False, True]
        assert law.expand((3,)).support is law.support
    scalar = nf.NormalizingFlow(normal(1), [Sigmoid()])
    law = nfp.FlowDistribution(scalar, event_dim=0, support=cube, validate_args=False)
    assert law.log_prob(torch.tensor([0.5, 2.0])).isneginf().tolist() == [False, True]


@pytest.mark.parametrize(
    "support", [1, "unit", None, constraints.boolean, constraints.positive_definite, (0, 1)]
)
def test_supports_and_codomains_that_make_no_sense(support):
    if support is not None:
        with pytest.raises(OptionError, match="support must be a"):
            nfp.FlowDistribution(nf.NormalizingFlow(normal(), [Sigmoid()]), support=support)
        with pytest.raises(OptionError, match="codomain must be a"):
            nfp.FlowTransform(Sigmoid(), codomain=support)


def test_layers_that_nothing_is_known_of_say_what_to_do():
    law = nfp.FlowDistribution(nf.NormalizingFlow(normal(), [Sigmoid()]), validate_args=True)
    with pytest.raises(NonFiniteError, match=r"1 of 2 densities .* are NaN.*support="):
        law.log_prob(torch.tensor([[5.0, -3.0], [0.5, 0.5]]))


def test_layers_without_an_inverse_behind_a_box():
    layers = [nf.transforms.Logit(0.0), nf.flows.Planar((2,))]
    law = nfp.FlowDistribution(nf.NormalizingFlow(normal(), layers))
    x = law.rsample((3,))
    assert law.log_prob(x).isfinite().all()
    with pytest.raises(UnsupportedModelError, match=r"Planar.*Pass support="):
        law.log_prob(x.detach().clone())


# Transforms.


def test_codomains_and_domains_of_transforms():
    logit = nf.transforms.Logit(0.0)
    bounded = nfp.FlowTransform([logit, affine()])
    points = torch.tensor([[1.2, 1.3], [0.2, 1.3]])
    assert bounded.codomain.check(points).tolist() == [True, False]
    assert bounded.with_cache(0).codomain is bounded.codomain
    assert nfp.FlowTransform(nf.flows.Permute(2)).codomain.check(points).all()
    own = nfp.FlowTransform(Sigmoid(), codomain=constraints.unit_interval)
    assert own.codomain.check(points).tolist() == [False, False]
    back = nfp.FlowTransform(nf.flows.Reverse(logit))
    assert back.domain.check(points).tolist() == [False, False]
    assert back.domain.check(points / 10).all()
    assert back.codomain.check(points).all()
    law = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), bounded)
    assert law.support is bounded.codomain
    with pytest.raises(ValueError, match="support"):
        law.log_prob(points)


# Use.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logit, then affine", "angles", "uniform base", "logit twice"])
def test_guides_and_samplers_reach_a_bounded_prior(name):
    layers, make_base, _, _ = CASES[name]
    flow = nf.NormalizingFlow(make_base(), layers).requires_grad_(False).eval()

    def model():
        x = pyro.sample("x", nfp.FlowDistribution(flow))
        pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=torch.tensor(1.0))

    support = nfp.FlowDistribution(flow).support
    for guide in (infer.autoguide.AutoNormal(model), nfp.AutoFlow(model)):
        svi = infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), infer.Trace_ELBO())
        assert all(math.isfinite(svi.step()) for _ in range(5))
        assert support.check(guide()["x"])
    manual_seed(0)
    kernel = infer.NUTS(model, max_tree_depth=3)
    chain = infer.MCMC(kernel, num_samples=10, warmup_steps=10, disable_progbar=True)
    chain.run()
    assert support.check(chain.get_samples()["x"]).all()

"""Gradients along the path of a draw: unbiased by quadrature, without variance at the optimum."""

from __future__ import annotations

import copy
import math

import normflows as nf
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from support.comparison import close
from support.models import perturbed
from support.seeds import manual_seed

import normflows_injective.pyro as nfp
from normflows_injective.pyro.laws.pathwise import PathwiseFlow

pytestmark = pytest.mark.usefixtures("float64_by_default")

NODES, WEIGHTS = (torch.tensor(part) for part in np.polynomial.hermite_e.hermegauss(40))


def bent():
    """Two latents whose second hangs on the square of the first."""
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x[..., 1] - x[..., 0].square(), 0.7), obs=torch.tensor(0.5))


def log_joint(x):
    prior = dist.Normal(0.0, 1.0).log_prob(x).sum(-1)
    return prior + dist.Normal(x[..., 1] - x[..., 0].square(), 0.7).log_prob(torch.tensor(0.5))


def grid(dim):
    """Nodes (n, dim) and weights (n,) of the standard normal law."""
    z = torch.cartesian_prod(*[NODES] * dim).view(-1, dim)
    weights = torch.cartesian_prod(*[WEIGHTS / math.sqrt(2 * math.pi)] * dim).view(-1, dim)
    return z, weights.prod(1)


def gradients(objective, guide):
    guide.zero_grad()
    objective.backward()
    return torch.cat([p.grad.flatten() for p in guide.parameters() if p.grad is not None])


def drawn(model, guide, elbo=infer.Trace_ELBO, repeats=60, **options):
    """Gradients of the loss, one row for each of several batches of draws."""
    particles = {"num_particles": 200, "vectorize_particles": True, "max_plate_nesting": 0}
    loss = elbo(**(particles | options))
    return torch.stack(
        [-gradients(loss.differentiable_loss(model, guide), guide) for _ in range(repeats)]
    )


def assert_means(rows, expected):
    """Means of rows are as expected, within five standard errors of so many numbers."""
    error = rows.std(0) / math.sqrt(len(rows))
    assert float(((rows.mean(0) - expected).abs() / (error + 1e-9)).max()) < 5.0


def flow_guide(**options):
    manual_seed(1)
    guide = nfp.AutoFlow(bent, init_scale=0.7, guard=None, **options).build()
    return perturbed(guide, 0.1)


@pytest.mark.parametrize("path_gradient", [True, False])
def test_the_gradient_of_a_flow_is_that_of_quadrature(path_gradient):
    guide = flow_guide(path_gradient=path_gradient)
    assert isinstance(guide.get_posterior(), PathwiseFlow) == path_gradient
    z, weights = grid(2)
    theta, log_det = guide.transform.stack.push(z, None)
    expected = gradients((weights * (log_joint(theta) + log_det)).sum(), guide)
    assert_means(drawn(bent, guide), expected)


@pytest.mark.parametrize("path_gradient", [True, False])
@pytest.mark.parametrize("reverse", ["laplace", "learned"])
def test_the_gradient_of_a_sheet_is_that_of_quadrature(path_gradient, reverse):
    def network(rank, dim):
        # Wide reverse laws have gradients of heavy tails, which no mean of draws settles.
        linear = torch.nn.Linear(dim, 2 * rank)
        with torch.no_grad():
            linear.weight.mul_(0.2)
        return linear

    manual_seed(2)
    guide = nfp.AutoInjective(
        bent,
        1,
        noise="diagonal",
        reverse="laplace" if reverse == "laplace" else network,
        init_scale=0.7,
        guard=None,
        path_gradient=path_gradient,
    ).build()
    guide = perturbed(guide, 0.1)
    nodes, weights = grid(3)
    u, noise = nodes[:, :1], nodes[:, 1:] * guide.noise.log_scale.exp()
    e = guide.decoder(u) + noise
    law = guide.reverse(e, guide.decoder, guide.noise)
    bound = (
        log_joint(guide.frame.place(e))
        + law.log_prob(u)
        - dist.Normal(0.0, 1.0).log_prob(u).sum(-1)
        - guide.noise.log_prob(noise)
        + guide.frame.scale.log().sum()
    )
    assert_means(drawn(bent, guide), gradients((weights * bound).sum(), guide))


def test_extra_draws_of_the_reverse_model_leave_the_gradient_unbiased():
    rows = {}
    for path_gradient in (True, False):
        manual_seed(3)
        guide = nfp.AutoInjective(
            bent, 1, num_aux=2, init_scale=0.7, guard=None, path_gradient=path_gradient
        ).build()
        rows[path_gradient] = drawn(bent, perturbed(guide, 0.2), repeats=150)
    errors = [each.var(0) / len(each) for each in rows.values()]
    difference = (rows[True].mean(0) - rows[False].mean(0)).abs()
    assert float((difference / (errors[0] + errors[1] + 1e-18).sqrt()).max()) < 5.0


COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 2.0]], dtype=torch.float64)


def normal():
    pyro.sample("x", dist.MultivariateNormal(torch.ones(2), COVARIANCE))


def at_the_optimum(path_gradient):
    guide = nfp.AutoFlow(normal, path_gradient=path_gradient, guard=None).build()
    factor = torch.linalg.cholesky(COVARIANCE)
    place = guide.transform.stack.flows[-1]
    with torch.no_grad():
        place.loc.fill_(1.0)
        place.log_scale.copy_(factor.diagonal().log())
        place.below.copy_(factor / factor.diagonal().unsqueeze(1))
    return guide


@pytest.mark.parametrize("options", [{}, {"num_particles": 3, "vectorize_particles": False}])
@pytest.mark.parametrize(
    "elbo", [infer.Trace_ELBO, infer.TraceMeanField_ELBO, infer.TraceGraph_ELBO]
)
def test_no_variance_is_left_at_the_optimum(elbo, options):
    if elbo is infer.TraceGraph_ELBO:
        rows = [graph_gradients(at_the_optimum(path), options) for path in (True, False)]
    else:
        rows = [
            drawn(normal, at_the_optimum(path), elbo, repeats=3, **options)
            for path in (True, False)
        ]
    assert float(rows[0].abs().max()) < 1e-12
    assert float(rows[1].abs().max()) > 1e-3


def graph_gradients(guide, options):
    """This objective has no differentiable loss."""
    guide.zero_grad()
    infer.TraceGraph_ELBO(
        **{"num_particles": 3, **options, "max_plate_nesting": 0}
    ).loss_and_grads(normal, guide)
    return torch.cat([p.grad.flatten() for p in guide.parameters() if p.grad is not None])


def test_weights_of_importance_get_the_whole_gradient():
    """There the score has no mean zero: with it gone the gradient would be biased."""
    options = {"num_particles": 2, "vectorize_particles": True, "max_plate_nesting": 0}
    rows = []
    for path_gradient in (True, False):
        guide = flow_guide(path_gradient=path_gradient)
        manual_seed(5)
        guide.zero_grad()
        infer.RenyiELBO(alpha=0.0, **options).loss_and_grads(bent, guide)
        rows.append(torch.cat([p.grad.flatten() for p in guide.parameters()]))
    close(rows[0], rows[1], 1e-12)


def test_layers_without_an_inverse_are_differentiated_as_usual():
    guide = nfp.AutoFlow(bent, lambda dim: nf.flows.Planar((dim,))).build()
    assert not isinstance(guide.get_posterior(), PathwiseFlow)
    assert drawn(bent, guide, repeats=1).isfinite().all()


def test_replaced_parameters_are_seen():
    guide = flow_guide()
    drawn(bent, guide, repeats=1)
    place = guide.transform.stack.flows[-1]
    for change in (
        lambda: place.loc.data.add_(0.3),
        lambda: setattr(place, "loc", torch.nn.Parameter(place.loc.detach() - 1.0)),
    ):
        change()
        with torch.enable_grad():
            law = guide.get_posterior()
            value = law.rsample()
            parts = law.score_parts(value)
        close(parts.entropy_term.detach(), parts.log_prob.detach(), 1e-10)
    copied = copy.deepcopy(guide)
    with torch.no_grad():
        place.loc.add_(1.0)
    law = copied.get_posterior()
    value = law.rsample()
    parts = law.score_parts(value)
    close(parts.entropy_term.detach(), parts.log_prob.detach(), 1e-10)

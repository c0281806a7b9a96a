"""What draws remember: they are scored without an inverse, and nothing is scored out of date."""

from __future__ import annotations

import math

import normflows as nf
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from support.dense import dense_jacobian
from support.models import base, coupling, perturbed, spline
from support.pyro_registry import LAWS, build
from support.seeds import manual_seed
from torch import nn

import normflows_injective as nfi
import normflows_injective.pyro as nfp
from normflows_injective.flows.layer_stack import LayerStack

TRAINED = [name for name, case in LAWS.items() if case.has_rsample and case.scores_others]


@pytest.fixture(params=TRAINED)
def name(request):
    return request.param


@pytest.fixture
def inverses(monkeypatch):
    """A list that grows with every inverse of a stack of layers."""
    calls, pull = [], LayerStack.pull
    monkeypatch.setattr(LayerStack, "pull", lambda *args: calls.append(1) or pull(*args))
    return calls


# The memory of draws.


@pytest.mark.parametrize("wrap", ["plain", "expand", "to_event", "mask"])
def test_a_draw_is_scored_without_an_inverse(name, wrap, inverses):
    law = LAWS[name].law(build(name)).expand((3,))
    law = {
        "plain": law,
        "expand": law.expand((2, 3)),
        "to_event": law.to_event(1),
        "mask": law.mask(True),
    }[wrap]
    x = law.rsample()
    score = law.log_prob(x)
    assert not inverses
    again = law.log_prob(x.detach().clone())
    assert bool(inverses) == LAWS[name].has_inverse
    torch.testing.assert_close(score, again, rtol=5e-3, atol=5e-3)


@pytest.mark.slow
def test_a_learned_manifold_scores_its_draws_without_the_encoder(monkeypatch):
    model = build("learned")
    law = LAWS["learned"].law(model)
    monkeypatch.setattr(model.flows[-1].encoder, "forward", None)
    assert law.log_prob(law.rsample((4,))).isfinite().all()


def test_a_draw_that_was_changed_in_place_is_scored_anew(name):
    law = LAWS[name].law(build(name)).expand((3,))
    other = law.sample()
    x = law.rsample()
    before = law.log_prob(x)
    with torch.no_grad():
        x.copy_(other)
    found = law.log_prob(x)
    assert (found - before).abs().max() > 1e-3
    torch.testing.assert_close(found, law.log_prob(other), rtol=1e-5, atol=1e-5)


def test_only_the_very_tensor_is_known(name):
    law = LAWS[name].law(build(name)).expand((3,))
    x = law.rsample()
    law.rsample()
    assert law.log_prob(x).isfinite().all()
    other = x.clone() if LAWS[name].event_shape == (3,) else x + 0.1
    fresh = LAWS[name].law(build(name)).expand((3,)).log_prob(other.detach())
    torch.testing.assert_close(law.log_prob(other), fresh, rtol=5e-3, atol=5e-3)


def test_draws_in_inference_mode(name):
    law = LAWS[name].law(build(name)).expand((3,))
    with torch.inference_mode():
        x = law.sample()
        score = law.log_prob(x)
    torch.testing.assert_close(law.log_prob(x.clone()), score, rtol=5e-3, atol=5e-3)


# Data around a change of the parameters.


@pytest.mark.parametrize("grad", [True, False])
def test_the_same_data_are_scored_by_the_present_parameters(name, grad):
    module = build(name)
    law = LAWS[name].law(module).expand((3,))
    data = LAWS[name].law(build(name, 7)).expand((3,)).sample()
    with torch.set_grad_enabled(grad):
        before = law.log_prob(data)
        perturbed(module, 0.1)
        after = law.log_prob(data)
        fresh = LAWS[name].law(module).expand((3,)).log_prob(data.clone())
    assert (before - after).abs().max() > 1e-5
    torch.testing.assert_close(after, fresh)


@pytest.mark.parametrize(
    "options", [{}, {"foreach": True}, {"fused": True}], ids=["plain", "foreach", "fused"]
)
def test_a_draw_is_scored_anew_after_a_step(name, options):
    module = build(name)
    law = LAWS[name].law(module).expand((3,))
    x = law.rsample()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02, **options)
    law.log_prob(x).sum().backward()
    optimizer.step()
    fresh = LAWS[name].law(module).expand((3,)).log_prob(x.detach().clone())
    torch.testing.assert_close(law.log_prob(x), fresh, rtol=5e-3, atol=5e-3)


def test_a_draw_is_scored_anew_after_a_change_that_leaves_no_version(name):
    module = build(name)
    law = LAWS[name].law(module).expand((3,))
    x = law.rsample()
    for parameter in module.parameters():
        parameter.data.mul_(1.1).add_(0.01)
    fresh = LAWS[name].law(module).expand((3,)).log_prob(x.detach().clone())
    torch.testing.assert_close(law.log_prob(x), fresh, rtol=5e-3, atol=5e-3)


def test_training_as_a_likelihood_with_one_tensor_and_one_law(name):
    """Every step has the loss that a law built anew has, and no graph is met twice."""
    module = build(name)
    kept = LAWS[name].law(module).expand((3,))
    data = LAWS[name].law(build(name, 7)).expand((3,)).sample()
    expected = []

    def model():
        pyro.module("module", module)
        with torch.no_grad():
            fresh = LAWS[name].law(module).expand((3,)).log_prob(data.clone())
        expected.append(-float(fresh.sum()))
        with pyro.plate("rows", 3):
            pyro.sample("x", kept, obs=data)

    svi = infer.SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.01}), infer.Trace_ELBO())
    losses = [svi.step() for _ in range(4)]
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-3)
    assert len(set(losses)) == 4


# Gradients.


def differences(function, parameter, step=1e-6):
    """Central differences of a number by a few entries of a parameter."""
    flat, gradients = parameter.data.view(-1), {}
    for index in range(0, len(flat), max(1, len(flat) // 3)):
        start = float(flat[index])
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                flat[index] = start + sign * step
            values.append(float(function().detach()))
        with torch.no_grad():
            flat[index] = start
        gradients[index] = (values[0] - values[1]) / (2 * step)
    return gradients


@pytest.mark.slow
@pytest.mark.parametrize("with_graph", [False, True])
def test_scores_of_draws_have_the_gradient_of_finite_differences(name, with_graph):
    module = build(name).double()
    law = LAWS[name].law(module)
    if isinstance(law, dist.TransformedDistribution):
        latent = law.base_dist.event_shape
        normal = dist.Normal(torch.zeros(latent).double(), 1.0).to_event(1)
        law = dist.TransformedDistribution(normal, module)
    law = law.expand((3,))

    def score():
        manual_seed(3)
        x = law.rsample() if with_graph else fixed
        return law.log_prob(x).sum()

    with torch.no_grad():
        fixed = law.sample()
    score().backward()
    checked = 0
    for parameter in module.parameters():
        if parameter.grad is None:
            continue
        for index, expected in differences(score, parameter).items():
            found = float(parameter.grad.view(-1)[index])
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
            checked += 1
    assert checked >= 2


@pytest.mark.slow
def test_mixtures_with_trained_weights_use_the_score_function():
    """The gradient of E[(x - 1)^2] by the weights, beside its closed form."""
    manual_seed(0)
    mixture = nf.distributions.GaussianMixture(2, 1, loc=[[-1.0], [2.0]], trainable=True)
    flow = nf.NormalizingFlow(mixture, [nf.flows.AffineConstFlow((1,))])
    law = nfp.FlowDistribution(flow.double())
    assert not law.has_rsample
    assert not law.sample((2,)).requires_grad
    assert not law.to_event(0).expand((3,)).has_rsample

    def model():
        with pyro.plate("rows", 4000):
            pyro.factor("cost", -0.25 * (pyro.sample("x", law.mask(False))[:, 0] - 1.0) ** 2)

    def guide():
        pyro.module("flow", flow)
        with pyro.plate("rows", 4000):
            pyro.sample("x", nfp.FlowDistribution(flow))

    estimates = []
    for _ in range(20):
        flow.zero_grad()
        infer.Trace_ELBO().loss_and_grads(model, guide)
        estimates.append(mixture.weight_scores.grad.flatten() / 4000)
    estimates = torch.stack(estimates)
    # E[(x - 1)^2] / 4 + E[log q] by the weights, with quadrature; the model has no prior.
    scores = mixture.weight_scores.detach().clone().requires_grad_()
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    scale = mixture.log_scale.detach().exp().flatten()
    each = dist.Normal(torch.tensor([-1.0, 2.0]).double(), scale).log_prob(grid[:, None])
    log_q = (each + scores.log_softmax(1)).logsumexp(1)
    integrand = log_q.exp() * (0.25 * (grid - 1) ** 2 + log_q)
    expected = torch.autograd.grad(torch.trapezoid(integrand, grid), scores)[0].flatten()
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert ((estimates.mean(0) - expected).abs() < 4 * error).all()
    assert (expected.abs() > 10 * error).all()


def test_parameters_of_the_base_that_are_thawed_later_count():
    mixture = nf.distributions.GaussianMixture(2, 2, trainable=True)
    flow = nf.NormalizingFlow(mixture, [nf.flows.AffineConstFlow((2,))])
    mixture.requires_grad_(False)
    assert nfp.FlowDistribution(flow).has_rsample
    mixture.requires_grad_(True)
    assert not nfp.FlowDistribution(flow).has_rsample


# Precision.


def stacks():
    autoregressive = nf.flows.MaskedAffineAutoregressive(3, 8)
    return {
        "mixed": [coupling(3), nf.flows.Permute(3), spline(3), nf.flows.LULinearPermute(3)],
        "autoregressive": [autoregressive, nf.flows.Permute(3, "swap"), nf.flows.ActNorm((3,))],
    }


@pytest.mark.parametrize("kind", stacks())
def test_double_models_agree_with_dense_change_of_variables(kind):
    manual_seed(0)
    flow = nf.NormalizingFlow(base(3), stacks()[kind]).double()
    flow.flows[-1](torch.randn(50, 3).double())  # ActNorm starts by its first batch.
    perturbed(flow, 0.05)
    law = nfp.FlowDistribution(flow)
    x = law.rsample((5,))
    assert x.dtype == law.log_prob(x).dtype == torch.float64

    def decode(z):
        for layer in flow.flows:
            z = layer(z)[0]
        return z

    with torch.no_grad():
        z = torch.randn(5, 3).double()
        y = decode(z)
    volume = torch.linalg.slogdet(dense_jacobian(decode, z).detach())[1]
    expected = dist.Normal(0.0, 1.0).expand((5, 3)).to_event(1).log_prob(z) - volume
    torch.testing.assert_close(law.log_prob(y), expected, rtol=0, atol=1e-9)
    transform = nfp.FlowTransform(list(flow.flows))
    normal = dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)
    other = dist.TransformedDistribution(normal, transform)
    torch.testing.assert_close(other.log_prob(y), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(law.log_prob(x), law.log_prob(x.detach().clone()))


def test_contexts_that_are_missing_or_superfluous_are_refused():
    with pytest.raises(nfi.errors.ContextError):
        nfp.FlowDistribution(build("conditional"))
    with pytest.raises(nfi.errors.ContextError):
        nfp.FlowDistribution(build("class_conditional"))
    with pytest.raises(nfi.errors.ContextError):
        nfp.FlowDistribution(build("affine"), context=torch.ones(3, 2))
    with pytest.raises(nfi.errors.ContextError):
        nfp.FlowTransform(nf.flows.MaskedAffineAutoregressive(2, 8, context_features=4))
    with pytest.raises(nfi.errors.OptionError):
        nfp.FlowDistribution(nn.Linear(2, 2))

"""One model class with and without a context."""

from __future__ import annotations

import normflows as nf
import pytest
import torch
from support.dense import dense_log_volume
from support.models import base, mlp_injection, spline
from torch import nn

import normflows_injective as nfi
from normflows_injective import errors
from normflows_injective.host.context import needs_context, takes_context


def conditional_base():
    return nf.distributions.base.ConditionalDiagGaussian(2, nn.Linear(3, 4))


def conditional_stack():
    return [
        spline(num_context_channels=3),
        nf.flows.LULinearPermute(2),
        mlp_injection(context_dim=3),
        nf.flows.MaskedAffineAutoregressive(5, 8, context_features=3),
        nf.flows.LULinearPermute(5),
    ]


@pytest.fixture
def model():
    return nfi.InjectiveNormalizingFlow(conditional_base(), conditional_stack()).double()


@pytest.fixture
def x():
    return torch.randn(4, 5, dtype=torch.float64)


@pytest.fixture
def context():
    return torch.randn(4, 3, dtype=torch.float64)


@pytest.mark.slow
def test_every_method_takes_a_context_and_uses_it(model, x, context):
    z = model.inverse(x, context=context)
    results = {
        "inverse": z,
        "forward": model.forward(z, context=context),
        "forward_and_log_det": model.forward_and_log_det(z, context=context)[1],
        "inverse_and_log_det": model.inverse_and_log_det(x, context=context)[1],
        "log_prob": model.log_prob(x, context=context),
        "project": model.project(x, context=context),
        "reconstruction_error": model.reconstruction_error(x, context=context),
        "encode": model.encode(x, context=context),
        "decode": model.decode(z, context=context),
    }
    others = {
        name: getattr(model, name)(
            z if name in ("forward", "forward_and_log_det", "decode") else x, context=context + 1
        )
        for name in results
    }
    for name, result in results.items():
        other = others[name][1] if isinstance(others[name], tuple) else others[name]
        assert not torch.allclose(result, other), name


@pytest.mark.slow
def test_log_det_against_the_dense_jacobian(model, x, context):
    z = model.inverse(x, context)
    for row in range(len(z)):
        condition = context[row : row + 1]
        expected = dense_log_volume(lambda s, c=condition: model.forward(s, c), z[row : row + 1])
        actual = model.forward_and_log_det(z[row : row + 1], condition)[1]
        torch.testing.assert_close(actual, expected)


@pytest.mark.slow
def test_training_and_sampling(model, x, context):
    model.likelihood = nfi.SurrogateLikelihood(num_probes=2)  # as many as dimensions: no noise
    loss = model.forward_kld(x, context)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(loss, model.loss_terms(x, context).loss.mean())
    samples, log_q = model.sample(4, context=context)
    z = model.encode(samples, context)
    assert samples.shape == (4, 5)
    assert log_q.shape == (4,)
    assert z.shape == (4, 2)


def test_samples_of_one_context_row_do_not_share_their_noise(model, context):
    samples, _ = model.sample(4, context=context[:1].expand(4, -1))
    assert torch.unique(samples, dim=0).shape[0] == 4


def test_a_missing_context_is_an_error_not_an_unconditional_answer(model, x):
    for call in (model.forward_kld, model.log_prob, model.inverse, model.project):
        with pytest.raises(errors.ContextError, match="was built with a context, but none came"):
            call(x)
    with pytest.raises(errors.ContextError, match="none came"):
        model.sample(4)


def test_a_context_of_another_length(model, x, context):
    for wrong in (context[:1], context[:3], torch.cat([context, context])):
        with pytest.raises(errors.ContextError, match="one row per sample, 4 in all"):
            model.log_prob(x, wrong)
        with pytest.raises(errors.ContextError, match="one row per sample, 4 in all"):
            model.sample(4, context=wrong)


def test_a_context_of_another_width():
    ours = nfi.InjectiveNormalizingFlow(base(2), [mlp_injection(context_dim=3)])
    with pytest.raises(errors.ContextError, match=r"context of shape \(4, 3\), got one of .*4, 2"):
        ours.forward_kld(torch.randn(4, 5), torch.randn(4, 2))


def test_a_conditional_flow_inside_a_wrapper_without_the_keyword_is_refused():
    inner = nf.flows.MaskedAffineAutoregressive(5, 8, context_features=3)
    for wrapper in (nf.flows.Reverse(inner), nf.flows.Composite([inner])):
        with pytest.raises(
            errors.UnsupportedLayerError, match="has no keyword context, but holds"
        ):
            nfi.InjectiveNormalizingFlow(base(2), [mlp_injection(), wrapper])


class Inherited(nf.flows.MaskedAffineAutoregressive):
    """A user's subclass that inherits the call of normflows."""


class Own(nf.flows.Flow):
    """A user's flow that brings its own call."""

    def forward(self, z, context=None):
        return z, z.new_zeros(len(z))


def test_subclasses_of_the_hosts_flows():
    assert needs_context(Inherited(2, 4, context_features=3))
    assert not takes_context(Inherited(2, 4))
    assert takes_context(Own())
    assert not needs_context(Own())


def test_composite_in_a_host_model_asks_for_its_context(x):
    composite = nfi.flows.InjectiveComposite([mlp_injection(context_dim=3)])
    host = nf.ConditionalNormalizingFlow(base(2), [composite]).double()
    with pytest.raises(errors.ContextError, match="none came"):
        host.log_prob(x)


@pytest.mark.parametrize("width", [4, 6])
def test_foreign_conditional_networks_are_tried_with_the_first_context(width, context):
    """Without a context nothing could be tried at construction."""
    injection = nfi.flows.FreeFormInjection(Foreign(), nn.Linear(2, 5))
    ours = nfi.InjectiveNormalizingFlow(base(2), [injection]).double()
    with pytest.raises(
        errors.ShapeError, match=rf"x must have shape \(B, 5\), got \(4, {width}\)"
    ):
        ours.log_prob(torch.randn(4, width, dtype=torch.float64), context)
    square = nfi.flows.FreeFormInjection(Foreign(), nn.Linear(2, 2))
    ours = nfi.InjectiveNormalizingFlow(base(2), [square]).double()
    with pytest.raises(errors.NotInjectiveError, match="must raise the dimension"):
        ours.sample(4, context=context)


def test_a_context_that_is_no_tensor(model, x):
    with pytest.raises(errors.ContextError, match="must be a torch.Tensor, got list"):
        model.log_prob(x, [[1.0, 2.0, 3.0]] * 4)


def test_a_superfluous_context():
    ours = nfi.InjectiveNormalizingFlow(base(2), [spline(), mlp_injection()])
    with pytest.raises(errors.ContextError, match="no base, flow or network of this model takes"):
        ours.log_prob(torch.randn(4, 5), torch.randn(4, 3))


def test_a_context_that_is_not_finite(model, x, context):
    context[1, 2] = float("nan")
    with pytest.raises(errors.NonFiniteError, match=r"context has 1 of 12 .* index \[1, 2\]"):
        model.forward_kld(x, context)


def test_context_goes_only_where_it_is_taken(x, context):
    """normflows' spline has the keyword always, and fails if it was not built for a context."""
    flows = [
        spline(),
        nf.flows.LULinearPermute(2),
        mlp_injection(context_dim=3),
        nf.flows.Permute(5),
    ]
    ours = nfi.InjectiveNormalizingFlow(base(2), flows).double()
    assert torch.isfinite(ours.forward_kld(x, context))
    assert ours.sample(4, context=context)[0].shape == (4, 5)


@pytest.mark.parametrize("labels", ["integers", "one_hot"])
def test_class_conditional_base(labels, x):
    y = torch.tensor([0, 1, 2, 0])
    y = y if labels == "integers" else nn.functional.one_hot(y, 3).double()
    q0 = nf.distributions.ClassCondDiagGaussian(2, 3)
    ours = nfi.InjectiveNormalizingFlow(q0, [mlp_injection()]).double()
    ours.forward_kld(x, y).backward()
    assert ours.sample(4, context=y)[0].shape == (4, 5)
    with pytest.raises(
        errors.ContextError, match="ClassCondDiagGaussian was built with a context"
    ):
        ours.log_prob(x)


class Foreign(nn.Module):
    """A user's own encoder with a required context."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 2)

    def forward(self, x, context):
        return self.linear(torch.cat([x, context], dim=1))


def test_foreign_networks_by_their_signature(x, context):
    injection = nfi.flows.FreeFormInjection(Foreign(), nn.Linear(2, 5))
    ours = nfi.InjectiveNormalizingFlow(base(2), [injection]).double()
    assert torch.isfinite(ours.forward_kld(x, context))
    with pytest.raises(errors.ContextError, match="none came"):
        ours.forward_kld(x)


@pytest.mark.slow
def test_context_gradient_and_inference_mode(model, x, context):
    context.requires_grad_()
    model.forward_kld(x, context).backward()
    assert context.grad is not None
    with torch.inference_mode():
        assert torch.isfinite(model.forward_kld(x.clone(), context.detach().clone()))


@pytest.mark.parametrize(
    ("component", "takes", "needs"),
    [
        (lambda: nn.Linear(2, 2), False, False),
        (lambda: spline(), False, False),
        (lambda: spline(num_context_channels=3), True, True),
        (lambda: nf.flows.LULinearPermute(2), False, False),
        (lambda: nf.flows.MaskedAffineAutoregressive(2, 4), False, False),
        (lambda: nf.flows.MaskedAffineAutoregressive(2, 4, context_features=3), True, True),
        (lambda: nf.distributions.DiagGaussian(2), False, False),
        (lambda: nf.distributions.GlowBase((2, 1, 1)), False, False),
        (lambda: nf.distributions.GlowBase((2, 1, 1), num_classes=3), True, True),
        (lambda: conditional_base(), True, True),
        (lambda: nf.nets.ResidualNet(2, 2, 4, context_features=3), True, True),
        (lambda: nfi.nets.SmoothMLP(2, 2), False, False),
        (lambda: nfi.nets.SmoothMLP(2, 2, context_dim=1), True, True),
        (lambda: Foreign(), True, True),
    ],
)
def test_who_takes_and_who_needs_a_context(component, takes, needs):
    assert takes_context(component()) == takes
    assert needs_context(component()) == needs

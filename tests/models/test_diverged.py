"""A model whose parameters are no numbers says so, wherever it is asked."""

from __future__ import annotations

import normflows as nf
import pytest
import torch
from support.models import base, mlp_injection, spline

import normflows_injective as nfi
from normflows_injective.errors import NonFiniteError
from normflows_injective.modules.diverged import check_results

CALLS = {
    "log_prob": lambda model, x, z: model.log_prob(x),
    "sample": lambda model, x, z: model.sample(4),
    "sample without density": lambda model, x, z: model.sample(4, log_prob=False),
    "project": lambda model, x, z: model.project(x),
    "encode": lambda model, x, z: model.encode(x),
    "decode": lambda model, x, z: model.decode(z),
    "forward": lambda model, x, z: model.forward(z),
    "inverse": lambda model, x, z: model.inverse(x),
    "forward_and_log_det": lambda model, x, z: model.forward_and_log_det(z),
    "inverse_and_log_det": lambda model, x, z: model.inverse_and_log_det(x),
    "reconstruction_error": lambda model, x, z: model.reconstruction_error(x),
    "loss_terms": lambda model, x, z: model.loss_terms(x),
    "forward_kld": lambda model, x, z: model.forward_kld(x),
}


def build():
    flows = [nf.flows.AffineConstFlow((2,)), mlp_injection(), nf.flows.AffineConstFlow((5,))]
    return nfi.InjectiveNormalizingFlow(base(2), flows)


def parameters_used(call):
    """Names of parameters that the result hangs on."""
    model = build()
    x, z = torch.randn(4, 5), torch.randn(4, 2)
    result = call(model, x, z)
    tensors = result if isinstance(result, tuple) else (result,)
    total = sum(t.sum() for t in tensors if t is not None)
    total.backward()
    return [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_method_names_the_parameter(call, value):
    for name in parameters_used(call):
        model = build().eval()
        with torch.no_grad():
            model.get_parameter(name).flatten()[0] = value
        x, z = torch.randn(4, 5), torch.randn(4, 2)
        with torch.no_grad():
            try:
                result = call(model, x, z)
            except NonFiniteError as error:
                message = str(error)
            else:
                message = None
        if message is not None:
            assert f"The parameter {name} has 1 of" in message or "training term" in message, name
            continue
        # A bounded activation forgets an infinite weight, but NaN is never forgotten.
        assert value == float("inf"), name
        tensors = result if isinstance(result, tuple) else (result,)
        assert all(bool(t.isfinite().all()) for t in tensors if t is not None), name


def test_arguments_outside_the_domain_are_named_though_the_parameters_are_finite():
    class Root(nf.flows.Flow):
        def forward(self, z):
            return z.square(), z.abs().mul(2).log().sum(1)

        def inverse(self, x):
            return x.sqrt(), -x.sqrt().mul(2).log().sum(1)

    model = nfi.InjectiveNormalizingFlow(base(2), [Root(), nfi.flows.Pad(2, 3)])
    with pytest.raises(NonFiniteError, match="outside the domain of a layer"):
        model.log_prob(-torch.ones(4, 3))


def test_densities_of_zero_are_answers():
    class Box(nf.distributions.BaseDistribution):
        def forward(self, num_samples=1):
            return torch.rand(num_samples, 2), torch.zeros(num_samples)

        def log_prob(self, z):
            return torch.where(((z >= 0) & (z <= 1)).all(1), 0.0, -torch.inf)

    model = nfi.InjectiveNormalizingFlow(Box(), [nfi.flows.Pad(2, 3)])
    x = torch.tensor([[0.5, 0.5, 0.0], [2.0, 0.5, 0.0]])
    assert model.log_prob(x).isneginf().tolist() == [False, True]


def test_infinite_buffers_are_no_fault():
    net = torch.nn.Linear(2, 2)
    net.register_buffer("mask", torch.tensor([-torch.inf, 0.0]))
    check_results(net, [torch.tensor([-torch.inf])])
    net.mask[1] = torch.nan
    with pytest.raises(NonFiniteError, match="The buffer mask has 1 of 2 values NaN"):
        check_results(net, [torch.tensor([torch.nan])])


def test_transforms_of_torch_pass_through_the_check():
    model = nfi.InjectiveNormalizingFlow(base(2), [spline(), mlp_injection()]).double().eval()
    z = torch.randn(4, 2, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: model.decode(row[None])[0]))
    forward = torch.func.jacfwd(model.decode)
    assert torch.func.jacrev(model.decode)(z).shape == (4, 5, 4, 2)
    assert forward(z).shape == (4, 5, 4, 2)
    assert jacobian(z).shape == (4, 5, 2)

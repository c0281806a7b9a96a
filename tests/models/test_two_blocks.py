"""Oracle 20: a model of two injections is one map, and trains (arXiv 2306.01843)."""

import normflows as nf
import pytest
import torch
from support.dense import dense_jacobian
from support.geometry import gram_log_volume, seeded, tanh_pair
from support.gradients import assert_gradients_close, gradients

import normflows_injective as nfi
from normflows_injective.volume.estimators import ESTIMATORS


def two_blocks(estimator: str, num_probes: int = 2) -> nfi.InjectiveNormalizingFlow:
    """R^2 -> R^4 -> R^6, with a trainable base."""
    blocks = [
        nfi.flows.FreeFormInjection(*tanh_pair(high, low, "cpu", torch.float64))
        for low, high in ((2, 4), (4, 6))
    ]
    base = nf.distributions.DiagGaussian(2).double()
    likelihood = nfi.SurrogateLikelihood(estimator=estimator, num_probes=num_probes)
    return nfi.InjectiveNormalizingFlow(base, blocks, likelihood)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@seeded(202)
def test_oracle_20_two_blocks_train_one_step(estimator):
    """Every parameter of both blocks and of the base gets a gradient, and the loss falls."""
    model = two_blocks(estimator)
    x = torch.randn(32, 6, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    before = model.forward_kld(x)
    before.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name
    error = model.reconstruction_error(x).mean().detach()
    optimizer.step()
    assert model.reconstruction_error(x).mean().detach() < error


@seeded(203)
def test_oracle_20_two_blocks_have_one_loss():
    """The loss is that of the composed maps: one reconstruction, one trace, one log-volume."""
    model = two_blocks("encoder")
    x = torch.randn(5, 6, dtype=torch.float64)
    first, second = model.flows
    parameters = list(model.parameters())

    def encode(x):
        return first.encoder(second.encoder(x))

    def decode(z):
        return second.decoder(first.decoder(z))

    z = encode(x)
    f, g = dense_jacobian(encode, x), dense_jacobian(decode, z)
    trace = torch.einsum("bij,bji->b", f, g.detach())
    log_prob = model.q0.log_prob(z)
    error = (x - decode(z)).square().sum(1)
    expected = (10 * error - log_prob - trace).mean()
    loss = model.forward_kld(x)
    torch.testing.assert_close(loss, expected)
    assert_gradients_close(gradients(loss, parameters), gradients(expected, parameters), 1e-10)
    torch.testing.assert_close(model.log_prob(x), log_prob - gram_log_volume(g))
    # Per-layer log-volumes do not add up to the joint one.
    inner = gram_log_volume(dense_jacobian(first.decoder, z))
    outer = gram_log_volume(dense_jacobian(second.decoder, first.decoder(z)))
    assert (inner + outer - gram_log_volume(g)).abs().min() > 1e-3


@pytest.mark.parametrize("num_probes", [1, 2])
@seeded(204)
def test_oracle_20_probes_reach_a_model(num_probes):
    """Two draws of the loss agree iff there are as many probes as latent dimensions."""
    model = two_blocks("encoder", num_probes)
    x = torch.randn(5, 6, dtype=torch.float64)
    first, second = (model.loss_terms(x).surrogate.detach() for _ in range(2))
    assert torch.allclose(first, second) == (num_probes == 2)

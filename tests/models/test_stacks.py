"""Training in normflows' loop on a curved surface whose entropy is known."""

from __future__ import annotations

import math

import normflows as nf
import pytest
import torch
from support.manifolds import CurvedSurface
from support.models import base
from support.seeds import seeded_generator

import normflows_injective as nfi

SURFACE = CurvedSurface()
TEST_SAMPLES = 20_000


def pair(data_dim, latent_dim):
    return nfi.flows.FreeFormInjection(*nfi.nets.mlp_autoencoder(data_dim, latent_dim, (64, 64)))


def latent_block():
    flows = []
    for _ in range(2):
        flows += [
            nf.flows.CoupledRationalQuadraticSpline(2, 1, 32, tail_bound=4.0),
            nf.flows.LULinearPermute(2),
        ]
    return flows


def ambient_block():
    flows = []
    for _ in range(2):
        net = nf.nets.MLP([3, 32, 32, 4], init_zeros=True)
        flows += [nf.flows.AffineCouplingBlock(net), nf.flows.LULinearPermute(5)]
    return flows


STACKS = {
    "injection": (lambda: [pair(5, 2)], 2500),
    "latent": (lambda: [*latent_block(), pair(5, 2)], 1500),
    "ambient": (lambda: [pair(5, 2), *ambient_block()], 2000),
    "two_injections": (lambda: [pair(3, 2), pair(5, 3)], 2000),
}


def train(model, steps):
    """The loop of normflows' README, with a one-cycle rate and clipping."""
    x = SURFACE.sample(100_000, seed=1)
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        loss = model.forward_kld(x[torch.randint(len(x), (512,))])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return loss.item()


def excess_nll(model):
    """Mean of model minus true NLL on a test set, with its standard error.

    The true NLL is known point by point and its mean is the entropy, so that the difference is the
    model's distance from the entropy without the sampling error of the test set.
    """
    z = torch.randn(TEST_SAMPLES, 2, generator=seeded_generator(2)).double()
    x = SURFACE.decode(z).float()
    with torch.no_grad():
        difference = -model.log_prob(x).double() - SURFACE.exact_nll(z)
        error = model.reconstruction_error(x).mean().item()
    return difference.mean().item(), difference.std().item() / math.sqrt(TEST_SAMPLES), error


@pytest.mark.slow
def test_the_entropy_is_that_of_the_samples():
    """Quadrature against the sample mean of the closed-form NLL, within four standard errors."""
    z = torch.randn(200_000, 2, generator=seeded_generator(3)).double()
    nll = SURFACE.exact_nll(z)
    standard_error = nll.std().item() / math.sqrt(len(nll))
    assert abs(nll.mean().item() - SURFACE.entropy()) < 4 * standard_error
    assert abs(SURFACE.entropy(120) - SURFACE.entropy(200)) < 1e-4
    torch.testing.assert_close(
        nfi.volume.log_volume(SURFACE.decode, z[:50]), SURFACE.log_volume(z[:50])
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKS)
def test_training_comes_within_a_hundredth_of_a_nat_of_the_entropy(name):
    build, steps = STACKS[name]
    model = nfi.InjectiveNormalizingFlow(base(2), build())
    train(model, steps)
    excess, standard_error, reconstruction = excess_nll(model)
    # The excess has a standard error of about 3e-4, from 20000 points.
    assert standard_error < 1e-3
    assert abs(excess) < 0.01
    assert reconstruction < 1e-3


class PerLayerSums(nfi.InjectiveNormalizingFlow):
    """Training by normflows' rule: log-dets summed layer by layer after the injection."""

    def forward_kld(self, x, context=None):
        data, log_det = x, torch.zeros(len(x))
        for flow in reversed(self.composite[1:]):
            data, flow_log_det = flow.inverse(data)
            log_det = log_det + flow_log_det
        injection = self.composite[0]
        terms = self.likelihood(data, injection.encode, injection.decode)
        log_prob = self.q0.log_prob(terms.z) + log_det
        reconstruction = self.reconstruction_error(x)
        return (10 * reconstruction - log_prob + terms.volume).mean()


@pytest.mark.slow
def test_per_layer_sums_would_fail():
    model = PerLayerSums(base(2), STACKS["ambient"][0]())
    # As few steps as bring the right sum within a hundredth of a nat, at an error below .004.
    last_loss = train(model, 400)
    excess, _, reconstruction = excess_nll(model)
    assert abs(excess) > 0.02 or reconstruction > 0.01
    assert last_loss < 0  # it pays itself for a volume that is not there

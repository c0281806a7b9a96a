"""Training terms that somebody else writes."""

from __future__ import annotations

import normflows as nf
import pytest
import torch

import normflows_injective as nfi


class Reconstruction(nfi.TrainingTerm):
    def terms(self, x, passes, prior=None):
        z = passes.encode(x)
        reconstruction, log_volume = passes.decode_and_log_volume(z)
        error = (x - reconstruction).square().sum(1)
        return nfi.SurrogateTerms(z, reconstruction, log_volume, error, torch.zeros_like(error))

    def loss(self, terms, log_prob):
        return terms.reconstruction_error


class Demanding(Reconstruction):
    def check_stack(self, starts_with_chart):
        raise nfi.errors.OptionError(f"starts with a chart: {starts_with_chart}")


def model(likelihood):
    base = nf.distributions.DiagGaussian(2, trainable=False)
    pair = nfi.nets.mlp_autoencoder(5, 2, (8,))
    return nfi.InjectiveNormalizingFlow(base, [nfi.flows.FreeFormInjection(*pair)], likelihood)


def test_a_model_trains_on_a_term_of_somebody_else():
    flow, x = model(Reconstruction()).double(), torch.randn(16, 5, dtype=torch.float64)
    assert torch.equal(flow.forward_kld(x), flow.reconstruction_error(x).mean())
    flow.forward_kld(x).backward()
    assert all(p.grad is not None for p in flow.parameters())


def test_the_volume_of_the_terms_reaches_the_loss_terms():
    flow, x = model(Reconstruction()).double(), torch.randn(4, 5, dtype=torch.float64)
    terms = flow.loss_terms(x)
    z = flow.encode(x)
    expected = nfi.volume.log_volume(flow.decode, z)
    torch.testing.assert_close(terms.volume, expected)
    assert terms.surrogate is terms.volume


def test_a_term_may_refuse_layers():
    with pytest.raises(nfi.errors.OptionError, match="starts with a chart: False"):
        model(Demanding())


def test_a_term_lacks_nothing_or_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        nfi.TrainingTerm()

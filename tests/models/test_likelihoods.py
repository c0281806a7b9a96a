"""The training term: bare callables, schedules, warm-up, noise, latent cycle, cost."""

from __future__ import annotations

import normflows as nf
import pytest
import torch
from support.models import base, model
from support.seeds import manual_seed
from torch import nn

import normflows_injective as nfi
from normflows_injective.models.losses import prior_samples


@pytest.fixture
def pair(dtype, device):
    return nn.Linear(5, 2).to(device, dtype), nn.Linear(2, 5).to(device, dtype)


@pytest.fixture
def x(dtype, device):
    return torch.randn(4, 5, dtype=dtype, device=device)


def test_bare_callables_without_a_model(pair, x):
    encoder, decoder = pair
    likelihood = nfi.SurrogateLikelihood(beta=3.0, num_probes=2)
    terms = likelihood(x, lambda s: encoder(s), lambda s: decoder(s))
    trace = (encoder.weight @ decoder.weight).trace()
    torch.testing.assert_close(terms.volume, -trace.expand(4))
    torch.testing.assert_close(terms.z, encoder(x))
    torch.testing.assert_close(terms.reconstruction, decoder(encoder(x)))
    error = (x - decoder(encoder(x))).square().sum(1)
    torch.testing.assert_close(terms.reconstruction_error, error)
    log_prob = torch.randn(4).to(x)
    expected = terms.volume - log_prob + 3 * error
    torch.testing.assert_close(likelihood.loss(terms, log_prob), expected)


def test_defaults_are_those_of_the_paper():
    likelihood = nfi.SurrogateLikelihood()
    assert (likelihood.beta, likelihood.num_probes, likelihood.probes) == (10.0, 1, "orthonormal")
    assert likelihood.estimator == nfi.volume.estimators.EncoderSurrogate()


def test_every_method_decodes_and_encodes_as_often_as_its_formula_says(pair, x):
    """A surrogate that decodes again for every probe would show here."""
    counts = {}

    def counted(name, net):
        def call(s):
            counts[name] = counts.get(name, 0) + 1
            return net(s)

        return call

    encoder, decoder = pair
    expected = {"encoder": (1, 1), "on_manifold": (2, 1), "decoder": (1, 1), "conditional": (1, 1)}
    for estimator, numbers in expected.items():
        for num_probes in (1, 2):
            counts.clear()
            likelihood = nfi.SurrogateLikelihood(estimator=estimator, num_probes=num_probes)
            likelihood(x, counted("encode", encoder), counted("decode", decoder))
            assert (counts["encode"], counts["decode"]) == numbers, (estimator, num_probes)


def test_an_estimator_object_in_place_of_a_name(pair, x):
    solver = nfi.volume.ConjugateGradient(max_iterations=1, tolerance=1e-3)
    terms = nfi.SurrogateLikelihood(estimator=solver)(x, *pair)
    assert terms.volume.shape == (4,)


def moved(ours):
    """The model, with all parameters a little other than they were."""
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.001)
    return ours


def test_beta_by_attribute_and_by_schedule(x):
    ours = model(likelihood=nfi.SurrogateLikelihood(beta=lambda step: 5.0 * (step + 1)))
    x = x.cpu().float()
    assert ours.likelihood.current_beta() == 5.0
    ours.forward_kld(x)
    assert ours.likelihood.current_beta() == 10.0
    ours.likelihood.beta = 2.0
    manual_seed(1)
    low = ours.loss_terms(x)
    ours.likelihood.beta = 4.0
    manual_seed(1)
    high = ours.loss_terms(x)
    torch.testing.assert_close(high.loss - low.loss, 2 * low.reconstruction_error)


def test_warm_up_trains_reconstruction_alone_then_ramps():
    likelihood = nfi.SurrogateLikelihood(warmup_steps=(3, 6))
    ours = model(likelihood=likelihood)
    x, weights = torch.randn(4, 5), []
    for _ in range(8):
        weights.append(likelihood.likelihood_weight())
        terms = ours.loss_terms(x)
        if weights[-1] == 0:
            assert torch.equal(terms.surrogate, torch.zeros(4))
            torch.testing.assert_close(terms.loss, 10 * terms.reconstruction_error)
        else:
            likelihood_part = weights[-1] * (terms.surrogate - terms.log_prob_latent)
            torch.testing.assert_close(
                terms.loss, likelihood_part + 10 * terms.reconstruction_error
            )
        moved(ours)
    assert weights == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]


def test_warm_up_refuses_what_would_fail_after_it(pair, x):
    """A run should not train for an hour and then stop at the first ramped step."""
    encoder, decoder = pair
    likelihood = nfi.SurrogateLikelihood(warmup_steps=(3, 6), num_probes=2)
    with pytest.raises(nfi.errors.UnsupportedLayerError, match="BatchNorm1d in training mode"):
        likelihood(x, nn.Sequential(encoder, nn.BatchNorm1d(2).to(x)), decoder)
    with pytest.raises(nfi.errors.ShapeError, match="must return the shape of the data"):
        likelihood(x, encoder, lambda z: z[:, :1] * 2)
    likelihood.num_probes = 3
    with pytest.raises(nfi.errors.OptionError, match="between 1 and the latent dimension 2"):
        likelihood(x, encoder, decoder)


@pytest.mark.parametrize("window", [(0, 0), (0, 4), (4, 4)])
def test_warm_up_windows_at_the_edges(window):
    likelihood = nfi.SurrogateLikelihood(warmup_steps=window)
    weights = []
    for _ in range(6):
        weights.append(likelihood.likelihood_weight())
        likelihood.advance()
    assert weights == sorted(weights)
    assert weights[-1] == 1
    assert (weights[0] > 0) == (window[0] == 0)
    assert all(w == 0 for w in weights[: window[0]])


def test_the_step_is_in_the_state_dict_and_only_training_advances_it(tmp_path):
    ours = model(likelihood=nfi.SurrogateLikelihood(warmup_steps=(2, 4)))
    x = torch.randn(4, 5)
    for _ in range(3):
        moved(ours).forward_kld(x)
    moved(ours)
    with torch.no_grad():
        ours.forward_kld(x)
    ours.eval()
    ours.forward_kld(x)
    ours.loss_terms(x)
    assert int(ours.state_dict()["likelihood.step"]) == 3
    ours.save(tmp_path / "model.safetensors")
    resumed = model(likelihood=nfi.SurrogateLikelihood(warmup_steps=(2, 4)))
    resumed.load(tmp_path / "model.safetensors")
    assert resumed.likelihood.likelihood_weight() == ours.likelihood.likelihood_weight() > 0


def test_input_noise_in_training_mode_only_and_against_the_noisy_data(pair, x):
    encoder, decoder = pair
    likelihood = nfi.SurrogateLikelihood(input_noise=0.5)
    before = x.clone()
    manual_seed(1)
    terms = likelihood(x, encoder, decoder)
    manual_seed(1)
    noisy = x + 0.5 * torch.randn_like(x)
    torch.testing.assert_close(terms.reconstruction, decoder(encoder(noisy)))
    error = (noisy - decoder(encoder(noisy))).square().sum(1)
    torch.testing.assert_close(terms.reconstruction_error, error)
    assert torch.equal(x, before)
    likelihood.eval()
    torch.testing.assert_close(likelihood(x, encoder, decoder).z, encoder(x))


def test_latent_cycle_penalty_on_prior_samples(x):
    ours = model(likelihood=nfi.SurrogateLikelihood(latent_cycle=2.0, num_probes=2)).to(x)
    manual_seed(1)
    terms = ours.loss_terms(x)
    manual_seed(1)
    prior, _ = ours.q0(4)
    cycle = (prior - ours.encode(ours.decode(prior))).square().sum(1)
    without = terms.surrogate - terms.log_prob_latent + 10 * terms.reconstruction_error
    torch.testing.assert_close(terms.loss, without + 2 * cycle)


def test_latent_cycle_prior_goes_through_the_latent_block():
    flows = [nf.flows.LULinearPermute(2), nfi.flows.LinearInjection(2, 5)]
    flows[0].linear.bias.data.fill_(100.0)
    likelihood = nfi.SurrogateLikelihood(latent_cycle=1.0)
    ours = nfi.InjectiveNormalizingFlow(base(2), flows, likelihood)
    prior = prior_samples(ours, torch.randn(64, 5), None)
    assert prior.shape == (64, 2)
    assert prior.abs().mean() > 50
    assert not prior.requires_grad


def test_latent_cycle_lets_layers_initialise_themselves_on_data():
    """normflows' convention: the first batch of data leaves the base variables standardised."""
    norm = nf.flows.ActNorm((2,))
    likelihood = nfi.SurrogateLikelihood(latent_cycle=1.0)
    ours = nfi.InjectiveNormalizingFlow(
        base(2), [norm, nfi.flows.LinearInjection(2, 5)], likelihood
    )
    x = 3 + 2 * torch.randn(64, 5)
    ours.loss_terms(x)
    z = ours.inverse(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(2), atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # of normflows' Uniform
def test_reconstruction_alone_survives_data_outside_the_support_of_the_base():
    q0 = nf.distributions.base.Uniform((2,), -1e-6, 1e-6)
    ours = nfi.InjectiveNormalizingFlow(
        q0, [nfi.flows.LinearInjection(2, 5)], nfi.SurrogateLikelihood(warmup_steps=(2, 4))
    )
    ours.forward_kld(torch.randn(4, 5)).backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters() if p.grad is not None)


def test_conjugate_gradient_warns_where_the_precision_does_not_suffice():
    """At condition number 1e4 the Gram matrix has 1e8: too much for float32, fine in float64."""
    spectrum = torch.logspace(0, -4, 8, dtype=torch.float64)
    matrix = torch.linalg.qr(torch.randn(20, 8, dtype=torch.float64)).Q * spectrum
    matrix = matrix @ torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    likelihood = nfi.SurrogateLikelihood(estimator="conjugate_gradient")
    for kept, warns in ((torch.float64, False), (torch.float32, True)):
        a = matrix.to(kept)
        a_inverse = torch.linalg.pinv(matrix).to(kept)
        call = (torch.randn(3, 20, dtype=kept), lambda x, b=a_inverse: x @ b.T)
        if warns:
            with pytest.warns(nfi.errors.NumericalWarning, match="relative residual above 1 %"):
                likelihood(*call, lambda z, a=a: z @ a.T)
        else:
            likelihood(*call, lambda z, a=a: z @ a.T)


def test_latent_cycle_without_prior_samples_is_an_error(pair, x):
    likelihood = nfi.SurrogateLikelihood(latent_cycle=1.0)
    with pytest.raises(nfi.errors.OptionError, match="pass prior="):
        likelihood(x, *pair)


@pytest.mark.parametrize("estimator", nfi.volume.estimators.ESTIMATORS)
@pytest.mark.parametrize("probes", nfi.volume.probes.PROBES)
@pytest.mark.parametrize("kept", [torch.float32, torch.float64])
def test_every_combination_runs_a_step_and_keeps_the_dtype(estimator, probes, kept):
    likelihood = nfi.SurrogateLikelihood(estimator=estimator, probes=probes, num_probes=2)
    ours = model(likelihood=likelihood).to(kept)
    x = torch.randn(4, 5, dtype=kept)
    loss = ours.forward_kld(x)
    loss.backward()
    assert loss.dtype == kept
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters())
    assert not x.requires_grad


@pytest.mark.parametrize("probes", nfi.volume.probes.PROBES)
def test_probes_in_half_precision(probes):
    z = torch.zeros(3, 4, dtype=torch.bfloat16)
    v = nfi.volume.draw_probes(probes, 2, z)
    assert v.dtype == torch.bfloat16
    assert torch.isfinite(v).all()


def test_repr_names_the_options():
    text = repr(nfi.SurrogateLikelihood(beta=3.0, num_probes=2, warmup_steps=(1, 2)))
    assert "beta=3.0, num_probes=2, estimator=EncoderSurrogate()" in text
    assert "warmup_steps=(1, 2)" in text


class ShiftsInPlace(torch.nn.Module):
    """A network that overwrites what it is given."""

    def __init__(self, *widths):
        super().__init__()
        self.layer = torch.nn.Linear(*widths)

    def forward(self, z):
        z += 1
        return self.layer(z)


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}])
@pytest.mark.parametrize("latent_cycle", [0.0, 1.0])
def test_networks_that_overwrite_their_input_change_neither_latents_nor_data(
    compile, latent_cycle
):
    likelihood = nfi.SurrogateLikelihood(compile=compile, latent_cycle=latent_cycle)
    encoder, decoder = ShiftsInPlace(4, 2), ShiftsInPlace(2, 4)
    x, prior = torch.randn(5, 4), torch.randn(5, 2)
    kept, kept_prior = x.clone(), prior.clone()
    terms = likelihood(x, encoder, decoder, prior)
    assert torch.equal(x, kept)
    assert torch.equal(prior, kept_prior)
    torch.testing.assert_close(terms.z, encoder(kept.clone()))
    torch.testing.assert_close(terms.reconstruction, decoder(terms.z.clone()))

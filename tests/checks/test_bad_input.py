"""Every mistake a caller can make is a named error with a text that helps."""

from __future__ import annotations

import copy

import normflows as nf
import pytest
import torch
from support.models import LinearPair, base, mlp_injection, model, stacks
from torch import nn

import normflows_injective as nfi
from normflows_injective import errors

METHODS = (
    "forward_kld",
    "loss_terms",
    "log_prob",
    "inverse",
    "inverse_and_log_det",
    "project",
    "reconstruction_error",
    "encode",
)


def foreign_model():
    """Networks that declare no shapes, so that the model must find them out."""
    injection = nfi.flows.FreeFormInjection(LinearPair(5, 2), LinearPair(2, 5))
    return nfi.InjectiveNormalizingFlow(base(2), [injection, nf.flows.LULinearPermute(5)])


@pytest.mark.parametrize("build", [model, foreign_model])
@pytest.mark.parametrize("method", METHODS)
def test_wrong_width(build, method):
    with pytest.raises(errors.ShapeError, match=r"x must have shape \(B, 5\), got \(4, 6\)"):
        getattr(build(), method)(torch.randn(4, 6))


@pytest.mark.parametrize("method", ["forward", "forward_and_log_det", "decode"])
def test_wrong_latent_width(method):
    with pytest.raises(errors.ShapeError, match=r"z must have shape \(B, 2\), got \(4, 3\)"):
        getattr(foreign_model(), method)(torch.randn(4, 3))


@pytest.mark.parametrize("method", METHODS)
def test_wrong_dtype(method):
    with pytest.raises(errors.DtypeError, match=r"model's dtype torch.float32, got torch.float64"):
        getattr(model(), method)(torch.randn(4, 5).double())


def test_integer_input():
    with pytest.raises(
        errors.DtypeError, match=r"must be real floating point, got torch.int64.*x.float"
    ):
        model().forward_kld(torch.ones(4, 5, dtype=torch.long))


def test_no_tensor():
    with pytest.raises(errors.DtypeError, match="must be a torch.Tensor, got list"):
        model().forward_kld([[1.0] * 5])


def test_missing_batch_dimension():
    with pytest.raises(errors.ShapeError, match=r"got shape \(5,\)\. Add one with x.unsqueeze"):
        model().log_prob(torch.randn(5))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_not_finite(method, value):
    x = torch.randn(4, 5)
    x[2, 3] = x[3, 0] = value
    with pytest.raises(errors.NonFiniteError, match=r"x has 2 of 20 .* first at index \[2, 3\]"):
        getattr(model(), method)(x)


@pytest.mark.parametrize("name", stacks())
def test_a_non_finite_batch_leaves_the_parameters_unchanged(name):
    flows = [*stacks()[name], nf.flows.ActNorm((5,))]
    ours = nfi.InjectiveNormalizingFlow(base(2), flows)
    optimizer = torch.optim.Adam(ours.parameters())
    before = copy.deepcopy(ours.state_dict())
    x = torch.randn(4, 5)
    x[0, 0] = float("nan")
    with pytest.raises(errors.NonFiniteError):
        ours.forward_kld(x).backward()
    optimizer.step()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_a_diverged_model_says_which_term():
    ours = model()
    ours.flows[0].decoder.layers[-1].bias.data.fill_(1e30)
    with pytest.raises(
        errors.NonFiniteError, match="training term reconstruction_error has 4 of 4"
    ):
        ours.forward_kld(torch.randn(4, 5))


def test_empty_batch():
    with pytest.raises(errors.ShapeError, match=r"x is an empty batch of shape \(0, 5\)"):
        model().forward_kld(torch.randn(0, 5))


@pytest.mark.parametrize("name", stacks())
def test_a_batch_of_one_works_where_nothing_is_initialised_by_it(name):
    ours = nfi.InjectiveNormalizingFlow(base(2), stacks()[name])
    x = torch.randn(1, 5)
    assert torch.isfinite(ours.forward_kld(x))
    assert ours.log_prob(x).shape == (1,)
    assert ours.sample(1)[0].shape == (1, 5)


def test_a_batch_of_one_that_would_initialise_a_layer():
    ours = nfi.InjectiveNormalizingFlow(base(2), [mlp_injection(), nf.flows.ActNorm((5,))])
    with pytest.raises(errors.ShapeError, match="got a batch of one sample"):
        ours.forward_kld(torch.randn(1, 5))


@pytest.mark.parametrize("latent", [5, 6])
def test_latent_at_least_as_wide_as_the_data(latent):
    injection = nfi.flows.FreeFormInjection(nn.Linear(5, latent), nn.Linear(latent, 5))
    with pytest.raises(errors.NotInjectiveError, match="must raise the dimension"):
        nfi.InjectiveNormalizingFlow(base(latent), [injection])


def test_base_of_the_wrong_shape():
    with pytest.raises(errors.ShapeError, match=r"flows\[0\] \(FreeFormInjection\).*\(B, 2\)"):
        nfi.InjectiveNormalizingFlow(base(3), [mlp_injection()])
    foreign = nfi.flows.FreeFormInjection(LinearPair(5, 2), LinearPair(2, 5))
    with pytest.raises(errors.ShapeError, match=r"flows\[0\].*event shape \(3,\).*generative"):
        nfi.InjectiveNormalizingFlow(base(3), [foreign])


def test_a_latent_flow_of_another_width_is_named():
    with pytest.raises(errors.ShapeError, match=r"flows\[0\] \(LULinearPermute\)"):
        nfi.InjectiveNormalizingFlow(base(2), [nf.flows.LULinearPermute(3), mlp_injection()])


def test_encoder_and_decoder_of_different_latents():
    injection = nfi.flows.FreeFormInjection(nn.Linear(5, 3), nn.Linear(2, 5))
    with pytest.raises(errors.ShapeError, match="Encoder and decoder must have opposite shapes"):
        nfi.InjectiveNormalizingFlow(base(2), [injection])


def test_flows_without_an_injection():
    with pytest.raises(errors.NotInjectiveError, match="use nf.NormalizingFlow"):
        nfi.InjectiveNormalizingFlow(base(2), [nf.flows.LULinearPermute(2)])
    with pytest.raises(
        errors.NotInjectiveError, match="must be an Injection, got LULinearPermute"
    ):
        nfi.flows.InjectiveComposite([nf.flows.LULinearPermute(2)])
    with pytest.raises(errors.NotInjectiveError, match="got no layer"):
        nfi.flows.InjectiveComposite([])


class OneWay(nf.flows.Flow):
    """A layer whose missing inverse shows only when it is called."""

    def forward(self, z):
        return z, z.new_zeros(len(z))

    def inverse(self, x):
        raise NotImplementedError("not yet")


def test_a_layer_that_lacks_a_direction():
    with pytest.raises(
        errors.UnsupportedLayerError, match=r"flows\[1\] \(OneWay\) lacks the encod"
    ):
        nfi.InjectiveNormalizingFlow(base(2), [mlp_injection(), OneWay()])


class BadBase(nf.distributions.BaseDistribution):
    def forward(self, num_samples=1):
        return torch.randn(num_samples, 2), torch.zeros(num_samples, 1)

    def log_prob(self, z):
        return torch.zeros(len(z), 1)


def test_a_base_with_a_column_of_log_densities():
    with pytest.raises(
        errors.ShapeError, match=r"BadBase must return 2 samples and log-densities"
    ):
        nfi.InjectiveNormalizingFlow(BadBase(), [mlp_injection()])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"estimator": "cholesky"}, "estimator must be .*conjugate_gradient, got 'cholesky'"),
        ({"probes": "cauchy"}, "probes must be one of orthonormal.*got 'cauchy'"),
        ({"num_probes": 0}, "num_probes must be a positive integer, got 0"),
        ({"num_probes": 1.5}, "num_probes must be a positive integer, got 1.5"),
        ({"beta": -1.0}, "beta must be a number, finite and not negative, got -1.0"),
        ({"beta": float("nan")}, "beta must be a number, finite"),
        ({"beta": "10"}, "beta must be a number, finite and not negative, got '10'"),
        ({"warmup_steps": 100}, r"must be \(start, end\) with .* got 100"),
        ({"warmup_steps": (1, 2, 3)}, r"must be \(start, end\)"),
        ({"warmup_steps": (5, 2)}, r"0 <= start <= end, got \(5, 2\)"),
        ({"input_noise": -0.1}, "input_noise must be a number"),
        ({"latent_cycle": -0.1}, "latent_cycle must be a number"),
    ],
)
def test_unknown_or_impossible_options(options, text):
    with pytest.raises(errors.OptionError, match=text):
        nfi.SurrogateLikelihood(**options)


def test_a_schedule_that_goes_negative():
    likelihood = nfi.SurrogateLikelihood(beta=lambda step: 1.0 - step)
    likelihood.step += 3
    with pytest.raises(
        errors.OptionError, match="beta must be a number, finite and not negative, got -2.0"
    ):
        likelihood.current_beta()


def test_more_probes_than_latent_dimensions():
    ours = model(likelihood=nfi.SurrogateLikelihood(num_probes=3))
    with pytest.raises(errors.OptionError, match="between 1 and the latent dimension 2, got 3"):
        ours.forward_kld(torch.randn(4, 5))


def test_decoder_of_another_shape_on_bare_callables():
    likelihood = nfi.SurrogateLikelihood()
    with pytest.raises(errors.ShapeError, match=r"shape of the data \(4, 5\), got \(4, 6\)"):
        likelihood(torch.randn(4, 5), nn.Linear(5, 2), nn.Linear(2, 6))
    with pytest.raises(errors.NotInjectiveError, match="6 dimensions and the data 5"):
        likelihood(torch.randn(4, 5), nn.Linear(5, 6), nn.Linear(6, 5))


def test_conjugate_gradient_options():
    with pytest.raises(errors.OptionError, match="max_iterations must be a positive integer"):
        nfi.volume.ConjugateGradient(max_iterations=0)
    with pytest.raises(errors.OptionError, match="tolerance must be a positive number"):
        nfi.volume.ConjugateGradient(tolerance=0.0)


def test_batch_norm_in_training_mode_is_refused_and_in_evaluation_mode_served():
    encoder = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 2))
    ours = nfi.InjectiveNormalizingFlow(
        base(2), [nfi.flows.FreeFormInjection(encoder, nn.Linear(2, 5))]
    )
    with pytest.raises(errors.UnsupportedLayerError, match="BatchNorm1d in training mode couples"):
        ours.forward_kld(torch.randn(4, 5))
    ours.eval()
    assert torch.isfinite(ours.forward_kld(torch.randn(4, 5)))


@pytest.mark.parametrize("count", [0, -1, 2.0])
def test_a_number_of_samples_that_is_none(count):
    with pytest.raises(errors.OptionError, match="num_samples must be a positive integer, got"):
        model().sample(count)


def test_sampling_one_from_a_cold_layer_is_refused_before_it_writes_nan():
    ours = nfi.InjectiveNormalizingFlow(base(2), [mlp_injection(), nf.flows.ActNorm((5,))])
    with pytest.raises(errors.ShapeError, match="batch of one"):
        ours.sample(1, log_prob=False)
    assert all(bool(torch.isfinite(p).all()) for p in ours.parameters())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((base(2), mlp_injection()), "flows must be a list of layers, got FreeFormInjection"),
        ((torch.distributions.Normal(0, 1), [mlp_injection()]), "q0 must be a base .* got Normal"),
        (
            (base(2), [mlp_injection()], base(5)),
            "must be a SurrogateLikelihood or an ExactLikelihood, got DiagGaussian.*p=",
        ),
        (
            (
                base(2),
                [nfi.flows.InjectiveComposite([mlp_injection()], nfi.SurrogateLikelihood())],
            ),
            "Give the likelihood to InjectiveNormalizingFlow",
        ),
    ],
)
def test_parts_of_the_wrong_kind(arguments, text):
    with pytest.raises(errors.OptionError, match=text):
        nfi.InjectiveNormalizingFlow(*arguments)


def test_a_network_among_the_flows():
    pair = nfi.nets.mlp_autoencoder(5, 2)
    with pytest.raises(errors.UnsupportedLayerError, match=r"SmoothMLP is no flow.*FreeFormInj"):
        nfi.InjectiveNormalizingFlow(base(2), list(pair))


def test_an_injection_without_a_context_keyword_is_refused_where_it_is_written():
    with pytest.raises(errors.UnsupportedLayerError, match="Short.decode must accept a keyword"):

        class Short(nfi.flows.Injection):
            def encode(self, x, context=None):
                return x

            def decode(self, z):
                return z


@pytest.mark.parametrize("where", ["encoder", "decoder", "decoder output"])
def test_a_detached_network_is_an_error_not_a_zero(where):
    def cut(net):
        return lambda s: net(s.detach())

    encoder, decoder = nn.Linear(5, 2), nn.Linear(2, 5)
    maps = {
        "encoder": (cut(encoder), decoder),
        "decoder": (encoder, cut(decoder)),
        "decoder output": (encoder, lambda z: decoder(z).detach()),
    }
    for estimator in ("encoder", "decoder", "conditional", "conjugate_gradient"):
        likelihood = nfi.SurrogateLikelihood(estimator=estimator)
        if where == "encoder" and estimator == "conjugate_gradient":
            continue  # needs no encoder Jacobian
        with pytest.raises(
            errors.NotInjectiveError, match="cut inside it|not connected to the lat"
        ):
            likelihood(torch.randn(4, 5), *maps[where])


def test_log_prob_per_sample_is_not_broadcast():
    likelihood = nfi.SurrogateLikelihood()
    terms = likelihood(torch.randn(4, 5), nn.Linear(5, 2), nn.Linear(2, 5))
    with pytest.raises(errors.ShapeError, match=r"one value per sample, shape \(4,\), got \(\)"):
        likelihood.loss(terms, torch.tensor(0.0))

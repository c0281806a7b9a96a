"""Surrogates by recorded passes: gradients of data, numbers of products, attention."""

from __future__ import annotations

import normflows as nf
import pytest
import torch
from support.counting import Products
from support.dense_surrogate import dense_surrogate
from support.gradients import gradients
from support.networks import Attentive, ReverseOnce, mlp
from torch import nn

import normflows_injective as nfi
from normflows_injective.volume.estimators import ESTIMATORS


def basis_probes(z):
    d = z.shape[1]
    return d**0.5 * torch.eye(d, dtype=z.dtype).unsqueeze(1).expand(d, len(z), d)


@pytest.mark.parametrize("estimator", ["encoder", "decoder", "conditional", "on_manifold"])
def test_data_that_require_gradients_get_the_right_ones(estimator):
    encoder, decoder = mlp(5, 2).double(), mlp(2, 5).double()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    surrogate = ESTIMATORS[estimator](x, encoder, decoder, basis_probes)
    (surrogate.reconstruction - x).square().sum().backward()
    actual, x.grad = x.grad, None
    (decoder(encoder(x)) - x).square().sum().backward()
    torch.testing.assert_close(actual, x.grad)
    if estimator in ("encoder", "decoder"):
        (a,) = torch.autograd.grad(
            ESTIMATORS[estimator](x, encoder, decoder, basis_probes).volume.sum(), x
        )
        dense = torch.stack(
            [dense_surrogate_of_one(s, encoder, decoder, estimator) for s in x]
        ).sum()
        (e,) = torch.autograd.grad(dense, x)
        torch.testing.assert_close(a, e)


def dense_surrogate_of_one(sample, encoder, decoder, estimator):
    """On the graph of the sample, which dense_jacobian's batches leave."""
    f = torch.func.jacrev(encoder)(sample)
    g = torch.func.jacrev(decoder)(encoder(sample))
    f, g = (f, g.detach()) if estimator == "encoder" else (f.detach(), g)
    return (-1 if estimator == "encoder" else 1) * (f @ g).diagonal().sum()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_data_of_the_caller_are_left_alone(estimator):
    encoder, decoder = mlp(5, 2).double(), mlp(2, 5).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    before, version = x.clone(), x._version
    surrogate = ESTIMATORS[estimator](x, encoder, decoder, basis_probes)
    (surrogate.volume + surrogate.reconstruction.square().sum(1)).sum().backward()
    assert not x.requires_grad
    assert x.grad is None
    assert x._version == version
    assert torch.equal(x, before)


def test_data_in_a_graph_keep_their_gradients():
    """A trainable preprocessing before the encoder, as in a latent manifold of another network."""
    encoder, decoder, before = mlp(5, 2).double(), mlp(2, 5).double(), nn.Linear(5, 5).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    surrogate = ESTIMATORS["encoder"](before(x), encoder, decoder, basis_probes)
    actual = gradients(surrogate.volume.sum(), list(before.parameters()))
    dense = torch.stack(
        [dense_surrogate_of_one(s, encoder, decoder, "encoder") for s in before(x)]
    ).sum()
    torch.testing.assert_close(actual, gradients(dense, list(before.parameters())))


def square_mlp(layers):
    parts = [part for _ in range(layers) for part in (nn.Linear(8, 8), nn.SiLU())]
    return nn.Sequential(*parts[:-1])


@pytest.mark.parametrize(("encoder_layers", "decoder_layers"), [(1, 1), (2, 3), (3, 2), (4, 4)])
def test_a_step_takes_the_products_that_mathematics_asks_for(encoder_layers, decoder_layers):
    r"""4 for the encoder's first layer, 6 for further ones, 5 for its last, 4 for the decoder's.

    First layer: W x and W u, and their weight gradients. Further ones: W h, its two reverse
    products, the reverse product of the Jacobian, and the two of that; at the last one the probes
    are constant, which saves one. Decoder: value, tangent, and two reverse products of the value.
    """
    encoder, decoder = square_mlp(encoder_layers), square_mlp(decoder_layers)
    x = torch.randn(16, 8)
    with Products() as counter:
        surrogate = ESTIMATORS["encoder"](x, encoder, decoder, lambda z: torch.randn(1, *z.shape))
        loss = surrogate.volume + (surrogate.reconstruction - x).square().sum(1)
        (loss + surrogate.z.square().sum(1)).sum().backward()
    further = 6 * (encoder_layers - 1) - (encoder_layers > 1)
    assert counter.total == 4 + further + 4 * decoder_layers


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_products_of_a_training_step_of_a_model(kind):
    if kind == "mlp":
        pair, shape = nfi.nets.mlp_autoencoder(6, 2, (8, 8)), (6,)
    else:
        pair, shape = nfi.nets.conv_autoencoder((1, 4, 4), 2, (4, 8)), (1, 4, 4)
    model = nfi.InjectiveNormalizingFlow(
        nf.distributions.DiagGaussian(2, trainable=False), [nfi.flows.FreeFormInjection(*pair)]
    )
    x = torch.randn(16, *shape)
    with Products() as counter:
        model.forward_kld(x).backward()
    assert counter.total == (4 + 6 + 5) + 3 * 4


def attention_backends():
    cuda = torch.backends.cuda
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )


@pytest.mark.parametrize("kind", ["multihead", "transformer", "sdpa"])
@pytest.mark.parametrize("estimator", ["encoder", "decoder"])
@pytest.mark.parametrize("training", [True, False])
def test_attention_in_both_networks(kind, estimator, training):
    encoder = Attentive(5, 2, kind).double().train(training)
    decoder = Attentive(2, 5, kind).double().train(training)
    x = torch.randn(4, 5, dtype=torch.float64)
    ends = [*encoder.parameters(), *decoder.parameters()]
    before = attention_backends()
    surrogate = ESTIMATORS[estimator](x, encoder, decoder, basis_probes)
    actual = gradients(surrogate.volume.sum(), ends)
    assert attention_backends() == before
    with nfi.autodiff.settings.differentiable_attention():
        dense = dense_surrogate(estimator, x, encoder, decoder, basis_probes(encoder(x)))
        expected = gradients(dense.sum(), ends)
    torch.testing.assert_close(actual, expected)


class Once(nn.Module):
    def forward(self, z):
        return ReverseOnce.apply(z)


def test_a_layer_without_second_derivative_in_the_decoder_is_refused_and_says_why():
    encoder, decoder = mlp(5, 2), mlp(2, 5, Once)
    before = attention_backends()
    with pytest.raises(nfi.errors.UnsupportedLayerError, match="give its autograd.Function a jvp"):
        ESTIMATORS["encoder"](torch.randn(4, 5), encoder, decoder, basis_probes)
    assert attention_backends() == before

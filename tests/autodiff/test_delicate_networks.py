"""Surrogate gradients through layers on which torch's derivatives of derivatives fail.

Batched differentiable reverse passes confuse axes in group normalisation; backward through a
tangent is silently wrong for layer and instance normalisation, and missing for GLU.
"""

from __future__ import annotations

import pytest
import torch
from support.dense import dense_jacobian
from support.gradients import gradients
from torch import nn

import normflows_injective as nfi
from normflows_injective.autodiff.products import vjp

LATENT, DATA, HIDDEN = 3, 5, 8

NORMS = {
    "group_norm": lambda: nn.GroupNorm(2, HIDDEN),
    "layer_norm": lambda: nn.LayerNorm(HIDDEN),
    "rms_norm": lambda: nn.RMSNorm(HIDDEN),
    "softmax": lambda: nn.Softmax(1),
    "glu": lambda: nn.Sequential(nn.Linear(HIDDEN, 2 * HIDDEN), nn.GLU(1)),
    "instance_norm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()
    ),
    "batch_norm_eval": lambda: nn.BatchNorm1d(HIDDEN).eval(),
}


def network(name, fan_in, fan_out):
    layers = [nn.Linear(fan_in, HIDDEN), NORMS[name](), nn.SiLU(), nn.Linear(HIDDEN, fan_out)]
    return nn.Sequential(*layers).double()


def all_directions(z):
    basis = torch.eye(LATENT, dtype=z.dtype) * LATENT**0.5
    return basis.unsqueeze(1).expand(LATENT, len(z), LATENT)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("estimator", ["encoder", "decoder", "conjugate_gradient"])
def test_gradients_equal_the_dense_ones(name, estimator):
    encoder, decoder = network(name, DATA, LATENT), network(name, LATENT, DATA)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    x = torch.randn(4, DATA, dtype=torch.float64)
    surrogate = nfi.volume.estimators.ESTIMATORS[estimator]
    actual = gradients(surrogate(x, encoder, decoder, all_directions).volume.sum(), parameters)

    # Dense Jacobians differentiated by reverse mode over reverse mode alone, z included.
    f, g = dense_jacobian(encoder, x), dense_jacobian(decoder, encoder(x))
    if estimator == "encoder":
        value = -torch.einsum("bij,bji->", f, g.detach())
    elif estimator == "decoder":
        value = torch.einsum("bij,bji->", f.detach(), g)
    else:
        value = 0.5 * torch.logdet(g.mT @ g).sum()
    expected = gradients(value, parameters)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-7, rtol=1e-6)


def test_several_probes_through_group_normalisation_of_any_shape():
    """At this shape torch's batched pass runs through, and is wrong by half its size."""
    norm = nn.GroupNorm(1, 2).double()
    norm.weight.data.uniform_(0.5, 2.0)
    x = torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True)
    z, cotangents = norm(x), torch.randn(2, 1, 2, 2, dtype=torch.float64)
    actual = vjp(z, x, cotangents, create_graph=True).flatten(1)
    expected = cotangents.flatten(1) @ dense_jacobian(norm, x)[0]
    torch.testing.assert_close(actual, expected)
    (a,) = torch.autograd.grad(actual.square().sum(), norm.weight, retain_graph=True)
    (e,) = torch.autograd.grad(expected.square().sum(), norm.weight)
    torch.testing.assert_close(a, e)

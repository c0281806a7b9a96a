"""Small models that several test modules use."""

from __future__ import annotations

import pickle

import normflows as nf
import torch
from torch import nn

import normflows_injective as nfi


def mlp_injection(data_dim: int = 5, latent_dim: int = 2, context_dim: int = 0):
    pair = nfi.nets.mlp_autoencoder(data_dim, latent_dim, (16, 16), context_dim)
    return nfi.flows.FreeFormInjection(*pair)


def base(*shape: int) -> nf.distributions.DiagGaussian:
    return nf.distributions.DiagGaussian(shape, trainable=False)


def spline(dim: int = 2, **options) -> nf.flows.Flow:
    return nf.flows.CoupledRationalQuadraticSpline(dim, 1, 8, **options)


def coupling(dim: int = 5) -> nf.flows.Flow:
    half = (dim + 1) // 2
    return nf.flows.AffineCouplingBlock(nf.nets.MLP([half, 16, 2 * (dim - half)], leaky=0.3))


def stacks() -> dict[str, list[nf.flows.Flow]]:
    """The four kinds of stack, from latent dimension 2 to data dimension 5."""
    return {
        "injection": [mlp_injection()],
        "latent": [spline(), nf.flows.LULinearPermute(2), mlp_injection()],
        "ambient": [mlp_injection(), coupling(), nf.flows.LULinearPermute(5)],
        "two_injections": [mlp_injection(3, 2), nf.flows.LULinearPermute(3), mlp_injection(5, 3)],
    }


def model(**options) -> nfi.InjectiveNormalizingFlow:
    return nfi.InjectiveNormalizingFlow(base(2), [mlp_injection()], **options)


class LinearPair(nn.Module):
    """Any foreign encoder or decoder: no declared shapes, no context keyword."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(fan_in, fan_out)

    def forward(self, x):
        return self.linear(x)


def perturbed(module, size=0.3):
    """The module, with parameters away from their special initial values."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn_like(parameter)
    return module


def pickled(thing):
    """The copy that pickle makes."""
    return pickle.loads(pickle.dumps(thing))

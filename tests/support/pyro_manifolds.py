"""Learned manifolds as Pyro distributions, by the policy off the manifold."""

from __future__ import annotations

import normflows as nf
import torch
from torch import nn

import normflows_injective as nfi
from normflows_injective.pyro.laws.injective_distribution import InjectiveDistribution

D, RANK = 5, 2
POLICIES = {"reject": {"tol": 10.0}, "project": {}, "thicken": {"noise_scale": 0.3}}


def flow(latent=True, context_dim=0, **likelihood):
    pair = nfi.nets.mlp_autoencoder(D, RANK, (8,), context_dim)
    layers = [nfi.flows.FreeFormInjection(*pair)]
    if latent:
        layers = [nf.flows.LULinearPermute(RANK), *layers]
    base = nf.distributions.DiagGaussian(RANK, trainable=True)
    terms = nfi.SurrogateLikelihood(**likelihood) if likelihood else None
    return nfi.InjectiveNormalizingFlow(base, layers, terms).double()


def linear(data_dim=D, latent_dim=RANK, bias=True):
    pair = nn.Linear(data_dim, latent_dim, bias=bias), nn.Linear(latent_dim, data_dim, bias=bias)
    base = nf.distributions.DiagGaussian(latent_dim, trainable=False)
    return nfi.InjectiveNormalizingFlow(base, [nfi.flows.FreeFormInjection(*pair)]).double()


def law(model, off_manifold="project", **options):
    return InjectiveDistribution(
        model, off_manifold=off_manifold, **{**POLICIES.get(off_manifold, {}), **options}
    )


def data(*shape):
    return torch.randn(*shape, D, dtype=torch.float64)


def parameters(model):
    return [p for p in model.parameters() if p.requires_grad]

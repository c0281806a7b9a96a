"""Small models of five classes, with data on which they are trained."""

from __future__ import annotations

import normflows as nf
import torch
from torch import nn

import normflows_injective as nfi
from normflows_injective.flows.coupling import ActNorm, LULinear, NetworkCoupling
from support.manifolds import CurvedSurface
from support.models import base, mlp_injection


def injective(context_dim=0, **options):
    couplings = [
        NetworkCoupling(2, hidden=(16,), context_dim=context_dim, reverse=i == 1) for i in range(2)
    ]
    flows = [couplings[0], LULinear(2), couplings[1], mlp_injection(5, 2, context_dim)]
    return nfi.InjectiveNormalizingFlow(base(2), flows, nfi.SurrogateLikelihood(**options))


def surface(num_rows=400):
    return CurvedSurface().sample(num_rows, 3)


def _host():
    flows = [NetworkCoupling(5, hidden=(8,)), ActNorm(5)]
    return nf.NormalizingFlow(base(5), flows), surface(80), None


def _assignment():
    field = nfi.nets.fields.DenseField(3, 4, (8,))
    return nfi.AssignmentFlow(field, 3, 4), torch.randint(0, 4, (80, 3)), None


def _on_a_sphere():
    return nfi.flows.star_like_flow(3), nn.functional.normalize(torch.randn(80, 3)), None


# Model, data and context of each.
TRAININGS = {
    "injective": lambda: (injective(input_noise=0.1), surface(80), None),
    "normflows": _host,
    "conditional": lambda: (injective(context_dim=1), surface(80), torch.rand(80, 1)),
    "assignment": _assignment,
    "surface": _on_a_sphere,
}

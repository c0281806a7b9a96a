"""Small models, fields and functions for the calls."""

from __future__ import annotations

from typing import Any

import torch
from support.models import base
from torch import Tensor, nn

import normflows_injective as nfi
from normflows_injective import distributions, flows, nets
from normflows_injective.flows import assignment


def network_pair() -> list[nn.Module]:
    return list(nets.mlp_autoencoder(5, 2, (6,)))


def injection() -> nn.Module:
    return flows.FreeFormInjection(*network_pair())


def injective_model(**options: Any) -> nfi.InjectiveNormalizingFlow:
    return nfi.InjectiveNormalizingFlow(base(2), [injection()], **options)


def conditional_model() -> nfi.InjectiveNormalizingFlow:
    pair = nets.mlp_autoencoder(5, 2, (6,), context_dim=3)
    return nfi.InjectiveNormalizingFlow(base(2), [flows.FreeFormInjection(*pair)])


def model_on_sphere() -> nfi.InjectiveNormalizingFlow:
    return flows.star_like_flow(3, num_layers=1, width=8, p=distributions.UniformSphere(3))


def field_network() -> nn.Module:
    return nets.fields.DenseField(2, 3, (8,))


def assignment_flow(**options: Any) -> nfi.AssignmentFlow:
    return nfi.AssignmentFlow(field_network(), 2, 3, **options)


def assignment_path() -> assignment.AssignmentPath:
    return assignment.AssignmentPath(assignment.Simplices(2, 3), assignment.InfiniteHorizon())


def assignment_field() -> assignment.AssignmentField:
    return assignment.AssignmentField(field_network(), assignment_path(), assignment.Classifier())


def decode(z: Tensor) -> Tensor:
    return torch.cat([z, z.square()], 1)


def encode(x: Tensor) -> Tensor:
    return x.flatten(1)[:, :2]


def one_probe(z: Tensor) -> Tensor:
    return torch.ones(1, *z.shape)

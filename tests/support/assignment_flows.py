"""Small assignment flows, their paths and logits."""

from __future__ import annotations

import torch

import normflows_injective as nfi
from normflows_injective.flows.assignment import (
    AssignmentPath,
    FiniteHorizon,
    InfiniteHorizon,
    Simplices,
)
from normflows_injective.flows.assignment.horizon import horizon_of
from normflows_injective.nets.fields import DenseField
from support.assignment_oracles import DOUBLE

HORIZONS = {"infinite": InfiniteHorizon(), "finite": FiniteHorizon()}
COUNTS = {"equal": (3, 3), "ragged": (2, 5, 3), "binary": (2, 2, 2)}
# Every way to see an exact field; that of a finite horizon itself needs the logits.
WAYS = [
    (horizon, parametrisation, features)
    for horizon in HORIZONS
    for parametrisation in ("velocity", "classifier")
    for features in ("scaled_logits", "weights", "posterior")
    if (horizon, parametrisation, features) != ("finite", "velocity", "posterior")
]


def logits(simplices, num=5, scale=1.5):
    shape = (num, simplices.num_variables, simplices.max_classes)
    return simplices.mean_free(scale * torch.randn(shape, dtype=DOUBLE))


def path_of(counts, horizon="infinite"):
    return AssignmentPath(Simplices(len(counts), list(counts)), horizon_of(horizon))


def dense_flow(**options):
    """A small flow of two binary variables with a random network, in float64."""
    return nfi.AssignmentFlow(DenseField(2, 2, hidden=(8,)), 2, 2, **options).double()


def stirred(net, scale=2.0):
    """A network with larger weights than it begins with."""
    for parameter in net.parameters():
        parameter.data.mul_(scale)
    return net.double()

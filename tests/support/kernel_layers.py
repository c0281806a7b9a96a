"""Kernels, and layers of them that have been trained."""

from __future__ import annotations

from normflows_injective.flows.kernel.kernels import KERNELS

NAMES = list(KERNELS)


def trained(coupling, scale=0.1):
    """A coupling in float64 with random weights, so that it is not the identity."""
    coupling = coupling.double()
    coupling.conditioner.weights.data.normal_().mul_(scale)
    return coupling

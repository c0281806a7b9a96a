"""A valid call of the constructor of every law."""

from __future__ import annotations

import torch

from fuzz.making import Call, Fresh, building
from normflows_injective import distributions, flows
from normflows_injective.flows import gauges

LAWS: dict[str, Call] = {
    "AngularCentralGaussian": building(
        distributions.AngularCentralGaussian,
        scale=Fresh(lambda: torch.eye(3), "axes"),
        trainable=False,
        off_manifold="reject",
    ),
    "ProductLaw": building(
        distributions.ProductLaw,
        laws=Fresh(lambda: [distributions.UniformSphere(3)], "anything"),
    ),
    "IsotropicGaussianRotation": building(
        distributions.IsotropicGaussianRotation,
        scale=0.5,
        loc=Fresh(lambda: torch.tensor([1.0, 0.0, 0.0, 0.0]), "axes"),
        trainable=False,
        form="quaternion",
        off_manifold="reject",
    ),
    "MatrixFisher": building(
        distributions.MatrixFisher,
        matrix=Fresh(lambda: torch.eye(3), "axes"),
        trainable=False,
        form="quaternion",
        off_manifold="reject",
    ),
    "Pullback": building(
        distributions.Pullback,
        distribution=Fresh(lambda: distributions.UniformSphere(3), "anything"),
        chart=Fresh(lambda: flows.SphereChart(3), "anything"),
    ),
    "UniformOnSurface": building(
        distributions.UniformOnSurface,
        gauge=Fresh(lambda: gauges.LpGauge(1.5)),
        level=2.0,
        measure="hausdorff",
        dim=3,
        off_manifold="reject",
        num_directions=256,
    ),
    "UniformTorus": building(distributions.UniformTorus, dim=2),
    "UniformRotation": building(
        distributions.UniformRotation, form="quaternion", off_manifold="reject"
    ),
    "UniformSphere": building(distributions.UniformSphere, dim=3, off_manifold="reject"),
    "VonMisesFisher": building(
        distributions.VonMisesFisher,
        loc=Fresh(lambda: torch.tensor([1.0, 0.0, 0.0]), "axes"),
        concentration=2.0,
        trainable=False,
        off_manifold="reject",
    ),
    "PowerSpherical": building(
        distributions.PowerSpherical,
        loc=Fresh(lambda: torch.tensor([1.0, 0.0, 0.0]), "axes"),
        concentration=2.0,
        trainable=False,
        off_manifold="reject",
    ),
    "VonMises": building(
        distributions.VonMises,
        loc=Fresh(lambda: torch.tensor([1.0, 0.0, 3.0]), "axes"),
        concentration=2.0,
        trainable=False,
    ),
    "WrappedNormal": building(
        distributions.WrappedNormal,
        loc=Fresh(lambda: torch.tensor([1.0, 0.0, 3.0]), "axes"),
        scale=0.5,
        trainable=False,
    ),
}

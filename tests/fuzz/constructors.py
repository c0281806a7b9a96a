"""A valid call of every public constructor. Adding one is adding a line."""

from __future__ import annotations

import normflows as nf
import torch
from support.models import base
from torch import nn

import normflows_injective as nfi
from fuzz.making import ROWS, Call, Fresh, building
from fuzz.models import (
    assignment_field,
    assignment_path,
    decode,
    field_network,
    injection,
    injective_model,
    network_pair,
)
from normflows_injective import diagnostics, distributions, flows, nets, volume
from normflows_injective.flows import assignment, coupling, gauges, kernel, mixer
from normflows_injective.flows import volume_preserving as preserving

BUILDERS: dict[str, Call] = {
    "SmoothMLP": building(
        nets.SmoothMLP,
        in_features=3,
        out_features=2,
        hidden=(4,),
        context_dim=0,
        activation=nn.SiLU,
    ),
    "ResidualMLP": building(
        nets.ResidualMLP,
        in_features=3,
        out_features=2,
        width=4,
        num_blocks=1,
        context_dim=0,
        activation=nn.SiLU,
    ),
    "ConvEncoder": building(
        nets.ConvEncoder, image_shape=(1, 4, 4), latent_dim=2, channels=(4, 4), context_dim=0
    ),
    "ConvDecoder": building(
        nets.ConvDecoder, image_shape=(1, 4, 4), latent_dim=2, channels=(4, 4), context_dim=0
    ),
    "mlp_autoencoder": building(
        nets.mlp_autoencoder, data_dim=4, latent_dim=2, hidden=(4,), context_dim=0
    ),
    "LinearPlusMLP": building(
        nets.LinearPlusMLP, in_features=3, out_features=2, hidden=(4,), context_dim=0
    ),
    "principal_autoencoder": building(
        nets.principal_autoencoder,
        x=Fresh(lambda: torch.randn(8, 4), "batch"),
        latent_dim=2,
        hidden=(4,),
        context_dim=0,
    ),
    "residual_autoencoder": building(
        nets.residual_autoencoder, data_dim=4, latent_dim=2, width=4, num_blocks=1, context_dim=0
    ),
    "conv_autoencoder": building(
        nets.conv_autoencoder, image_shape=(1, 4, 4), latent_dim=2, channels=(4,), context_dim=0
    ),
    "DenseField": building(
        nets.fields.DenseField,
        num_variables=2,
        num_classes=3,
        hidden=(4,),
        context_dim=0,
        missing=False,
    ),
    "ConvField": building(
        nets.fields.ConvField,
        height=2,
        width=2,
        num_classes=3,
        channels=8,
        num_blocks=1,
        context_dim=0,
        missing=False,
    ),
    "LeaveOneOutField": building(
        nets.fields.LeaveOneOutField,
        num_variables=2,
        num_classes=3,
        widths=(4, 4),
        head=4,
        context_dim=0,
        missing=False,
    ),
    "FreeFormInjection": building(
        flows.FreeFormInjection,
        encoder=Fresh(lambda: network_pair()[0]),
        decoder=Fresh(lambda: network_pair()[1]),
        latent_shape=(2,),
        data_shape=(5,),
    ),
    "AngularSpline": building(
        flows.AngularSpline,
        num_coordinates=2,
        width=8,
        num_blocks=1,
        num_bins=4,
        bound=3.0,
        num_frequencies=1,
        context_dim=0,
        reverse_mask=False,
        max_log_scale=3.0,
        gain=1.0,
    ),
    "AsRotation": building(flows.AsRotation, form="quaternion", off_manifold="reject"),
    "HopfChart": building(flows.HopfChart, off_manifold="reject"),
    "HopfCoupling": building(
        flows.HopfCoupling,
        num_orders=2,
        width=4,
        num_blocks=1,
        context_dim=0,
        off_manifold="reject",
        axis=1,
        rows=False,
    ),
    "GraphSurface": building(
        flows.GraphSurface, f=decode, off_manifold="reject", measure="hausdorff"
    ),
    "InChart": building(
        flows.InChart,
        flow=Fresh(lambda: flows.SphereLinear(3)),
        chart=Fresh(lambda: flows.SphereChart(3)),
    ),
    "InjectiveComposite": building(
        flows.InjectiveComposite,
        flows=Fresh(lambda: [injection(), nf.flows.LULinearPermute(5)]),
        likelihood=Fresh(nfi.SurrogateLikelihood),
    ),
    "LinearInjection": building(flows.LinearInjection, latent_dim=2, data_dim=5),
    "Pad": building(flows.Pad, latent_dim=2, data_dim=5),
    "RadialSurface": building(
        flows.RadialSurface,
        gauge=Fresh(lambda: gauges.LpGauge(1.0)),
        level=2.0,
        measure="hausdorff",
        off_manifold="reject",
    ),
    "RadialSurface in context": building(
        flows.RadialSurface,
        gauge=Fresh(lambda: gauges.LpGauge(1.0)),
        level_from_context=Fresh(lambda: 1, "column"),
    ),
    "Reshape": building(flows.Reshape, latent_shape=(4,), data_shape=(1, 2, 2)),
    "SimplexFromOrthant": building(
        flows.SimplexFromOrthant,
        dim=3,
        kind="radial",
        measure="lebesgue",
        total=1.0,
        off_manifold="reject",
    ),
    "SimplexLift": building(
        flows.SimplexLift,
        num_variables=2,
        num_classes=[2, 3],
        measure="lebesgue",
        off_manifold="reject",
    ),
    "SimplexStickBreaking": building(
        flows.SimplexStickBreaking,
        dim=3,
        kind="normal",
        measure="lebesgue",
        total=1.0,
        off_manifold="reject",
    ),
    "SphereChart": building(flows.SphereChart, dim=3, kind="cot", off_manifold="reject"),
    "SphereLinear": building(flows.SphereLinear, dim=3, rotate=False, off_manifold="reject"),
    "latent_block": building(
        flows.latent_block, dim=3, kind="mixed", num_layers=2, hidden=(4,), context_dim=1
    ),
    "FlowMatching": building(
        flows.FlowMatching,
        dim=2,
        hidden=(4,),
        context_dim=1,
        steps=2,
        solver="rk4",
        divergence="exact",
        num_probes=2,
    ),
    "Standardise": building(flows.Standardise, shape=(2, 2, 2)),
    "Standardise.fit": building(
        flows.Standardise.fit,
        x=Fresh(lambda: torch.randn(8, 3), "batch"),
        transform="none",
        names=Fresh(lambda: ["a", "b", "c"], "anything"),
    ),
    "rotation_flow": building(
        flows.rotation_flow,
        num_layers=1,
        context_dim=0,
        form="matrix",
        width=4,
        num_blocks=1,
        num_orders=2,
        off_manifold="reject",
    ),
    "star_like_flow": building(
        flows.star_like_flow,
        dim=3,
        gauge=Fresh(lambda: gauges.LpGauge(1.5)),
        level=2.0,
        measure="hausdorff",
        context_dim=0,
        chart="cot",
        num_layers=1,
        width=4,
        num_blocks=1,
        num_bins=4,
        bound=3.0,
        num_frequencies=1,
        off_manifold="reject",
    ),
    "ElasticNetGauge": building(gauges.ElasticNetGauge, l1=1.0, l2=2.0),
    "EllipsoidGauge": building(
        gauges.EllipsoidGauge, axes=Fresh(lambda: 0.5 + torch.rand(3), "axes"), trainable=False
    ),
    "GroupLassoGauge": building(
        gauges.GroupLassoGauge,
        groups=Fresh(lambda: [[0], [1, 2]], "groups"),
        weights=Fresh(lambda: [1.0, 2.0]),
    ),
    "HyperplaneGauge": building(
        gauges.HyperplaneGauge, weights=Fresh(lambda: 0.5 + torch.rand(3), "axes")
    ),
    "ImplicitGauge": building(
        gauges.ImplicitGauge,
        function=lambda x: x.square().sum(1),
        log_bounds=(-20.0, 20.0),
    ),
    "LpGauge": building(gauges.LpGauge, p=1.5, eps=0.1),
    "NetworkRadius": building(
        gauges.NetworkRadius,
        net=Fresh(lambda: nn.Linear(3, 1)),
        r_min=0.5,
        r_max=2.0,
        even=False,
    ),
    "SlopeGauge": building(gauges.SlopeGauge, weights=Fresh(lambda: [3.0, 2.0, 1.0])),
    "ActNorm": building(coupling.ActNorm, dim=3),
    "Affine": building(coupling.Affine, max_log_scale=2.0),
    "CentredAffine": building(coupling.CentredAffine, max_log_scale=2.0),
    "Spline": building(coupling.Spline, num_bins=4, bound=3.0),
    "Autoregressive": building(
        coupling.Autoregressive,
        dim=3,
        transform=Fresh(coupling.Affine),
        width=4,
        num_blocks=1,
        context_dim=0,
        reverse=False,
    ),
    "Coupling": building(
        coupling.Coupling,
        dim=4,
        conditioner=Fresh(lambda: nn.Linear(2, 4)),
        transform=Fresh(coupling.Affine),
        reverse=False,
    ),
    "Householder": building(coupling.Householder, dim=3, num_reflections=2),
    "LULinear": building(coupling.LULinear, dim=3),
    "Permutation": building(coupling.Permutation, dim=3),
    "NetworkCoupling": building(
        coupling.NetworkCoupling,
        dim=3,
        transform=Fresh(coupling.Affine),
        hidden=(4,),
        context_dim=0,
        reverse=False,
        activation=nn.GELU,
    ),
    "KernelCoupling": building(
        kernel.KernelCoupling,
        dim=3,
        num_auxiliary=5,
        kernel="rbf",
        share_kernel=True,
        ard=True,
        learn_auxiliary=True,
        context_dim=0,
        reverse=False,
        transform=Fresh(coupling.Affine),
        precondition=True,
    ),
    "KernelExpansion": building(
        kernel.KernelExpansion,
        in_features=2,
        out_features=3,
        num_auxiliary=5,
        kernel="rbf",
        num_scales=1,
        ard=True,
        learn_auxiliary=True,
        context_dim=0,
        precondition=True,
    ),
    "ferumal_glow": building(kernel.ferumal_glow, dim=3, num_steps=1, num_auxiliary=5),
    "ferumal_realnvp": building(kernel.ferumal_realnvp, dim=3, num_layers=1, num_auxiliary=5),
    "rkhs_penalty": building(
        kernel.rkhs_penalty, parts=Fresh(lambda: [kernel.KernelCoupling(3, 5)])
    ),
    "ChannelMixing": building(
        mixer.ChannelMixing,
        image_shape=(1, 4, 4),
        patch_size=2,
        layers=Fresh(lambda: [coupling.LULinear(4)]),
        context_dim=0,
        embedding_dim=0,
    ),
    "PatchMixing": building(
        mixer.PatchMixing,
        image_shape=(1, 4, 4),
        patch_size=2,
        layers=Fresh(lambda: [coupling.LULinear(4)]),
        context_dim=0,
        embedding_dim=0,
    ),
    "PatchShift": building(
        mixer.PatchShift, kind="roll", image_shape=(1, 4, 6), patch_size=2, back=False
    ),
    "PatchShift of layers": building(
        mixer.PatchShift,
        kind="interior",
        image_shape=(1, 4, 6),
        patch_size=2,
        layers=lambda shape: [mixer.ChannelMixing(shape, 2, [coupling.LULinear(4)])],
    ),
    "Patchify": building(mixer.Patchify, image_shape=(1, 4, 4), patch_size=2),
    "bits_per_dim": building(
        mixer.bits_per_dim, log_prob=Fresh(lambda: torch.randn(ROWS)), num_dims=4, bits=5
    ),
    "dequantise": building(
        mixer.dequantise,
        pixels=Fresh(lambda: torch.randint(32, (ROWS, 1, 2, 2))),
        bits=5,
        stored_bits=5,
        generator=Fresh(torch.Generator),
    ),
    "mixer_flow": building(
        mixer.mixer_flow,
        image_shape=(1, 4, 4),
        patch_size=2,
        layers=1,
        hidden=(4,),
        element="affine",
        linear="auto",
        shift="none",
        num_steps=1,
        context_dim=0,
        embedding_dim=0,
    ),
    "GINCoupling": building(
        preserving.GINCoupling,
        dim=4,
        hidden=(4,),
        context_dim=0,
        reverse=False,
        max_log_scale=2.0,
        activation=nn.GELU,
    ),
    "NICECoupling": building(
        preserving.NICECoupling,
        dim=4,
        hidden=(4,),
        context_dim=0,
        reverse=False,
        activation=nn.GELU,
    ),
    "GlobalScale": building(preserving.GlobalScale, shape=(1, 2, 2)),
    "RadialFlow1D": building(
        preserving.RadialFlow1D, dim=3, num_bins=5, log_range=Fresh(lambda: (-1.0, 2.0))
    ),
    "RadialFlow1D.from_data": building(
        preserving.RadialFlow1D.from_data, z=Fresh(lambda: torch.randn(64, 3)), num_bins=5
    ),
    "Rotation": building(preserving.Rotation, matrix=Fresh(lambda: torch.eye(3), "axes")),
    "Rotation of a number": building(preserving.Rotation, matrix=3),
    "random_rotation": building(
        preserving.random_rotation, dim=3, generator=Fresh(torch.Generator)
    ),
    "AssignmentField": building(
        assignment.AssignmentField,
        net=Fresh(field_network),
        path=Fresh(assignment_path, "anything"),
        parametrisation=Fresh(assignment.Classifier),
        features="posterior",
        missing=False,
    ),
    "AssignmentLayer": building(
        assignment.AssignmentLayer,
        field=Fresh(assignment_field, "anything"),
        steps=3,
        solver="rk4",
        divergence="exact",
        num_probes=2,
    ),
    "AssignmentPath": building(
        assignment.AssignmentPath,
        simplices=Fresh(lambda: assignment.Simplices(2, 3), "anything"),
        horizon=Fresh(assignment.InfiniteHorizon),
    ),
    "FiniteHorizon": building(assignment.FiniteHorizon, smoothing=0.01, end=0.9),
    "InfiniteHorizon": building(
        assignment.InfiniteHorizon, scale=0.5, end=15.0, time_shape=2.0, time_rate=1.0
    ),
    "Simplices": building(assignment.Simplices, num_variables=2, num_classes=3),
    "Simplices of lists": building(assignment.Simplices, num_variables=2, num_classes=[2, 3]),
    "choose_horizon": building(
        assignment.choose_horizon,
        num_variables=2,
        num_classes=3,
        error=0.01,
        horizon="infinite",
        solver="rk4",
    ),
    "rounding_error": building(
        assignment.rounding_error,
        horizon=Fresh(assignment.InfiniteHorizon),
        num_variables=2,
        num_classes=3,
    ),
    "AngularCentralGaussian": building(
        distributions.AngularCentralGaussian,
        scale=Fresh(lambda: torch.eye(3), "axes"),
        trainable=False,
        off_manifold="reject",
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
    "MomentBlock": building(diagnostics.MomentBlock, dim=3, step_size=0.5),
    "injective_flow": building(
        nfi.injective_flow,
        data=Fresh(lambda: torch.randn(8, 4), "anything"),
        latent_dim=2,
        context_dim=0,
        hidden=(4,),
        num_couplings=1,
        transform="none",
    ),
    "AveragedWeights": building(
        nfi.training.AveragedWeights,
        parameters=Fresh(lambda: [torch.randn(2)], "anything"),
    ),
    "column_report": building(
        diagnostics.column_report,
        x=Fresh(lambda: torch.randn(8, 3), "batch"),
        names=Fresh(lambda: ["a", "b", "c"], "anything"),
    ),
    "LayerwiseTrainer": building(
        diagnostics.LayerwiseTrainer,
        dim=3,
        step_size=0.5,
        candidates=2,
        max_layers=3,
        stop_errors=2.0,
        patience=1,
        regression=Fresh(diagnostics.MomentRegression, "anything"),
        generator=Fresh(torch.Generator),
    ),
    "Conditional": building(volume.Conditional, opposite=False),
    "ConjugateGradient": building(volume.ConjugateGradient, max_iterations=3, tolerance=1e-6),
    "SurrogateLikelihood": building(
        nfi.SurrogateLikelihood,
        beta=Fresh(lambda: 10.0, "schedule"),
        num_probes=1,
        estimator="encoder",
        probes="orthonormal",
        warmup_steps=Fresh(lambda: (2, 5), "window"),
        input_noise=0.1,
        latent_cycle=0.1,
        compile=False,
    ),
    "ExactLikelihood": building(nfi.ExactLikelihood, beta=1.0),
    "ForwardKLD": building(nfi.ForwardKLD, model=Fresh(injective_model)),
    "InjectiveNormalizingFlow": building(
        nfi.InjectiveNormalizingFlow,
        q0=Fresh(lambda: base(2)),
        flows=Fresh(lambda: [injection()]),
        likelihood=Fresh(nfi.SurrogateLikelihood),
    ),
    "AssignmentFlow": building(
        nfi.AssignmentFlow,
        net=Fresh(field_network),
        num_variables=2,
        num_classes=3,
        horizon="infinite",
        parametrisation="classifier",
        features="posterior",
        missing=False,
    ),
}

"""A valid call of every public name, for the fuzzer to spoil. Adding a name is adding a line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import normflows as nf
import torch
from support.registry import GAUGES, LAYERS
from torch import Tensor, nn

import normflows_injective as nfi
from normflows_injective import diagnostics, distributions, flows, nets, volume
from normflows_injective.flows import assignment, coupling, gauges, kernel, mixer
from normflows_injective.flows import volume_preserving as preserving

ROWS = 4
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """A function with valid arguments by name, made afresh for every example.

    ``rows`` names the argument whose first dimension all tensors of the result must have, and
    ``kinds`` says what an argument is where its valid value does not show it. ``finite`` says
    that NaN in the arguments must be refused rather than passed on.
    """

    make: Callable[[], tuple[Callable[..., Any], Arguments]]
    rows: str | None = None
    kinds: dict[str, str] = field(default_factory=dict)
    finite: bool = False


def building(kind: Callable[..., Any], /, **arguments: Any) -> Call:
    """The call of a constructor; arguments that are functions without a name are made afresh."""

    def make() -> tuple[Callable[..., Any], Arguments]:
        return kind, {n: v() if isinstance(v, Fresh) else v for n, v in arguments.items()}

    fixed = {n: v.kind for n, v in arguments.items() if isinstance(v, Fresh) and v.kind}
    return Call(make, kinds=fixed)


class Fresh:
    """An argument that is made for every example."""

    def __init__(self, make: Callable[[], Any], kind: str | None = None) -> None:
        self.make, self.kind = make, kind

    def __call__(self) -> Any:
        return self.make()


def _pair() -> list[nn.Module]:
    return list(nets.mlp_autoencoder(5, 2, (6,)))


def _base(dim: int = 2) -> nn.Module:
    return nf.distributions.DiagGaussian(dim, trainable=False)


def _injection() -> nn.Module:
    return flows.FreeFormInjection(*_pair())


def injective_model(**options: Any) -> nfi.InjectiveNormalizingFlow:
    return nfi.InjectiveNormalizingFlow(_base(), [_injection()], **options)


def _conditional() -> nfi.InjectiveNormalizingFlow:
    pair = nets.mlp_autoencoder(5, 2, (6,), context_dim=3)
    return nfi.InjectiveNormalizingFlow(_base(), [flows.FreeFormInjection(*pair)])


def _on_sphere() -> nfi.InjectiveNormalizingFlow:
    return flows.star_like_flow(3, num_layers=1, width=8, p=distributions.UniformSphere(3))


def _field() -> nn.Module:
    return nets.fields.DenseField(2, 3, (8,))


def _flow(**options: Any) -> nfi.AssignmentFlow:
    return nfi.AssignmentFlow(_field(), 2, 3, **options)


def assignment_path() -> assignment.AssignmentPath:
    return assignment.AssignmentPath(assignment.Simplices(2, 3), assignment.InfiniteHorizon())


def assignment_field() -> assignment.AssignmentField:
    return assignment.AssignmentField(_field(), assignment_path(), assignment.Classifier())


def decode(z: Tensor) -> Tensor:
    return torch.cat([z, z.square()], 1)


def encode(x: Tensor) -> Tensor:
    return x.flatten(1)[:, :2]


def _one_probe(z: Tensor) -> Tensor:
    return torch.ones(1, *z.shape)


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
        encoder=Fresh(lambda: _pair()[0]),
        decoder=Fresh(lambda: _pair()[1]),
        latent_shape=(2,),
        data_shape=(5,),
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
        flows=Fresh(lambda: [_injection(), nf.flows.LULinearPermute(5)]),
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
        net=Fresh(_field),
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
    "UniformSphere": building(distributions.UniformSphere, dim=3, off_manifold="reject"),
    "VonMisesFisher": building(
        distributions.VonMisesFisher,
        loc=Fresh(lambda: torch.tensor([1.0, 0.0, 0.0]), "axes"),
        concentration=2.0,
        trainable=False,
        off_manifold="reject",
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
        q0=Fresh(_base),
        flows=Fresh(lambda: [_injection()]),
        likelihood=Fresh(nfi.SurrogateLikelihood),
    ),
    "AssignmentFlow": building(
        nfi.AssignmentFlow,
        net=Fresh(_field),
        num_variables=2,
        num_classes=3,
        horizon="infinite",
        parametrisation="classifier",
        features="posterior",
        missing=False,
    ),
}


def method(
    make: Callable[[], Any],
    name: str,
    rows: str | None = None,
    /,
    finite: bool = False,
    kinds: dict[str, str] | None = None,
    **arguments: Any,
) -> Call:
    """The call of a method of an object that is made for every example."""

    def build() -> tuple[Callable[..., Any], Arguments]:
        return getattr(make(), name), {
            n: v() if isinstance(v, Fresh) else v for n, v in arguments.items()
        }

    return Call(build, rows, {**(kinds or {})}, finite)


def function(
    called: Callable[..., Any],
    rows: str | None = None,
    /,
    finite: bool = False,
    **arguments: Any,
) -> Call:
    """The call of a function on tensors."""

    def build() -> tuple[Callable[..., Any], Arguments]:
        return called, {n: v() if isinstance(v, Fresh) else v for n, v in arguments.items()}

    return Call(build, rows, {}, finite)


def normal(*shape: int) -> Fresh:
    return Fresh(lambda: torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(1)))


def directions(dim: int) -> Fresh:
    return Fresh(lambda: nn.functional.normalize(torch.rand(ROWS, dim) + 0.1, dim=1))


CONTEXT = {"context": "context"}
NO_CONTEXT = Fresh(lambda: None)


def _of_models() -> dict[str, Call]:
    calls = {}
    x, z = normal(5), normal(2)
    options: dict[str, Any] = {"finite": True, "kinds": CONTEXT, "context": NO_CONTEXT}
    for name in (
        "encode",
        "inverse",
        "inverse_and_log_det",
        "log_prob",
        "project",
        "reconstruction_error",
        "loss_terms",
    ):
        calls[f"model.{name}"] = method(injective_model, name, "x", x=x, **options)
    for name in ("decode", "forward", "forward_and_log_det"):
        calls[f"model.{name}"] = method(injective_model, name, "z", z=z, **options)
    calls["model.forward_kld"] = method(injective_model, "forward_kld", x=x, **options)
    given = {**options, "context": normal(3)}
    for name in ("log_prob", "forward_kld", "encode"):
        calls[f"conditional.{name}"] = method(_conditional, name, x=x, **given)
    calls["conditional.sample"] = method(_conditional, "sample", num_samples=ROWS, **given)
    calls["model.sample"] = method(
        injective_model, "sample", num_samples=3, log_prob=True, **options
    )
    calls["ForwardKLD.forward"] = method(
        lambda: nfi.ForwardKLD(injective_model()), "forward", x=x, **options
    )
    calls["star_like.reverse_kld"] = method(
        _on_sphere, "reverse_kld", num_samples=3, beta=1.0, score_fn=True
    )
    calls["star_like.reverse_alpha_div"] = method(
        _on_sphere, "reverse_alpha_div", num_samples=3, alpha=0.5, dreg=False, beta=1.0
    )
    likelihood = functools.partial(nfi.SurrogateLikelihood, latent_cycle=0.1)
    arguments = {"x": normal(4), "encode": encode, "decode": decode, "prior": z}
    calls["SurrogateLikelihood.forward"] = method(likelihood, "forward", "x", **arguments)
    labels = Fresh(lambda: torch.randint(3, (ROWS, 2)))
    for name in ("flow_matching_loss", "loss_terms", "forward"):
        calls[f"AssignmentFlow.{name}"] = method(
            _flow, name, labels=labels, context=NO_CONTEXT, kinds=CONTEXT, finite=True
        )
    calls["AssignmentFlow.masked loss"] = method(
        lambda: nfi.AssignmentFlow(
            nets.fields.DenseField(2, 3, (8,), missing=True), 2, 3, missing=True
        ),
        "flow_matching_loss",
        labels=labels,
        mask=Fresh(lambda: torch.rand(ROWS, 2) > 0.5),
    )
    calls["AssignmentFlow.sample"] = method(
        _flow,
        "sample",
        num_samples=3,
        steps=3,
        solver="rk4",
        reading="rounding",
        context=NO_CONTEXT,
        max_rows=8,
        progress=False,
        kinds=CONTEXT,
    )
    calls["AssignmentFlow.log_prob"] = method(
        _flow,
        "log_prob",
        "labels",
        labels=labels,
        num_importance_samples=2,
        divergence="exact",
        steps=3,
        solver="euler",
        reading="rounding",
        num_probes=2,
        max_rows=8,
        progress=False,
    )
    calls["AssignmentFlow.layer"] = method(
        _flow, "layer", steps=3, solver="rk4", divergence="exact", num_probes=2
    )
    return calls


def _of_layers() -> dict[str, Call]:
    calls = {}
    for name, case in LAYERS.items():
        context = normal(case.context_dim) if case.context_dim else NO_CONTEXT
        z = Fresh(lambda case=case: case.latents(torch.randn(ROWS, *case.latent_shape)))
        built = case.build
        sides: list[tuple[str, str, Fresh]] = [("forward", "z", z)]
        x = Fresh(lambda case=case, z=z, context=context: _points(case, z(), context()))
        sides.append(("inverse", next(iter(signature(built().inverse).parameters)), x))
        if isinstance(built(), nfi.flows.Injection):
            sides += [("decode", "z", z), ("decode_and_log_volume", "z", z), ("encode", "x", x)]
        for called, argument, batch in sides:
            calls[f"{name}.{called}"] = method(
                built, called, argument, kinds=CONTEXT, context=context, **{argument: batch}
            )
    return calls


def _points(case: Any, z: Tensor, context: Tensor | None) -> Tensor:
    torch.manual_seed(0)  # The layer of the call is built from the same seed.
    return case.build()(z, context)[0].detach()


def _of_gauges() -> dict[str, Call]:
    calls = {}
    level = Fresh(lambda: torch.tensor(2.0))
    for name, case in GAUGES.items():
        make = functools.partial(case.build, 3)
        u, gauge = directions(3), make()
        options: dict[str, Any] = {"kinds": CONTEXT, "context": NO_CONTEXT}
        for called in ("log_radius", "radius_and_secant"):
            calls[f"{name}.{called}"] = method(make, called, "u", u=u, level=level, **options)
        for called in ("value", "log_value"):
            if hasattr(gauge, called):
                calls[f"{name}.{called}"] = method(make, called, "x", x=u, **options)
        for called in ("log_cone_mass", "log_area"):
            calls[f"{name}.{called}"] = method(make, called, dim=3, level=level)
        like = Fresh(lambda: torch.zeros(()))
        calls[f"{name}.sample_cone"] = method(make, "sample_cone", num_samples=3, dim=3, like=like)
    return calls


def _of_laws() -> dict[str, Call]:
    laws: dict[str, Callable[[], nn.Module]] = {
        "UniformSphere": lambda: distributions.UniformSphere(3),
        "VonMisesFisher": lambda: distributions.VonMisesFisher([1.0, 0.0, 0.0], 2.0),
        "AngularCentralGaussian": lambda: distributions.AngularCentralGaussian(torch.eye(3)),
        "UniformOnSurface": lambda: distributions.UniformOnSurface(
            gauges.LpGauge(2.0), dim=3, num_directions=64
        ),
    }
    calls = {}
    for name, make in laws.items():
        calls[f"{name}.log_prob"] = method(make, "log_prob", "x", x=directions(3))
        calls[f"{name}.forward"] = method(make, "forward", num_samples=3)
        calls[f"{name}.sample"] = method(make, "sample", num_samples=3)
    pullback = functools.partial(
        distributions.Pullback, distributions.UniformSphere(3), flows.SphereChart(3)
    )
    calls["Pullback.log_prob"] = method(pullback, "log_prob", "z", z=normal(2))
    calls["Pullback.forward"] = method(pullback, "forward", num_samples=3)
    return calls


def _of_networks() -> dict[str, Call]:
    makes: dict[str, tuple[Callable[[], nn.Module], str, Fresh, int]] = {
        "SmoothMLP": (lambda: nets.SmoothMLP(3, 2, (4,)), "x", normal(3), 0),
        "SmoothMLP in context": (lambda: nets.SmoothMLP(3, 2, (4,), 2), "x", normal(3), 2),
        "ResidualMLP": (lambda: nets.ResidualMLP(3, 2, 4, 1, 2), "x", normal(3), 2),
        "ConvEncoder": (lambda: nets.ConvEncoder((1, 4, 4), 2, (4,)), "x", normal(1, 4, 4), 0),
        "ConvDecoder": (lambda: nets.ConvDecoder((1, 4, 4), 2, (4,), 2), "z", normal(2), 2),
        "KernelExpansion": (lambda: kernel.KernelExpansion(2, 3, 5), "x", normal(2), 0),
    }
    calls = {}
    for name, (make, argument, batch, width) in makes.items():
        context = normal(width) if width else NO_CONTEXT
        calls[f"{name}.forward"] = method(
            make, "forward", argument, kinds=CONTEXT, context=context, **{argument: batch}
        )
    times = Fresh(lambda: torch.rand(ROWS))
    fields = {
        "DenseField": lambda: nets.fields.DenseField(4, 3, (4,)),
        "ConvField": lambda: nets.fields.ConvField(2, 2, 3, 8),
        "LeaveOneOutField": lambda: nets.fields.LeaveOneOutField(4, 3, (4,), 4),
    }
    for name, make in fields.items():
        calls[f"{name}.forward"] = method(
            make,
            "forward",
            "features",
            kinds=CONTEXT,
            features=normal(4, 3),
            t=times,
            context=NO_CONTEXT,
        )
    for name, kind in (("Additive", 1), ("Affine", 2), ("CentredAffine", 2), ("Spline", 11)):
        make = {"Spline": lambda: coupling.Spline(4)}.get(name, getattr(coupling, name))
        for called, argument in (("forward", "z"), ("inverse", "x")):
            arguments = {argument: normal(3), "parameters": normal(3, kind)}
            calls[f"{name}.{called}"] = method(make, called, argument, **arguments)
    return calls


def _of_assignment() -> dict[str, Call]:
    simplices = functools.partial(assignment.Simplices, 2, 3)
    labels = Fresh(lambda: torch.randint(3, (ROWS, 2)))
    v, t = normal(2, 3), Fresh(lambda: torch.rand(ROWS))
    calls = {
        "Simplices.check_labels": method(
            simplices, "check_labels", labels=labels, mask=Fresh(lambda: torch.rand(ROWS, 2) > 0.5)
        ),
        "Simplices.corners": method(simplices, "corners", labels=labels, like=v),
        "Simplices.from_coordinates": method(simplices, "from_coordinates", "m", m=normal(4)),
        "Simplices.mean_corner": method(simplices, "mean_corner", weights=v),
        "Simplices.replicator": method(simplices, "replicator", weights=v, v=v),
        "AssignmentPath.draw_start": method(assignment_path, "draw_start", num=3, like=v),
        "AssignmentPath.logits": method(
            assignment_path, "logits", "labels", labels=labels, start=v, t=t
        ),
        "AssignmentPath.velocity": method(
            assignment_path, "velocity", "labels", labels=labels, start=v
        ),
        "AssignmentPath.evidence": method(assignment_path, "evidence", "v", v=v, t=t),
        "AssignmentPath.marginal_field": method(
            assignment_path, "marginal_field", "v", posterior=v, v=v, t=t
        ),
        "AssignmentField.forward": method(assignment_field, "forward", "v", v=v, t=t),
        "AssignmentField.field_and_divergence": method(
            lambda: assignment.AssignmentField(
                nets.fields.LeaveOneOutField(2, 3, (4,), 4),
                assignment_path(),
                assignment.Classifier(),
            ),
            "field_and_divergence",
            "v",
            v=v,
            t=t,
        ),
        "AssignmentField.loss": method(
            assignment_field, "loss", "labels", labels=labels, start=v, t=t
        ),
        "InfiniteHorizon.draw_times": method(
            assignment.InfiniteHorizon, "draw_times", num=3, like=v
        ),
    }
    column = Fresh(lambda: torch.rand(ROWS, 1, 1))
    for kind in (assignment.FiniteHorizon, assignment.InfiniteHorizon):
        calls[f"{kind.__name__}.scaled"] = method(kind, "scaled", "v", v=v, t=column)
    for name in ("weights", "log_weights", "mean_free", "round"):
        calls[f"Simplices.{name}"] = method(simplices, name, v=v)
    calls["Simplices.to_coordinates"] = method(simplices, "to_coordinates", "v", v=v)
    layer = functools.partial(assignment.AssignmentLayer, assignment_field(), steps=2)
    calls["AssignmentLayer.forward"] = method(layer, "forward", "z", z=normal(4))
    calls["AssignmentLayer.inverse"] = method(layer, "inverse", "x", x=normal(4))
    return calls


def _gains_of_blocks(**arguments: Any) -> Tensor:
    """What the blocks of a short construction gain; a refusal that never came is NaN."""
    regression = diagnostics.MomentRegression((4,), 2, 64)
    trainer = diagnostics.LayerwiseTrainer(2, candidates=1, max_layers=1, regression=regression)
    return trainer.fit(**arguments).history.gains


def _of_functions() -> dict[str, Call]:
    z, x = normal(2), normal(4)
    regression = Fresh(lambda: diagnostics.MomentRegression((4,), 2, 64))
    calls = {
        "conjugate_gradient": function(
            volume.conjugate_gradient,
            product=lambda p: 2 * p,
            v=Fresh(lambda: torch.randn(2, ROWS, 3)),
            max_iterations=3,
            tolerance=1e-6,
        ),
        "decode_and_log_volume": function(
            volume.decode_and_log_volume, "z", decode=decode, z=z, chunk_size=2
        ),
        "draw_probes": function(volume.draw_probes, kind="orthonormal", num_probes=1, z=z),
        "jacobian": function(volume.jacobian, "point", function=decode, point=z, chunk_size=2),
        "log_volume": function(volume.log_volume, "z", decode=decode, z=z, method="exact"),
        "log_volume by Lanczos": function(
            volume.log_volume,
            "z",
            decode=decode,
            z=z,
            chunk_size=2,
            method="lanczos",
            num_probes=2,
            num_steps=4,
        ),
        "coupling_gap": function(
            diagnostics.coupling_gap,
            finite=True,
            z=Fresh(lambda: torch.randn(200, 3)),
            num_rotations=1,
            num_active=1,
            num_folds=2,
            regression=regression,
            generator=Fresh(torch.Generator),
        ),
        "frechet_distance": function(
            diagnostics.frechet_distance,
            finite=True,
            samples=normal(2),
            reference=Fresh(lambda: torch.randn(6, 2)),
        ),
        "injectivity_report": function(
            diagnostics.injectivity_report,
            finite=True,
            model=Fresh(injective_model),
            x=normal(5),
            num_gradient_samples=1,
        ),
        "volume_preserving_floor": function(
            diagnostics.volume_preserving_floor,
            finite=True,
            log_prob=Fresh(lambda: torch.randn(120)),
            dim=2,
        ),
        "volume_preserving_floor_on_box": function(
            diagnostics.volume_preserving_floor_on_box,
            finite=True,
            log_prob=lambda x: -x.square().sum(1),
            low=(-3.0, -3.0),
            high=(3.0, 3.0),
            num_cells=8,
        ),
        "LayerwiseTrainer.fit": function(
            _gains_of_blocks,
            finite=True,
            x=Fresh(lambda: torch.randn(200, 2)),
            given=Fresh(lambda: [nf.flows.LULinearPermute(2)]),
        ),
    }
    estimators = {"Conditional": volume.Conditional, "ConjugateGradient": volume.ConjugateGradient}
    for name, kind in estimators.items():
        arguments = {"x": x, "encode": encode, "decode": decode, "draw_probes": _one_probe}
        calls[f"{name}.call"] = method(kind, "__call__", "x", **arguments)
    return calls


def main_calls() -> dict[str, Call]:
    """These calls by their name."""
    torch.manual_seed(0)
    return {
        **BUILDERS,
        **_of_models(),
        **_of_layers(),
        **_of_gauges(),
        **_of_laws(),
        **_of_networks(),
        **_of_assignment(),
        **_of_functions(),
    }

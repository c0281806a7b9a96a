"""A valid call of every public name, for the fuzzer to spoil. Adding a name is adding a line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from inspect import signature
from typing import Any

import normflows as nf
import torch
from support.registry import GAUGES, LAYERS
from torch import Tensor, nn

import normflows_injective as nfi
from fuzz.constructors import BUILDERS
from fuzz.making import (
    CONTEXT,
    NO_CONTEXT,
    ROWS,
    Call,
    Fresh,
    building,
    directions,
    function,
    method,
    normal,
)
from fuzz.models import (
    assignment_field,
    assignment_flow,
    assignment_path,
    conditional_model,
    decode,
    encode,
    injective_model,
    model_on_sphere,
    one_probe,
)
from normflows_injective import diagnostics, distributions, flows, nets, volume
from normflows_injective.flows import assignment, coupling, gauges, kernel


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
    for name in ("forward_kld", "validation_score"):
        calls[f"model.{name}"] = method(injective_model, name, x=x, **options)
    with_context = {**options, "context": normal(3)}
    for name in ("log_prob", "forward_kld", "encode"):
        calls[f"conditional.{name}"] = method(conditional_model, name, x=x, **with_context)
    calls["conditional.sample"] = method(
        conditional_model, "sample", num_samples=ROWS, **with_context
    )
    calls["model.sample"] = method(
        injective_model, "sample", num_samples=3, log_prob=True, **options
    )
    calls["ForwardKLD.forward"] = method(
        lambda: nfi.ForwardKLD(injective_model()), "forward", x=x, **options
    )
    calls["star_like.reverse_kld"] = method(
        model_on_sphere, "reverse_kld", num_samples=3, beta=1.0, score_fn=True
    )
    calls["star_like.reverse_alpha_div"] = method(
        model_on_sphere, "reverse_alpha_div", num_samples=3, alpha=0.5, dreg=False, beta=1.0
    )
    likelihood = functools.partial(nfi.SurrogateLikelihood, latent_cycle=0.1)
    arguments = {"x": normal(4), "encode": encode, "decode": decode, "prior": z}
    calls["SurrogateLikelihood.forward"] = method(likelihood, "forward", "x", **arguments)
    labels = Fresh(lambda: torch.randint(3, (ROWS, 2)))
    for name in ("flow_matching_loss", "loss_terms", "forward"):
        calls[f"AssignmentFlow.{name}"] = method(
            assignment_flow, name, labels=labels, context=NO_CONTEXT, kinds=CONTEXT, finite=True
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
        assignment_flow,
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
        assignment_flow,
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
        assignment_flow, "layer", steps=3, solver="rk4", divergence="exact", num_probes=2
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
    laws: dict[str, Callable[[], Any]] = {
        "UniformSphere": lambda: distributions.UniformSphere(3),
        "VonMisesFisher": lambda: distributions.VonMisesFisher([1.0, 0.0, 0.0], 2.0),
        "PowerSpherical": lambda: distributions.PowerSpherical([1.0, 0.0, 0.0], 2.0),
        "AngularCentralGaussian": lambda: distributions.AngularCentralGaussian(torch.eye(3)),
        "UniformTorus": lambda: distributions.UniformTorus(3),
        "VonMises": lambda: distributions.VonMises([1.0, 0.0, 3.0], 2.0),
        "WrappedNormal": lambda: distributions.WrappedNormal([1.0, 0.0, 3.0], 0.5),
        "UniformOnSurface": lambda: distributions.UniformOnSurface(
            gauges.LpGauge(2.0), dim=3, num_directions=64
        ),
    }
    rotations: dict[str, Callable[[], nn.Module]] = {
        "UniformRotation": distributions.UniformRotation,
        "MatrixFisher": lambda: distributions.MatrixFisher(torch.eye(3)),
        "IsotropicGaussianRotation": lambda: distributions.IsotropicGaussianRotation(0.5),
    }
    calls = {}
    for name, make in (laws | rotations).items():
        points = directions(4 if name in rotations else 3)
        calls[f"{name}.log_prob"] = method(make, "log_prob", "x", x=points)
        calls[f"{name}.forward"] = method(make, "forward", num_samples=3)
        calls[f"{name}.sample"] = method(make, "sample", num_samples=3)
        if make().has_rsample:
            calls[f"{name}.rsample"] = method(make, "rsample", num_samples=3)
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
    for name, kind in (
        ("Additive", 1),
        ("Affine", 2),
        ("CentredAffine", 2),
        ("Spline", 11),
        ("MobiusMixture", 7),
    ):
        made = {
            "Spline": lambda: coupling.Spline(4),
            "MobiusMixture": lambda: coupling.MobiusMixture(2),
        }
        make = made.get(name, getattr(coupling, name))
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
        "ColumnReport.dequantise": method(
            lambda: diagnostics.column_report(torch.arange(12.0).view(4, 3) % 5),
            "dequantise",
            "x",
            x=normal(3),
            generator=Fresh(torch.Generator),
        ),
        "fit": building(
            nfi.training.fit,
            model=Fresh(injective_model),
            data=Fresh(lambda: torch.randn(8, 5), "anything"),
            steps=1,
            batch_size=4,
            learning_rate=0.01,
            weight_decay=0.1,
            seed=0,
        ),
        "alignment": function(
            diagnostics.alignment, "x", finite=True, encoder=encode, decoder=decode, x=normal(4)
        ),
        "score": function(
            nfi.score,
            finite=True,
            tables=("x", "reference"),
            model=Fresh(injective_model),
            x=normal(5),
            reference=Fresh(lambda: torch.randn(6, 5)),
            threshold=0.1,
        ),
        "injectivity_report": function(
            diagnostics.injectivity_report,
            finite=True,
            tables=("x",),
            model=Fresh(injective_model),
            x=normal(5),
            num_gradient_samples=1,
        ),
        "suggest_latent_dim": function(
            diagnostics.suggest_latent_dim,
            finite=True,
            tables=("x",),
            x=Fresh(lambda: torch.randn(40, 3)),
            standardise=True,
            num_steps=1,
            max_rows=100,
            generator=Fresh(torch.Generator),
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
        arguments = {"x": x, "encode": encode, "decode": decode, "draw_probes": one_probe}
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

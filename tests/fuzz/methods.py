"""Valid calls of the methods beside those that every layer, gauge, law and network has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from support.registry import GAUGES
from support.seeds import seeded_generator
from torch import Tensor, nn

import normflows_injective as nfi
from fuzz.calls import main_calls
from fuzz.making import (
    CONTEXT,
    NO_CONTEXT,
    ROWS,
    Call,
    Fresh,
    directions,
    function,
    method,
    normal,
)
from fuzz.models import assignment_field, assignment_path, decode, encode, injective_model
from normflows_injective import diagnostics, flows, nets, points
from normflows_injective.flows import assignment, coupling, gauges, kernel, mixer

__all__ = ["all_calls"]

_Options = dict[str, Any]


def _height(z: Tensor) -> Tensor:
    return z.square().sum(1)


def _of_surfaces() -> dict[str, Call]:
    sphere, simplex = directions(3), Fresh(lambda: torch.full((ROWS, 3), 1 / 3))
    level_set = Fresh(lambda: torch.full((ROWS, 3), 2 / 3))
    makes: dict[str, tuple[Callable[[], Any], Fresh, Fresh]] = {
        "GraphSurface": (
            lambda: flows.GraphSurface(_height),
            normal(2),
            Fresh(lambda: torch.cat([normal(2)(), _height(normal(2)())[:, None]], 1)),
        ),
        "RadialSurface": (
            lambda: flows.RadialSurface(gauges.LpGauge(1.0), level=2.0),
            sphere,
            level_set,
        ),
        "SimplexFromOrthant": (lambda: flows.SimplexFromOrthant(3), sphere, simplex),
        "SimplexStickBreaking": (lambda: flows.SimplexStickBreaking(3), normal(2), simplex),
        "AsRotation": (lambda: flows.AsRotation(), directions(4), directions(4)),
        "HopfChart": (lambda: flows.HopfChart(), normal(3), directions(4)),
        "HopfCoupling": (lambda: flows.HopfCoupling(width=8), directions(4), directions(4)),
        "SphereLinear": (lambda: flows.SphereLinear(3), sphere, sphere),
    }
    calls = {}
    for name, (make, z, x) in makes.items():
        for called, argument in (
            ("forward", "z"),
            ("inverse", "x"),
            ("decode", "z"),
            ("encode", "x"),
            ("decode_and_log_volume", "z"),
            ("log_stretch", "z"),
        ):
            if hasattr(make(), called):
                calls[f"{name}.{called}"] = method(
                    make,
                    called,
                    argument,
                    kinds=CONTEXT,
                    context=NO_CONTEXT,
                    **{argument: z if argument == "z" else x},
                )
    for name, case in GAUGES.items():
        make = functools.partial(case.build, 3)
        for called in ("unit_cone_mass", "log_slope_bounds"):
            if hasattr(make(), called):
                calls[f"{name}.{called}"] = method(make, called, dim=3)
    return calls


def _of_layers() -> dict[str, Call]:
    x, kept = normal(3), normal(1)

    def coupled() -> nn.Module:
        return coupling.NetworkCoupling(3, coupling.Affine(), (4,))

    def expansion() -> nn.Module:
        return kernel.KernelExpansion(2, 3, 5)

    options: _Options = {"kinds": CONTEXT, "context": NO_CONTEXT}
    return {
        "ActNorm.initialise": method(lambda: coupling.ActNorm(3), "initialise", finite=True, x=x),
        "Coupling.split": function(functools.partial(coupled().split, name="x"), "value", value=x),
        "Coupling.parameters_of": method(coupled, "parameters_of", "kept", kept=kept, **options),
        "KernelCoupling.initialise": method(
            lambda: kernel.KernelCoupling(3, 5), "initialise", finite=True, x=x, **options
        ),
        "KernelExpansion.initialise": method(
            expansion, "initialise", finite=True, x=normal(2), **options
        ),
        "KernelExpansion.join": method(
            expansion, "join", "features", features=normal(2), **options
        ),
        "KernelExpansion.kernel_matrix": method(
            expansion, "kernel_matrix", first=normal(2), second=normal(2)
        ),
        "DenseField.conditions": method(
            lambda: nets.fields.DenseField(4, 3, (4,)),
            "conditions",
            "features",
            features=normal(4, 3),
            t=Fresh(lambda: torch.rand(ROWS)),
            **options,
        ),
        "ChannelMixing.count_rows": function(
            mixer.ChannelMixing.count_rows, num_patches=4, patch_dim=4
        ),
        "PatchMixing.count_rows": function(
            mixer.PatchMixing.count_rows, num_patches=4, patch_dim=4
        ),
    }


def _of_assignment() -> dict[str, Call]:
    labels = Fresh(lambda: torch.randint(3, (ROWS, 2)))
    mask = Fresh(lambda: torch.rand(ROWS, 2) > 0.5)
    v, t = normal(2, 3), Fresh(lambda: torch.rand(ROWS))
    simplices = functools.partial(assignment.Simplices, 2, 3)
    ragged = functools.partial(assignment.Simplices, 2, [2, 3])
    path = Fresh(assignment_path, "anything")
    layer = functools.partial(assignment.AssignmentLayer, assignment_field(), steps=2)
    counts = Fresh(lambda: torch.tensor([[2.0], [3.0]]))
    matching = functools.partial(flows.FlowMatching, 2, hidden=(4,), steps=2)

    def masked_field() -> nn.Module:
        net = nets.fields.DenseField(2, 3, (8,), missing=True)
        return assignment.AssignmentField(
            net, assignment_path(), assignment.Classifier(), missing=True
        )

    calls = {
        "AssignmentPath.evidence_scale": method(assignment_path, "evidence_scale", "v", v=v, t=t),
        "AssignmentPath.speeds": method(assignment_path, "speeds", like=v),
        "AssignmentPath.times": method(assignment_path, "times", steps=3),
        "AssignmentField.output": method(assignment_field, "output", "v", v=v, t=t),
        "AssignmentField.masked forward": method(
            masked_field, "forward", "v", v=v, t=t, mask=mask
        ),
        "AssignmentField.masked output": method(masked_field, "output", "v", v=v, t=t, mask=mask),
        "AssignmentField.masked loss": method(
            masked_field, "loss", "labels", labels=labels, start=v, t=t, mask=mask
        ),
        "AssignmentLayer.transport": method(
            layer, "transport", "m", m=normal(4), times=Fresh(lambda: [0.0, 0.5, 1.0])
        ),
        "FlowMatching.matching_loss": method(matching, "matching_loss", "x", x=normal(2)),
        "FlowMatching.density_error": method(matching, "density_error", "x", x=normal(2)),
        "FlowMatching.steps_for": method(matching, "steps_for", "x", x=normal(2), tolerance=0.1),
        "FlowMatching.training_inverse": method(matching, "training_inverse", "x", x=normal(2)),
        "FiniteHorizon.draw_times": method(assignment.FiniteHorizon, "draw_times", num=3, like=v),
        "Simplices.coordinate_mask": method(simplices, "coordinate_mask", "mask", mask=mask),
        "Simplices.corner_norms": method(simplices, "corner_norms", like=v),
        "ragged Simplices.coordinate_mask": method(ragged, "coordinate_mask", "mask", mask=mask),
        "ragged Simplices.from_coordinates": method(ragged, "from_coordinates", "m", m=normal(3)),
        "ragged Simplices.to_coordinates": method(ragged, "to_coordinates", "v", v=v),
    }
    for kind in (assignment.FiniteHorizon, assignment.InfiniteHorizon):
        calls[f"{kind.__name__}.speeds"] = method(
            kind, "speeds", kinds={"counts": "labels"}, counts=counts
        )
    for kind in (assignment.Classifier, assignment.Velocity):
        name = kind.__name__
        options: _Options = {"output": v, "v": v, "t": t, "path": path}
        calls[f"{name}.field"] = method(kind, "field", "v", **options)
        calls[f"{name}.loss"] = method(kind, "loss", "v", labels=labels, start=v, **options)
    return calls


def _of_likelihoods() -> dict[str, Call]:
    x = normal(4)

    def terms() -> nfi.SurrogateTerms:
        return nfi.SurrogateLikelihood()(x(), encode, decode)

    calls = {
        "ExactLikelihood.forward": method(
            nfi.ExactLikelihood,
            "forward",
            "x",
            x=x,
            encode=encode,
            decode=lambda z: nfi.volume.decode_and_log_volume(decode, z),
        )
    }
    for kind in (nfi.ExactLikelihood, nfi.SurrogateLikelihood):
        arguments = {"module": Fresh(injective_model), "x": normal(5)}
        calls[f"{kind.__name__}.loss"] = method(
            kind, "loss", "log_prob", terms=Fresh(terms), log_prob=normal()
        )
        calls[f"{kind.__name__}.watch"] = method(kind, "watch", terms=Fresh(terms), **arguments)
        calls[f"{kind.__name__}.training_loss"] = method(
            kind, "training_loss", module=Fresh(injective_model)
        )
    return calls


def _of_diagnostics() -> dict[str, Call]:
    def gap(**options: Any) -> Tensor:
        z = torch.randn(200, 2, generator=seeded_generator(1))
        regression = diagnostics.MomentRegression(**options)
        return diagnostics.coupling_gap(z, 1, num_folds=2, regression=regression).gap

    def trainer() -> diagnostics.LayerwiseTrainer:
        return diagnostics.LayerwiseTrainer(2)

    return {
        "MomentRegression": function(
            gap,
            hidden=(4,),
            steps=2,
            batch_size=64,
            learning_rate=0.01,
            weight_decay=0.1,
            max_log_ratio=4.0,
        ),
        "LayerwiseTrainer.skeleton": method(trainer, "skeleton", num_blocks=2),
    }


def _of_points() -> dict[str, Call]:
    angles, q = normal(2), directions(4)
    shares = Fresh(lambda: torch.tensor([[0.5, 0.0, 0.5], [0.2, 0.3, 0.5]]).repeat(2, 1))
    matrices = Fresh(lambda: torch.eye(3).repeat(ROWS, 1, 1))
    arguments: dict[str, _Options] = {
        "directions_from_lat_lon": {"latitude": normal(), "longitude": normal(), "degrees": True},
        "lat_lon_from_directions": {"x": directions(3), "degrees": True},
        "unit_vectors_from_angles": {"angles": angles},
        "angles_from_unit_vectors": {"x": directions(2)},
        "wrap": {"angles": angles},
        "angles_from_times": {"times": angles, "period": 24.0},
        "times_from_angles": {"angles": angles, "period": 24.0},
        "matrices_from_quaternions": {"quaternions": q},
        "quaternions_from_matrices": {"matrices": matrices},
        "quaternions_from_axis_angle": {"axes": directions(3), "angles": normal()},
        "axis_angle_from_quaternions": {"quaternions": q},
        "compositions_without_zeros": {"parts": shares, "limits": 0.1, "fraction": 0.65},
        "compositions_from_counts": {
            "counts": Fresh(lambda: torch.tensor([[3.0, 0.0, 1.0]]).repeat(ROWS, 1)),
            "concentration": 0.5,
        },
    }
    calls = {}
    for name, given in arguments.items():
        kinds = {n: "numbers" for n, v in given.items() if isinstance(v, Fresh)}
        kinds |= {"limits": "anything"} if "limits" in given else {}
        calls[name] = replace(function(getattr(points, name), finite=True, **given), kinds=kinds)
    maps: dict[str, tuple[str, Fresh]] = {
        "plot_torus": ("angles", angles),
        "plot_globe": ("points", directions(3)),
        "plot_rotations": ("quaternions", q),
    }
    for name, (argument, rows) in maps.items():
        call = function(getattr(diagnostics, name), **{argument: rows})
        calls[name] = replace(call, kinds={argument: "numbers"})
    return calls


def all_calls() -> dict[str, Call]:
    """Every call by its name."""
    return {
        **main_calls(),
        **_of_surfaces(),
        **_of_layers(),
        **_of_assignment(),
        **_of_likelihoods(),
        **_of_diagnostics(),
        **_of_points(),
    }

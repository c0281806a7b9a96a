"""Every module of the package that the registries build, with its constructor's arguments."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import normflows as nf
import torch
from torch import nn

import normflows_injective as nfi
from normflows_injective.training.losses import MeanLoss
from support.registry import GAUGES, LAYERS

DISTRIBUTIONS = nfi.distributions
FIELDS = nfi.nets.fields


class Construction(NamedTuple):
    """A module, and the arguments that its class was called with, defaults included."""

    module: nn.Module
    arguments: dict[str, Any]


def _flow() -> nn.Module:
    injection = nfi.flows.FreeFormInjection(*nfi.nets.mlp_autoencoder(5, 2, (8,)))
    return nfi.InjectiveNormalizingFlow(nf.distributions.DiagGaussian(2), [injection])


def _on_surface(**options: Any) -> nn.Module:
    return DISTRIBUTIONS.UniformOnSurface(
        nfi.flows.gauges.LpGauge(1.5), dim=3, num_directions=64, **options
    )


def _layer_of_assignments() -> nn.Module:
    return nfi.AssignmentFlow(FIELDS.DenseField(2, 3, (4,)), 2, 3, "finite").layer(4)


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "surrogate": _flow,
    "exact": lambda: nfi.flows.star_like_flow(3, num_layers=1, width=8),
    "assignment": lambda: nfi.AssignmentFlow(FIELDS.DenseField(2, 3, (4,)), 2, 3),
    "assignment_layer": _layer_of_assignments,
    "conv_field": lambda: FIELDS.ConvField(4, 4, 2, 8, 1),
    "leave_one_out": lambda: FIELDS.LeaveOneOutField(3, 2, (2,), 4),
    "uniform_sphere": lambda: DISTRIBUTIONS.UniformSphere(3),
    "von_mises_fisher": lambda: DISTRIBUTIONS.VonMisesFisher([1.0, 0.0, 0.0], 2.0),
    "power_spherical": lambda: DISTRIBUTIONS.PowerSpherical([1.0, 0.0, 0.0], 2.0),
    "uniform_torus": lambda: DISTRIBUTIONS.UniformTorus(2),
    "von_mises": lambda: DISTRIBUTIONS.VonMises([1.0, 3.0], 2.0),
    "wrapped_normal": lambda: DISTRIBUTIONS.WrappedNormal([1.0, 3.0], 0.5),
    "angular": lambda: DISTRIBUTIONS.AngularCentralGaussian(torch.eye(3)),
    "uniform_rotation": lambda: DISTRIBUTIONS.UniformRotation(),
    "matrix_fisher": lambda: DISTRIBUTIONS.MatrixFisher(torch.eye(3)),
    "isotropic_rotation": lambda: DISTRIBUTIONS.IsotropicGaussianRotation(0.5),
    "on_surface": _on_surface,
    "pullback": lambda: DISTRIBUTIONS.Pullback(
        DISTRIBUTIONS.UniformSphere(3), nfi.flows.SphereChart(3)
    ),
    "product_law": lambda: DISTRIBUTIONS.ProductLaw(
        [DISTRIBUTIONS.UniformTorus(2), DISTRIBUTIONS.DiagGaussian(1)]
    ),
    "product_flow": lambda: nfi.flows.product_flow({"a": "circle"}, num_layers=1, width=4),
    "graph_surface": lambda: nfi.flows.GraphSurface(nn.Sequential(nn.Linear(2, 1), nn.Tanh())),
    "simplex": lambda: nfi.flows.SimplexStickBreaking(3),
    "simplex_of_orthant": lambda: nfi.flows.SimplexFromOrthant(3),
    "linear_plus": lambda: nfi.nets.LinearPlusMLP(4, 2, (8,)),
    "loss": lambda: nfi.ForwardKLD(_flow()),
    "mean_loss": lambda: MeanLoss(lambda x, context: x.sum(1), [nn.Linear(2, 2)]),
    "flow_matching": lambda: nfi.flows.FlowMatching(2, hidden=(4,), context_dim=1),
}


def builders() -> dict[str, Callable[[], nn.Module]]:
    """Constructors of every registry, by name."""
    gauges = {f"gauge_{name}": functools.partial(case.build, 4) for name, case in GAUGES.items()}
    return {**{name: case.build for name, case in LAYERS.items()}, **gauges, **OTHERS}


# The parts of guides are built by guides alone, and their files are tested there.
ONLY_FOR_PYRO = (
    "normflows_injective.pyro",
    "normflows_injective.distributions.particle_guard",
    "normflows_injective.distributions.thickened",
    "normflows_injective.flows.guides",
    "normflows_injective.flows.coupling.steady_linear",
)


def classes() -> list[type[nn.Module]]:
    """Public module classes of the package, but those that only Pyro's part has."""
    found: dict[type[nn.Module], None] = {}
    for info in pkgutil.walk_packages(nfi.__path__, "normflows_injective."):
        if info.name.startswith(ONLY_FOR_PYRO):
            continue
        for name, kind in vars(importlib.import_module(info.name)).items():
            ours = inspect.isclass(kind) and kind.__module__.startswith("normflows_injective")
            if ours and issubclass(kind, nn.Module) and not name.startswith("_"):
                found[kind] = None
    return list(found)


def arguments_of(function: Callable[..., Any]) -> list[str]:
    """Names of a constructor's arguments."""
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters = inspect.signature(function).parameters.items()
    return [name for name, found in parameters if name != "self" and found.kind not in kinds]


@contextlib.contextmanager
def recorded() -> Iterator[list[Construction]]:
    """Note the arguments of all modules of the package that are constructed inside."""
    found: list[Construction] = []
    originals = {kind: vars(kind)["__init__"] for kind in classes() if "__init__" in vars(kind)}

    def watch(kind: type[nn.Module], original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def construct(self: nn.Module, *args: Any, **options: Any) -> None:
            original(self, *args, **options)
            if type(self).__init__ is construct:
                bound = inspect.signature(original).bind(self, *args, **options)
                bound.apply_defaults()
                arguments = {k: v for k, v in bound.arguments.items() if k != "self"}
                found.append(Construction(self, arguments))

        return construct

    for kind, original in originals.items():
        kind.__init__ = watch(kind, original)  # type: ignore[method-assign]
    try:
        yield found
    finally:
        for kind, original in originals.items():
            kind.__init__ = original  # type: ignore[method-assign]

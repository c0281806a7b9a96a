"""Options in files: whatever changes a map is compared, for every layer and option."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import normflows as nf
import pytest
import torch
from support.constructed import Construction, arguments_of, builders, classes, recorded
from support.seeds import manual_seed
from torch import nn

import normflows_injective as nfi
from normflows_injective.checkpoints import load_checkpoint, save_checkpoint
from normflows_injective.errors import CheckpointError, CheckpointWarning, InjectiveFlowError
from normflows_injective.flows import coupling
from normflows_injective.flows.assignment import FiniteHorizon, InfiniteHorizon

FINAL = {
    kind.__name__: kind
    for kind in classes()
    if not inspect.isabstract(kind) and getattr(kind, "__final__", False)
}
# Constructors of submodules, which are recorded themselves.
SUBMODULES = {"activation"}


@functools.cache
def constructions() -> dict[str, list[Construction]]:
    """What the registries build of every class, each set of arguments once."""
    found: dict[tuple[str, str], Construction] = {}
    for build in builders().values():
        manual_seed(0)
        with recorded() as built:
            build()
        for one in built:
            name = type(one.module).__name__
            found.setdefault((name, repr(one.arguments)), one)
    result: dict[str, list[Construction]] = {}
    for (name, _), one in found.items():
        result.setdefault(name, []).append(one)
    return result


@pytest.mark.parametrize("name", FINAL)
def test_every_option_is_an_attribute(name):
    built = constructions().get(name)
    assert built, f"no registry builds {name}: add it to registry.py or constructed.py"
    missing = {
        option
        for option in arguments_of(FINAL[name].__init__)
        if option not in SUBMODULES and not hasattr(built[0].module, option)
    }
    assert not missing


def other_values(build: Callable[[Any], Any], value: Any) -> Iterator[Any]:
    """Values of an option other than a given one; some may be refused."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, 2 * value)
    elif isinstance(value, float):
        yield from (1.5 * value + 0.25, value / 2) if math.isfinite(value) else (3.0,)
    elif isinstance(value, str):
        try:
            build("?")
        except InjectiveFlowError as error:  # which names the choices
            yield from set(re.findall(r"[a-z]\w*", str(error))) - {value}
    elif value is None:
        yield from (1, 0.7, (0.5, 1.5), lambda c: c[:, 0].exp())
    elif isinstance(value, coupling.ElementTransform):
        yield from (coupling.Additive(), coupling.Affine(1.5), coupling.CentredAffine(1.5))
        yield from (coupling.Spline(3), coupling.Spline(4, 7.0))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (InfiniteHorizon(0.7), FiniteHorizon(0.02))
        for field in dataclasses.fields(value):
            part = getattr(value, field.name)
            for other in other_values(build, part) if isinstance(part, float) else ():
                yield dataclasses.replace(value, **{field.name: other})
    elif isinstance(value, tuple | list) and value and all(isinstance(v, int) for v in value):
        yield from ([*value[:-1], 2 * value[-1]], [*value, value[-1]], [*reversed(value)])
    elif isinstance(value, torch.Tensor):
        yield value * 1.5


def variants(one: Construction) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the same class with one option changed."""
    kind = type(one.module)
    for option, value in one.arguments.items():

        def build(other: Any, option: str = option) -> nn.Module:
            manual_seed(1)
            arguments = copy.deepcopy(one.arguments) | {option: other}
            return kind(**arguments)

        found = 0
        try:
            others = list(other_values(build, value))
        except InjectiveFlowError:
            continue
        for other in others:
            try:
                yield f"{option}={other!r}", build(other)
            except (InjectiveFlowError, TypeError, ValueError, RuntimeError, AttributeError):
                continue
            found += 1
            if found == 2:
                break


def context_for(module: nn.Module) -> dict[str, torch.Tensor]:
    """A context of the width that a module was built for, if it needs one."""
    if not getattr(module, "needs_context", False) and not getattr(module, "context_dim", 0):
        return {}
    for part in module.modules():
        if getattr(part, "context_dim", 0):
            return {"context": torch.linspace(-1, 1, 4 * part.context_dim).view(4, -1)}
    return {"context": torch.linspace(-1, 1, 8).view(4, 2)}


def points(*shape: int) -> torch.Tensor:
    """Four fixed points with positive coordinates, which every chart takes."""
    size = math.prod(shape)
    return 0.3 + torch.linspace(0, 40, 4 * size).sin().square().view(4, *shape)


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=1, keepdim=True)


def latent_shape(flow: nn.Module) -> tuple[int, ...]:
    if isinstance(flow, nfi.flows.InChart):
        return flow.chart.latent_shape
    if isinstance(flow, nfi.flows.GraphSurface):
        return (2,)
    if isinstance(flow, nfi.flows.RadialSurface):
        return flow.latent_shape or (4,)
    return tuple(flow.latent_shape if hasattr(flow, "latent_shape") else flow.shape)


@torch.no_grad()
def values_of(module: nn.Module) -> list[Any]:
    """What a module computes at fixed points."""
    module.eval()
    context = context_for(module)
    if isinstance(module, nfi.flows.gauges.Gauge):
        directions = unit(points(module.dim or 4))
        return list(module.radius_and_secant(directions, torch.tensor(1.3)))
    if isinstance(module, nf.distributions.BaseDistribution):
        if isinstance(module, nfi.distributions.Pullback):
            return [module.log_prob(points(*module.shape))]
        x = unit(points(*module.shape))
        if isinstance(module, nfi.distributions.UniformOnSurface):
            x = module.surface(x)[0]
        return [module.log_prob(x)]
    if isinstance(module, nfi.InjectiveNormalizingFlow):
        x = module.forward(points(*module._shapes.base))
        return [x, module.inverse(x), module.log_prob(x)]
    if type(module).__name__ == "ProductFlow":
        return values_of(module.model)
    if isinstance(module, nfi.AssignmentFlow):
        return values_of(module.field)
    if type(module).__name__ == "AssignmentField":
        simplices = module.path.simplices
        rows = points(simplices.num_variables, simplices.max_classes)
        return [module(rows, torch.linspace(0.1, 0.8, 4))]
    if type(module).__name__ == "AssignmentPath":
        simplices = module.simplices
        start = points(simplices.num_variables, simplices.max_classes)
        labels = torch.zeros(start.shape[:2], dtype=torch.long)
        return [module.logits(labels, start, torch.linspace(0.1, 0.8, 4))]
    if type(module).__name__ == "Simplices":
        return [module.counts]
    if type(module).__name__ == "Level":
        return [module(points(2), torch.ones(4, 2))]
    if isinstance(module, nf.flows.Flow):
        z = points(*latent_shape(module))
        if isinstance(module, nfi.flows.SurfaceMap):
            z = unit(z)
        x, log_det = module(z, **context)
        return [x, log_det, *module.inverse(x, **context)]
    if type(module).__name__ == "ConditionalMoments":
        return list(module(points(module.in_features)))
    if isinstance(module, nfi.nets.fields.conditions.FieldNetwork):
        return [module(points(*module.input_shape), torch.linspace(0, 1, 4), **context)]
    if hasattr(module, "input_shape"):
        return [module(points(*module.input_shape), **context)]
    raise AssertionError(f"say in values_of how to compare modules of {type(module)}")


def same(first: list[Any], second: list[Any]) -> bool:
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
        for a, b in zip(first, second, strict=True)
    )


# Terms of the training loss, which have no map.
TERMS = {"ExactLikelihood", "SurrogateLikelihood", "ForwardKLD", "MeanLoss"}


@pytest.mark.parametrize("name", sorted({*FINAL} - TERMS))
def test_a_file_does_not_load_in_silence_into_another_map(name, tmp_path):
    """Into every variant of its own class: the map is equal, or there is a CheckpointError."""
    path = tmp_path / "module.safetensors"
    silent = []
    for one in constructions()[name][:6]:
        moved = one.module
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter += 0.05 * torch.linspace(0, 9, parameter.numel()).cos().view_as(
                    parameter
                )
        save_checkpoint(moved, path)
        for option, other in variants(one):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", CheckpointWarning)
                try:
                    load_checkpoint(other, path)
                except CheckpointError:
                    continue
            numerics = name in ("AssignmentLayer", "FlowMatching") and any(
                w.category is CheckpointWarning for w in caught
            )
            if not numerics and not same(values_of(moved), values_of(other)):
                silent.append(option)
        # A twin always loads, and without a warning.
        manual_seed(1)
        twin = type(moved)(**copy.deepcopy(one.arguments))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_checkpoint(twin, path)
        assert same(values_of(moved), values_of(twin))
    assert not silent


# Constructors of normflows, by name, with an option that changes the map and no weight.
HOST: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], dict[str, Any]]] = {
    "affine coupling": (
        lambda **options: nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4]), **options),
        {"scale_map": "exp"},
        {"scale_map": "sigmoid"},
    ),
    "split": (
        lambda **options: nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4]), **options),
        {"split_mode": "channel"},
        {"split_mode": "channel_inv"},
    ),
    "spline bound": (
        functools.partial(nf.flows.CoupledRationalQuadraticSpline, 4, 1, 8),
        {"tail_bound": 3.0},
        {"tail_bound": 5.0},
    ),
    "autoregressive bound": (
        functools.partial(nf.flows.AutoregressiveRationalQuadraticSpline, 4, 1, 8),
        {"tail_bound": 3.0},
        {"tail_bound": 5.0},
    ),
    "circular bound": (
        functools.partial(nf.flows.CircularCoupledRationalQuadraticSpline, 4, 1, 8, [0]),
        {"tail_bound": 3.0},
        {"tail_bound": 5.0},
    ),
    "permutation": (
        functools.partial(nf.flows.Permute, 4),
        {"mode": "swap"},
        {"mode": "shuffle"},
    ),
    "logit": (nf.transforms.Logit, {"alpha": 0.05}, {"alpha": 0.1}),
    "planar": (functools.partial(nf.flows.Planar, (4,)), {"act": "tanh"}, {"act": "leaky_relu"}),
    "wrap": (functools.partial(nf.flows.PeriodicWrap, [0]), {"bound": 1.0}, {"bound": 2.0}),
    "shift": (functools.partial(nf.flows.PeriodicShift, [0]), {"shift": 0.1}, {"shift": 0.4}),
    "softplus": (nn.Softplus, {"beta": 1.0}, {"beta": 3.0}),
    "leaky": (nn.LeakyReLU, {"negative_slope": 0.1}, {"negative_slope": 0.3}),
    "gelu": (nn.GELU, {"approximate": "none"}, {"approximate": "tanh"}),
    "groups": (
        functools.partial(nn.GroupNorm, num_channels=4),
        {"num_groups": 2},
        {"num_groups": 4},
    ),
}


@pytest.mark.parametrize("name", HOST)
def test_options_of_other_libraries_are_compared(name, tmp_path):
    build, options, others = HOST[name]
    save_checkpoint(build(**options), tmp_path / "module")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(build(**options), tmp_path / "module")
    with pytest.raises(CheckpointError, match="belongs to another model"):
        load_checkpoint(build(**others), tmp_path / "module")

"""Values and gradients of layers, gauges and laws where coordinates vanish, agree or are extreme.

Random points never meet a pole, an axis or a corner, but data do, and one row of NaN makes every
parameter NaN. At each point a component gives finite values and gradients, or a named error or
warning.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.registry import GAUGES, LAYERS, Case, perturb
from torch import nn

import normflows_injective as nfi
from normflows_injective import distributions
from normflows_injective.errors import InjectiveFlowError, NumericalWarning
from normflows_injective.flows import GraphSurface, SimplexFromOrthant, SimplexStickBreaking
from normflows_injective.flows.gauges import LpGauge
from normflows_injective.flows.surfaces.angular_spline import AngularSpline

SIMPLEX = ("normal", "logit", "ilr", "alr", "uniform_box")
CASES = {
    **LAYERS,
    **{
        f"simplex_{kind}": Case(
            lambda kind=kind: SimplexStickBreaking(4, kind),
            (3,),
            (4,),
            latents=torch.sigmoid if kind == "uniform_box" else lambda z: z,
        )
        for kind in SIMPLEX
    },
    "simplex_radial": Case(lambda: SimplexFromOrthant(4), (4,), (4,)),
    "simplex_square": Case(lambda: SimplexFromOrthant(4, "square"), (4,), (4,)),
    "graph_surface": Case(
        lambda: GraphSurface(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))),
        (2,),
        (3,),
    ),
    "angular_spline": Case(lambda: AngularSpline(3, ind_circ=[2], width=8), (3,), (3,)),
    "angular_spline_of_one": Case(lambda: AngularSpline(1, ind_circ=[0], width=8), (1,), (1,)),
}

LAWS = {
    "product": lambda: distributions.ProductLaw([distributions.UniformSphere(4)]),
    "uniform_sphere": lambda: distributions.UniformSphere(4),
    "von_mises_fisher": lambda: distributions.VonMisesFisher([0.0, 0.0, 0.0, 1.0], 3.0, True),
    "angular_gaussian": lambda: distributions.AngularCentralGaussian(torch.eye(4), True),
    "uniform_rotation": lambda: distributions.UniformRotation(),
    "matrix_fisher": lambda: distributions.MatrixFisher(torch.eye(3), True),
    "isotropic_rotation": lambda: distributions.IsotropicGaussianRotation(0.1, trainable=True),
    "isotropic_rotation_wide": lambda: distributions.IsotropicGaussianRotation(
        2.0, trainable=True
    ),
    "uniform_on_l1": lambda: distributions.UniformOnSurface(LpGauge(1.0), dim=4),
    "uniform_on_cone": lambda: distributions.UniformOnSurface(LpGauge(3.0), dim=4, measure="cone"),
    **{
        f"pullback_{kind}": lambda kind=kind: distributions.Pullback(
            distributions.UniformSphere(4), nfi.flows.SphereChart(4, kind)
        )
        for kind in ("cot", "stereographic", "angles", "orthant")
    },
}


def special_vectors(dim):
    """Zeros, axes, corners, equal coordinates, and numbers at the ends of a scale, (N, dim)."""
    axes = torch.eye(dim)
    ones = torch.ones(1, dim)
    signs = torch.ones(dim).index_fill(0, torch.arange(1, dim, 2), -1.0)[None]
    ramp = torch.arange(dim)[None] / dim
    return torch.cat(
        [0 * ones, axes, -axes, ones, -ones, signs, ramp, 1e-12 * ones, 20 * ones, 1e3 * axes[:1]]
    )


def special_directions(dim):
    """Directions to the poles, along the axes, to corners, and a breadth from these, (N, dim)."""
    vectors = special_vectors(dim)
    vectors = vectors[vectors.norm(dim=1) > 1e-6]
    near = torch.eye(dim) + 1e-9 * torch.ones(dim)
    vectors = torch.cat([vectors, near, -near])
    return vectors / vectors.norm(dim=1, keepdim=True)


def special_parts(dim):
    """Compositions next to corners, edges and the centre of the simplex, (N, dim)."""
    parts = [torch.ones(1, dim)]
    if dim == 1:
        return parts[0]
    for tiny in (1e-3, 1e-12, 1e-30):
        corners = tiny + torch.eye(dim)
        parts += [corners, 1 + tiny - torch.eye(dim)]
    parts = torch.cat([*parts, torch.eye(dim)])
    return parts / parts.sum(1, keepdim=True)


def fault(call, x, parameters):
    """What is wrong with values (1, ...) at one point and their gradients, or None."""
    x = x.clone().requires_grad_()
    try:
        values = call(x)
    except (InjectiveFlowError, NumericalWarning):
        return None
    if not all(bool(value.isfinite().all()) for value in values):
        return "a value"
    inputs = [x, *(p for p in parameters if p.requires_grad)]
    total = sum(value.sum() for value in values)
    if not total.requires_grad:
        return None
    for gradient in torch.autograd.grad(total, inputs, allow_unused=True):
        if gradient is not None and not bool(gradient.isfinite().all()):
            return "a gradient"
    return None


def faults(call, points, parameters):
    """The points at which a call gives something that is not finite."""
    parameters = list(parameters)
    pairs = ((point, fault(call, point[None], parameters)) for point in points)
    return {tuple(point.flatten().tolist()): wrong for point, wrong in pairs if wrong}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def layer(case, device, dtype):
    return perturb(case.build()).to(device=device, dtype=dtype)


def context_of(case, like):
    if case.context_dim == 0:
        return None
    return torch.zeros(1, case.context_dim).to(like)


@pytest.mark.slow
def test_layers_at_special_latents(case, layer, device, dtype):
    points = special_vectors(math.prod(case.latent_shape)).to(device=device, dtype=dtype)
    points = case.latents(points).view(-1, *case.latent_shape)
    context = context_of(case, points)
    assert not faults(lambda z: layer(z, context), points, layer.parameters())


@pytest.mark.slow
def test_layers_at_special_data(case, layer, device, dtype):
    dim = math.prod(case.data_shape)
    points = torch.cat([special_vectors(dim), special_directions(dim), special_parts(dim)])
    points = points.to(device=device, dtype=dtype).view(-1, *case.data_shape)
    context = context_of(case, points)
    assert not faults(lambda x: layer.inverse(x, context), points, layer.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("name", GAUGES)
def test_surfaces_at_special_directions(name, dim, device, dtype):
    case = GAUGES[name]
    surface = nfi.flows.RadialSurface(perturb(case.build(dim))).to(device=device, dtype=dtype)
    directions = special_directions(dim).to(device=device, dtype=dtype)
    assert not faults(surface, directions, surface.parameters())
    ends = []
    for direction in directions:
        try:
            ends.append(surface(direction[None])[0].detach())
        except InjectiveFlowError:
            continue
    assert not faults(surface.inverse, ends and torch.cat(ends), surface.parameters())


@pytest.mark.parametrize("name", LAWS)
def test_laws_at_special_points(name, device, dtype):
    law = LAWS[name]().to(device=device, dtype=dtype)
    dim = 3 if name.startswith("pullback") else 4
    points = torch.cat([special_vectors(dim), special_directions(dim)])
    points = points.to(device=device, dtype=dtype)
    assert not faults(lambda x: (law.log_prob(x),), points, law.parameters())

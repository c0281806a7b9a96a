"""The layer of assignment flows: known fields, integration, models of normflows."""

from __future__ import annotations

import math

import normflows as nf
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from support.assignment_flows import COUNTS, path_of, stirred
from support.assignment_oracles import DOUBLE, FieldOf
from support.comparison import close
from support.dense import numerical_jacobian
from support.seeds import manual_seed

import normflows_injective as nfi
from normflows_injective.flows import SimplexLift
from normflows_injective.flows.assignment import (
    AssignmentField,
    AssignmentLayer,
    InfiniteHorizon,
    Velocity,
)
from normflows_injective.flows.integration import integrate
from normflows_injective.nets.fields import DenseField

# --- known fields --------------------------------------------------------------------------------


def layer_of(function, counts, end=1.0, steps=20, features="scaled_logits", **options):
    """The layer of a field that is a function of logits and times."""
    path = path_of(counts, InfiniteHorizon(end=end))

    def net(x, t):
        v = x * (1 + t.view(-1, 1, 1)) if features == "scaled_logits" else x
        return function(v, t)

    field = AssignmentField(FieldOf(net), path, Velocity(), features)
    return AssignmentLayer(field, steps, **options)


def linear(counts, **options):
    """The layer of F = A V, with its matrix on coordinates."""
    size = len(counts) * max(counts)
    matrix = 0.5 * torch.randn(size, size, dtype=DOUBLE)
    layer = layer_of(lambda v, t: (v.flatten(1) @ matrix.T).view_as(v), counts, **options)
    simplices = layer.field.path.simplices
    basis = simplices.from_coordinates(torch.eye(simplices.dim, dtype=DOUBLE)).flatten(1)
    return layer, basis @ matrix @ basis.T


@pytest.mark.slow
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_linear_field(counts):
    layer, matrix = linear(counts, end=1.5, steps=25)
    m = torch.randn(4, len(matrix), dtype=DOUBLE)
    with torch.no_grad():
        moved, log_det = layer(m)
        back, inverse_log_det = layer.inverse(moved)
    close(log_det, 1.5 * float(matrix.trace()), 1e-12)
    close(moved, m @ torch.as_tensor(expm(1.5 * matrix.numpy())).T, 1e-4)
    close(inverse_log_det, -log_det, 1e-12)
    close(back, m, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_the_divergence_is_taken_at_its_time(divergence):
    # f = a(t) v has the divergence d a(t), for every probe too: here the integral of a is
    # sin(3) / 3 + .5, while a(0) = 1 all along would give 1.
    layer = layer_of(
        lambda v, t: ((3 * t).cos() + t).view(-1, 1, 1) * v, (3, 2), divergence=divergence
    )
    integral = math.sin(3) / 3 + 0.5
    m = torch.randn(4, 3, dtype=DOUBLE)
    moved, log_det = layer(m)
    close(log_det, 3 * integral, 1e-6)
    close(moved, m * math.exp(integral), 1e-5)
    close(layer.inverse(moved)[1], -3 * integral, 1e-6)


@pytest.mark.slow
def test_two_classes_are_a_scalar_logistic_flow():
    # W_1 obeys dW/dt = W (1 - W) (F_1 - F_2).
    def difference(w, t):
        return 3 * math.sin(5 * w) + math.cos(2 * t)

    def function(weights, t):
        w = weights[..., 0]
        first = 3 * (5 * w).sin() + (2 * t).cos().unsqueeze(1)
        return torch.stack([first + 7, torch.full_like(first, 7.0)], -1)

    layer = layer_of(function, (2,), end=2.0, steps=60, features="weights")
    lift = SimplexLift(1, 2)
    starts = torch.tensor([[0.1, 0.9], [0.45, 0.55], [0.8, 0.2]], dtype=DOUBLE)
    with torch.no_grad():
        moved = lift(layer(lift.inverse(starts)[0])[0])[0]
    for begin, end in zip(starts[:, 0].tolist(), moved[:, 0].tolist(), strict=True):
        solved = solve_ivp(
            lambda t, w: w * (1 - w) * difference(w[0], t), (0, 2), [begin], rtol=1e-10, atol=1e-12
        )
        assert end == pytest.approx(solved.y[0, -1], abs=1e-6)


# --- the layer -----------------------------------------------------------------------------------


def random_layer(steps, solver="rk4", **options):
    net = stirred(DenseField(2, 3, hidden=(8,)), 2.5)
    flow = nfi.AssignmentFlow(net, 2, [3, 2], InfiniteHorizon(scale=2.0, end=2.0), **options)
    return flow.layer(steps, solver)


@torch.no_grad()
def moved_by(layer, m):
    """Where the steps of a layer lead, without a divergence."""
    simplices = layer.field.path.simplices

    def rate(v, t):
        return layer.field(v, v.new_full((len(v),), t))

    start = simplices.from_coordinates(m)
    return simplices.to_coordinates(integrate(rate, start, layer.times, layer.solver))


@torch.no_grad()
def errors_of_layer(steps, solver, m, **options):
    manual_seed(5)
    layer = random_layer(steps, solver, **options)
    moved, log_det = layer(m)
    round_trip = (layer.inverse(moved)[0] - m).abs().max()
    jacobian = numerical_jacobian(lambda x: moved_by(layer, x), m, 1e-5)
    log_det_error = (torch.linalg.slogdet(jacobian)[1] - log_det).abs().max()
    return float(round_trip), float(log_det_error)


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "steps", "factor"), [("rk4", 6, 16), ("midpoint", 10, 4)])
@pytest.mark.parametrize("parametrisation", ["velocity", "classifier"])
def test_errors_of_round_trip_and_log_det_fall_with_the_order(
    solver, steps, factor, parametrisation
):
    m = torch.randn(2, 3, dtype=DOUBLE)
    coarse, fine = (
        errors_of_layer(num, solver, m, parametrisation=parametrisation)
        for num in (steps, 2 * steps)
    )
    for before, after in zip(coarse, fine, strict=True):
        assert 1e-10 < before < 0.5
        assert before / after > 0.7 * factor


@pytest.mark.slow
def test_hutchinson_is_unbiased_in_the_layer():
    manual_seed(5)
    exact = random_layer(5)
    probes = AssignmentLayer(exact.field, 5, "rk4", "hutchinson", 2)
    m = torch.randn(1, 3, dtype=DOUBLE)
    with torch.no_grad():
        expected = exact(m)
        moved, integrals = probes.transport(m.expand(500, -1), probes.times)
        assert torch.equal(probes(m)[0], probes(m)[0])
    close(moved, expected[0].expand(500, -1), 1e-12)
    # Both probes of every path are independent draws.
    error = integrals.std() / math.sqrt(1000)
    assert error > 0
    assert abs(integrals.mean() - expected[1]) < 4 * error
    # A correlation of 500 pairs has the standard error .045.
    assert abs(integrals.T.corrcoef()[0, 1]) < 0.18
    assert "num_probes=2" in repr(probes)


@pytest.mark.slow
def test_in_a_host_model():
    flow = nfi.AssignmentFlow(stirred(DenseField(2, 3, hidden=(8,)), 1.5), 2, [3, 2])
    layer, base = flow.layer(4), nf.distributions.DiagGaussian(flow.dim, trainable=False)
    model = nf.NormalizingFlow(base, [layer]).double()
    x = torch.randn(5, flow.dim, dtype=DOUBLE)
    z, log_det = layer.inverse(x)
    close(model.log_prob(x), base.log_prob(z) + log_det, 1e-12)
    with torch.no_grad():
        samples, log_prob = model.sample(3)
        assert samples.shape == (3, flow.dim)
        assert log_prob.shape == (3,)
    model.forward_kld(x).backward()
    for name, parameter in flow.field.net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all()
    assert bool(flow.field.net.layers.state_dict())
    assert "solver='rk4', divergence='exact'" in repr(model)


@pytest.mark.slow
def test_density_of_a_linear_field_in_a_host_model():
    layer, matrix = linear((3, 2), end=1.0, steps=30)
    base = nf.distributions.DiagGaussian(3, trainable=False)
    model = nf.NormalizingFlow(base, [layer]).double()
    x = torch.randn(6, 3, dtype=DOUBLE)
    root = torch.as_tensor(expm(matrix.numpy()))
    law = torch.distributions.MultivariateNormal(torch.zeros(3).double(), root @ root.T)
    with torch.no_grad():
        close(model.log_prob(x), law.log_prob(x), 1e-5)


def test_gradients_of_the_layer_by_forward_kld_are_those_of_differences():
    flow = nfi.AssignmentFlow(DenseField(1, 3, hidden=(4,)), 1, 3, InfiniteHorizon(end=1.0))
    base = nf.distributions.DiagGaussian(2, trainable=False)
    model = nf.NormalizingFlow(base, [flow.layer(3)]).double()
    x = torch.randn(4, 2, dtype=DOUBLE)
    weight = list(flow.field.net.parameters())[-1]
    model.forward_kld(x).backward()
    index = 2
    # By the density: normflows' loss is added up in float32.
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            weight[index] += step
        values.append(-float(model.log_prob(x).mean().detach()))
    assert float(weight.grad[index]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)

"""Circles and tori: charts, and flows whose densities have no seam."""

from __future__ import annotations

import math

import pytest
import torch
from support.dense import dense_jacobian
from support.seeds import manual_seed

import normflows_injective as nfi
from normflows_injective.errors import OffManifoldError, OptionError
from normflows_injective.flows import TorusChart, torus_flow

CHARTS = {
    "radians": lambda: TorusChart(3),
    "degrees": lambda: TorusChart(3, period=360.0),
    "hours": lambda: TorusChart(3, period=24.0, start=0.0),
    "vectors": lambda: TorusChart(3, "vectors"),
    "tangents": lambda: TorusChart(3, kind="stereographic"),
    "tangents to vectors": lambda: TorusChart(3, "vectors", kind="stereographic"),
}


@pytest.fixture(autouse=True)
def _seed():
    manual_seed(0)


def some_angles(rows=20, dim=3):
    return (2 * torch.rand(rows, dim, dtype=torch.float64) - 1) * math.pi


@pytest.mark.parametrize("name", CHARTS)
def test_there_and_back(name):
    chart, z = CHARTS[name](), some_angles()
    x, log_volume = chart(z)
    back, log_back = chart.inverse(x)
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(log_back, -log_volume)


@pytest.mark.parametrize("name", CHARTS)
def test_log_volumes_are_those_of_dense_jacobians(name):
    chart, z = CHARTS[name](), some_angles(4)
    jacobian = dense_jacobian(chart.decode, z)
    expected = 0.5 * torch.logdet(jacobian.mT @ jacobian)
    torch.testing.assert_close(chart(z)[1], expected)


def test_angles_come_out_within_the_period_and_whole_turns_make_no_difference():
    chart = TorusChart(1, period=24.0, start=-6.0)
    hours = torch.tensor([[-6.0], [0.0], [17.9], [18.1], [42.1], [-30.0]], dtype=torch.float64)
    shown = chart.decode(chart.encode(hours))
    torch.testing.assert_close(shown, torch.remainder(hours + 6, 24) - 6)


def test_pairs_off_their_circles_are_refused_or_projected():
    x = torch.tensor([[1.0, 0.0, 0.0, 2.0]])
    with pytest.raises(OffManifoldError, match="off the unit sphere"):
        TorusChart(2, "vectors").inverse(x)
    z, _ = TorusChart(2, "vectors", off_manifold="project").inverse(x)
    torch.testing.assert_close(z, torch.tensor([[0.0, math.pi / 2]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "degrees"}, "form must be one of"),
        ({"period": -1.0}, "period must be a positive number"),
        ({"off_manifold": "drop"}, "off_manifold must be one of"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(OptionError, match=message):
        TorusChart(2, **options)


def perturbed_flow(dim, **options):
    model = torus_flow(dim, num_layers=3, width=16, num_blocks=1, num_components=3, **options)
    for parameter in model.double().parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    return model.eval()


def test_a_density_on_the_torus_integrates_to_one():
    model = perturbed_flow(2, period=360.0)
    # The trapezoid rule of a smooth periodic function converges faster than any power.
    axis = torch.arange(400, dtype=torch.float64) * 360 / 400
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        total = model.log_prob(grid).exp().mean() * 360**2
    assert abs(float(total) - 1) < 1e-6


def test_density_and_derivatives_are_continuous_across_every_cut():
    model = perturbed_flow(3)
    inner = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
    for axis in range(3):
        sides = []
        for end in (math.pi - 1e-9, -math.pi + 1e-9, 3 * math.pi + 1e-9):
            x = inner.clone()
            x[axis] = end
            x = x.view(1, 3).requires_grad_()
            log_p = model.log_prob(x)
            (slope,) = torch.autograd.grad(log_p.sum(), x, create_graph=True)
            (bend,) = torch.autograd.grad(slope[0, axis], x)
            sides.append(torch.cat([log_p, slope[0], bend[0]]).detach())
        torch.testing.assert_close(sides[0], sides[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sides[0], sides[2], rtol=1e-5, atol=1e-5)


def test_samples_have_the_density_that_comes_with_them():
    model = perturbed_flow(3)
    with torch.no_grad():
        x, log_q = model.sample(200)
        torch.testing.assert_close(model.log_prob(x), log_q, rtol=0, atol=1e-9)


def test_angles_and_vectors_are_one_density():
    manual_seed(1)
    angles = perturbed_flow(2)
    manual_seed(1)
    vectors = perturbed_flow(2, form="vectors")
    x = some_angles(10, 2)
    pairs = torch.stack([x.cos(), x.sin()], 2).flatten(1)
    torch.testing.assert_close(vectors.log_prob(pairs), angles.log_prob(x))


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_it_starts_from_the_uniform_law(dim):
    model = torus_flow(dim, num_layers=2, width=8)
    x, log_q = model.sample(10)
    expected = torch.full((10,), -dim * math.log(2 * math.pi))
    torch.testing.assert_close(log_q, expected, rtol=0, atol=1e-4)
    assert x.abs().max() <= math.pi


def test_a_state_fits_every_model_that_was_built_alike():
    manual_seed(1)
    trained = perturbed_flow(5)
    manual_seed(2)
    other = perturbed_flow(5)
    other.load_state_dict(trained.state_dict())
    x = some_angles(10, 5)
    torch.testing.assert_close(other.log_prob(x), trained.log_prob(x))


def test_scores_of_angles_have_no_tube():
    model = perturbed_flow(2, period=360.0)
    x = 360 * torch.rand(80, 2, dtype=torch.float64)
    scores = nfi.score(model, x[:30], reference=x[30:])
    torch.testing.assert_close(scores.log_prob, model.log_prob(x[:30]))


def test_a_context_is_used():
    model = perturbed_flow(2, context_dim=3)
    x = some_angles(4, 2)
    values = [model.log_prob(x, context=torch.randn(4, 3).double()) for _ in range(2)]
    assert (values[0] - values[1]).abs().min() > 0


@pytest.mark.slow
def test_it_learns_two_correlated_modes():
    # log p is smooth, with two modes along the diagonal; its normaliser is a sum over a grid.
    def log_target(x):
        first, second = x.unbind(1)
        return 3 * (first - second).cos() + 1.5 * (2 * (first + second)).cos()

    axis = torch.arange(128) * 2 * math.pi / 128 - math.pi
    grid = torch.cartesian_prod(axis, axis)
    log_p = log_target(grid)
    log_p = log_p - log_p.logsumexp(0) - 2 * math.log(2 * math.pi / 128)
    cells = torch.multinomial(log_p.exp(), 20_000, replacement=True)
    data = grid[cells] + (torch.rand(20_000, 2) - 0.5) * 2 * math.pi / 128
    model = torus_flow(2, num_layers=4, width=32, num_blocks=1, num_components=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 + math.cos(math.pi * step / 120)) / 2
        optimizer.zero_grad()
        model.forward_kld(data[torch.randint(len(data), (256,))]).backward()
        optimizer.step()
    with torch.no_grad():
        mass = log_p.exp() * (2 * math.pi / 128) ** 2
        divergence = float((mass * (log_p - model.log_prob(grid))).sum())
    assert -1e-4 < divergence < BOUND


# Three times the largest divergence over five seeds.
BOUND = 0.2


def test_the_uniform_law_takes_angles_beyond_a_turn():
    law = nfi.distributions.UniformTorus(2)
    x, log_p = law(5)
    torch.testing.assert_close(law.log_prob(x + 20), log_p)

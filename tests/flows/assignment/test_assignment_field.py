"""Paths of assignment flows and their marginal fields, against mixtures of normal laws."""

from __future__ import annotations

import pytest
import torch
from support.assignment_flows import COUNTS, HORIZONS, WAYS, logits, path_of, stirred
from support.assignment_oracles import (
    DOUBLE,
    FieldOf,
    centres,
    corners,
    coupled,
    exact_flow,
    exact_velocity,
    log_density,
    ragged,
    speeds,
    triples,
)
from support.comparison import close
from support.dense import dense_jacobian
from torch import nn

from normflows_injective.flows.assignment import (
    AssignmentField,
    AssignmentPath,
    Classifier,
    FiniteHorizon,
    InfiniteHorizon,
    Simplices,
    Velocity,
)
from normflows_injective.nets.fields import DenseField, LeaveOneOutField

# --- paths and marginal fields -------------------------------------------------------------------


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_paths_are_straight_lines_that_start_at_noise(horizon, counts):
    path = path_of(counts, horizon)
    labels = torch.stack([torch.randint(c, (6,)) for c in counts], 1)
    start = path.draw_start(6, torch.zeros((), dtype=DOUBLE))
    close(start.sum(-1), 0.0, 1e-14)
    t = 0.9 * torch.rand(6, dtype=DOUBLE)
    place = path.logits(labels, start, t)
    s = 1 - path.horizon.contraction * t.view(-1, 1, 1)
    chosen = labels.view(6, -1, 1, 1).expand(-1, -1, 1, max(counts))
    centre = centres(path.horizon, counts, t).gather(2, chosen).squeeze(2)
    close(place, s * start + centre, 1e-13)
    _, velocity = torch.func.jvp(
        lambda at: path.logits(labels, start, at), (t,), (torch.ones_like(t),)
    )
    close(path.velocity(labels, start), velocity, 1e-13)
    # Where a finite path would end: at the logits of the smoothed label.
    if horizon == "finite":
        end = path.logits(labels, start, torch.ones(6, dtype=DOUBLE))
        for row, c in enumerate(counts):
            smooth = 0.99 * torch.eye(c, dtype=DOUBLE)[labels[:, row]] + 0.01 / c
            close(end[:, row, :c], smooth.log() - smooth.log().mean(1, keepdim=True), 1e-13)


def test_noise_is_normal_on_mean_free_logits():
    path = path_of((2, 3))
    start = path.draw_start(40_000, torch.zeros((), dtype=DOUBLE))
    covariance = path.simplices.to_coordinates(start).T.cov()
    # The standard error of an entry is at most sqrt(2 / 40 000) = .007.
    close(covariance, torch.eye(3), 0.03)


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("law", [coupled, ragged, triples])
def test_marginal_field_against_the_score_of_the_mixture(law, horizon):
    # With V_t = s V_0 + t rho u, the score of p_t is -E[V_0 | V_t] / s. So E[rho u | V_t] is
    # (v + s^2 score) / t, and the field, E[rho u - sigma V_0 | V_t], is that + sigma s score:
    # (v + s (s + sigma t) score) / t, where s + sigma t is 1.
    law = law()
    flow = exact_flow(law, horizon, behind=1e6)
    v = logits(flow.simplices, 20)
    t = 0.05 + 0.8 * torch.rand(20, dtype=DOUBLE)
    t = t if horizon == "finite" else 4 * t
    expected = exact_velocity(law, flow.path.horizon, v, t)
    close(expected.sum(-1), 0.0, 1e-10)
    close(flow.field(v, t), expected, 1e-10)


@pytest.mark.parametrize(("horizon", "parametrisation", "features"), WAYS)
def test_every_reading_of_a_network_gives_the_marginal_field(horizon, parametrisation, features):
    law = ragged()
    flow = exact_flow(law, horizon, parametrisation, features=features, behind=1e6)
    v = logits(flow.simplices, 20, 1.0)
    t = 0.05 + 0.25 * torch.rand(20, dtype=DOUBLE)
    # From a posterior, rounded to 1e-16, its logarithms are recovered to that over the smallest.
    tolerance = 1e-5 if features == "posterior" else 1e-10
    close(flow.field(v, t), exact_velocity(law, flow.path.horizon, v, t), tolerance)


@pytest.mark.parametrize("parametrisation", ["velocity", "classifier"])
@pytest.mark.parametrize("horizon", HORIZONS)
def test_the_exact_field_moves_the_density_as_the_continuity_equation_says(
    horizon, parametrisation
):
    law = ragged()
    flow = exact_flow(law, horizon, parametrisation)
    kind, simplices = flow.path.horizon, flow.simplices
    m = torch.randn(10, flow.dim, dtype=DOUBLE)
    t = 0.1 + 0.6 * torch.rand(10, dtype=DOUBLE)

    def density(coordinates, at):
        return log_density(law, kind, simplices.from_coordinates(coordinates), at)

    field = simplices.to_coordinates(flow.field(simplices.from_coordinates(m), t))
    _, change = torch.func.jvp(density, (m, t), (field, torch.ones_like(t)))
    trace = torch.stack(
        [
            dense_jacobian(
                lambda x, at=at: simplices.to_coordinates(
                    flow.field(simplices.from_coordinates(x), at)
                ),
                point,
            )[0].trace()
            for point, at in zip(m.split(1), t.split(1), strict=True)
        ]
    )
    close(change, -trace, 1e-9)


def test_divergence_of_the_exact_field_of_the_infinite_horizon():
    law = ragged()
    flow = exact_flow(law)
    simplices, kappa = flow.simplices, 0.5
    v, t = logits(simplices, 6), 5 * torch.rand(6, dtype=DOUBLE)
    for point, at in zip(v.split(1), t.split(1), strict=True):
        jacobian = dense_jacobian(lambda x, at=at: flow.field(x, at), point)[0]
        square = flow.field(point, at).square().sum()
        close(jacobian.trace(), float(at * (2 * kappa**2 - square)), 1e-10)


class Others(nn.Module):
    """A smooth map of each variable from all others, with an optional context."""

    leave_one_out = True

    def __init__(self, counts, context_dim=0, missing=False):
        super().__init__()
        self.net = LeaveOneOutField(len(counts), max(counts), (4,), 6, context_dim, missing)
        stirred(self.net, 3.0)
        self.takes_context = self.needs_context = context_dim > 0

    def forward(self, features, t, context=None):
        output = self.net(features, t, context)
        valid = torch.arange(output.shape[2]) < torch.tensor([[2], [4], [3]])
        return torch.where(valid, output, 1e6)


@pytest.mark.parametrize("features", ["posterior", "scaled_logits", "weights"])
@pytest.mark.parametrize("horizon", HORIZONS)
def test_closed_divergence_against_dense_jacobians(horizon, features):
    path = path_of((2, 4, 3), horizon)
    net = Others((2, 4, 3), context_dim=2, missing=True)
    field = AssignmentField(net, path, Classifier(), features, missing=True)
    assert field.knows_divergence
    v, t = logits(path.simplices, 4), torch.tensor([0.0, 0.2, 0.5, 0.8], dtype=DOUBLE)
    context = torch.randn(4, 2, dtype=DOUBLE)
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1], [0, 0, 0]]).bool()
    for given in (None, mask):
        value, divergence = field.field_and_divergence(v, t, context, given)
        close(value, field(v, t, context, given), 1e-13)
        for row in range(4):
            at = slice(row, row + 1)

            def on_coordinates(m, at=at, given=given):
                part = None if given is None else given[at]
                moved = field(path.simplices.from_coordinates(m), t[at], context[at], part)
                return path.simplices.to_coordinates(moved)

            m = path.simplices.to_coordinates(v[at])
            expected = dense_jacobian(on_coordinates, m)[0].trace()
            close(divergence[row], expected, 1e-11)
    assert divergence[3] == 0
    assert not bool(value[3].any())


def test_only_a_classifier_that_says_so_knows_its_divergence():
    path = path_of((2, 2))
    net = LeaveOneOutField(2, 2)
    assert AssignmentField(net, path, Classifier()).knows_divergence
    assert not AssignmentField(net, path, Velocity()).knows_divergence
    assert not AssignmentField(DenseField(2, 2, (4,)), path, Classifier()).knows_divergence


def test_features():
    simplices = Simplices(2, [2, 3])
    v, t = logits(simplices), torch.rand(5, dtype=DOUBLE)
    seen = {}
    for horizon in HORIZONS:
        for features in ("posterior", "scaled_logits", "weights"):
            path = AssignmentPath(simplices, HORIZONS[horizon])

            def net(x, at, key=(horizon, features)):
                seen[key] = x
                return x

            AssignmentField(FieldOf(net), path, Velocity(), features)(v, t)
    close(seen["infinite", "scaled_logits"], v / (1 + t.view(-1, 1, 1)), 1e-15)
    close(seen["finite", "scaled_logits"], v, 0)
    close(seen["finite", "weights"], simplices.weights(v), 0)
    for name, horizon in HORIZONS.items():
        s = 1 - horizon.contraction * t.view(-1, 1, 1)
        gap = (v.unsqueeze(2) - centres(horizon, (2, 3), t)).square().sum(-1) / s**2
        posterior = simplices.weights(-0.5 * gap)
        expected = torch.einsum("bnk,nkc->bnc", posterior, corners((2, 3)))
        counts = torch.tensor([[2.0], [3.0]], dtype=DOUBLE)
        close(seen[name, "posterior"], expected * counts.sqrt(), 1e-12)


def test_speeds_of_the_horizons():
    counts = (2, 3, 7)
    for horizon in (InfiniteHorizon(scale=0.7), FiniteHorizon(smoothing=0.2)):
        found = horizon.speeds(torch.tensor(counts, dtype=DOUBLE))
        close(found, speeds(horizon, counts), 1e-13)

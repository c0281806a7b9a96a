"""Assignment flows: paths, fields, losses, samples, and the layer for the host's models."""

from __future__ import annotations

import math

import normflows as nf
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from support.assignment_oracles import (
    DOUBLE,
    ExactField,
    FieldOf,
    Law,
    centres,
    corners,
    coupled,
    exact_flow,
    exact_velocity,
    ising,
    log_density,
    ragged,
    speeds,
    triples,
)
from support.dense import dense_jacobian, numerical_jacobian
from support.seeds import manual_seed
from torch import nn

import normflows_injective as nfi
from normflows_injective.errors import (
    CheckpointError,
    ContextError,
    DtypeError,
    NonFiniteError,
    OffManifoldError,
    OptionError,
    ShapeError,
    UnsupportedModelError,
)
from normflows_injective.flows import SimplexLift, SimplexStickBreaking
from normflows_injective.flows.assignment import (
    AssignmentField,
    AssignmentLayer,
    AssignmentPath,
    Classifier,
    FiniteHorizon,
    InfiniteHorizon,
    Simplices,
    Velocity,
    choose_horizon,
    rounding_error,
)
from normflows_injective.flows.assignment.horizon import horizon_of
from normflows_injective.flows.assignment.integration import integrate, time_grid
from normflows_injective.nets.fields import DenseField, LeaveOneOutField

HORIZONS = {"infinite": InfiniteHorizon(), "finite": FiniteHorizon()}
COUNTS = {"equal": (3, 3), "ragged": (2, 5, 3), "binary": (2, 2, 2)}
# Every way to see an exact field; that of a finite horizon itself needs the logits.
WAYS = [
    (horizon, parametrisation, features)
    for horizon in HORIZONS
    for parametrisation in ("velocity", "classifier")
    for features in ("scaled_logits", "weights", "posterior")
    if (horizon, parametrisation, features) != ("finite", "velocity", "posterior")
]


def close(actual, expected, tolerance=1e-12):
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand(actual.shape)
    torch.testing.assert_close(actual.detach(), expected.detach(), atol=tolerance, rtol=tolerance)


def logits(simplices, num=5, scale=1.5):
    shape = (num, simplices.num_variables, simplices.max_classes)
    return simplices.mean_free(scale * torch.randn(shape, dtype=DOUBLE))


def path_of(counts, horizon="infinite"):
    return AssignmentPath(Simplices(len(counts), list(counts)), horizon_of(horizon))


def dense_flow(**options):
    """A small flow of two binary variables with a random network, in float64."""
    return nfi.AssignmentFlow(DenseField(2, 2, hidden=(8,)), 2, 2, **options).double()


def stirred(net, scale=2.0):
    """A network with larger weights than it begins with."""
    for parameter in net.parameters():
        parameter.data.mul_(scale)
    return net.double()


# --- simplices -----------------------------------------------------------------------------------


@pytest.fixture(params=COUNTS)
def simplices(request):
    return Simplices(len(COUNTS[request.param]), list(COUNTS[request.param]))


def test_the_replicator_is_the_derivative_of_the_softmax(simplices):
    v, u = logits(simplices), logits(simplices)
    weights, moved = torch.func.jvp(simplices.weights, (v,), (u,))
    close(simplices.replicator(weights, u), moved, 1e-14)
    close(simplices.replicator(weights, torch.ones_like(u)), 0.0, 1e-15)


def test_weights_are_a_softmax_within_the_classes(simplices):
    v = logits(simplices)
    for row, count in enumerate(simplices.class_counts):
        expected = v[:, row, :count].exp()
        expected = expected / expected.sum(1, keepdim=True)
        for behind in (0.0, 50.0, -50.0):
            changed = v.clone()
            changed[:, row, count:] = behind
            close(simplices.weights(changed)[:, row, :count], expected, 1e-14)
            close(simplices.log_weights(changed)[:, row, :count].exp(), expected, 1e-14)
            assert bool((simplices.weights(changed)[:, row, count:] == 0).all())
            assert torch.equal(simplices.round(changed)[:, row], expected.argmax(1))


def test_coordinates_are_those_of_an_orthonormal_mean_free_basis(simplices):
    dim = simplices.dim
    assert dim == sum(count - 1 for count in simplices.class_counts)
    basis = simplices.from_coordinates(torch.eye(dim, dtype=DOUBLE))
    flat = basis.flatten(1)
    close(flat @ flat.T, torch.eye(dim), 1e-15)
    close(basis.sum(-1), 0.0, 1e-15)
    assert bool((basis[:, ~simplices.valid] == 0).all())
    v = logits(simplices)
    m = simplices.to_coordinates(v)
    close(m, v.flatten(1) @ flat.T, 1e-14)
    close(simplices.from_coordinates(m), v, 1e-14)
    close(simplices.to_coordinates(simplices.from_coordinates(m)), m, 1e-14)
    # Coordinates do not see means, nor what stands behind the classes.
    close(simplices.to_coordinates(v + 3.0), m, 1e-14)


def test_coordinates_of_a_mask(simplices):
    mask = torch.rand(6, simplices.num_variables) < 0.5
    basis = simplices.from_coordinates(torch.eye(simplices.dim, dtype=DOUBLE))
    owner = basis.abs().sum(-1).argmax(1)
    assert torch.equal(simplices.coordinate_mask(mask), mask[:, owner])


def test_corners_are_unit_vectors_towards_the_classes(simplices):
    expected = corners(simplices.class_counts)
    like = torch.zeros((), dtype=DOUBLE)
    for k in range(min(simplices.class_counts)):
        labels = torch.full((1, simplices.num_variables), k)
        close(simplices.corners(labels, like)[0], expected[:, k], 1e-15)
    norms = [math.sqrt(1 - 1 / c) for c in simplices.class_counts]
    close(simplices.corner_norms(like)[:, 0], torch.tensor(norms, dtype=DOUBLE), 1e-15)
    weights = simplices.weights(logits(simplices))
    mean = torch.einsum("bnk,nkc->bnc", weights, expected)
    close(simplices.mean_corner(weights), mean, 1e-14)


def test_logits_have_their_means_taken_off(simplices):
    v = torch.randn(4, simplices.num_variables, simplices.max_classes, dtype=DOUBLE)
    found = simplices.mean_free(v)
    for row, count in enumerate(simplices.class_counts):
        close(found[:, row, :count], v[:, row, :count] - v[:, row, :count].mean(1, True), 1e-15)
        assert bool((found[:, row, count:] == 0).all())


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


# --- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("parametrisation", ["velocity", "classifier"])
@pytest.mark.parametrize("horizon", HORIZONS)
def test_losses_do_not_see_constants(horizon, parametrisation):
    counts = (2, 4, 3)
    path = path_of(counts, horizon)
    kind = {"velocity": Velocity, "classifier": Classifier}[parametrisation]()
    labels = torch.stack([torch.randint(c, (6,)) for c in counts], 1)
    start, t = logits(path.simplices, 6, 1.0), 0.9 * torch.rand(6, dtype=DOUBLE)
    output = torch.randn(6, 3, 4, dtype=DOUBLE)
    moved = output + 10 * torch.randn(6, 3, 1, dtype=DOUBLE)
    moved[~path.simplices.valid.expand_as(moved)] = 1e6
    v = path.logits(labels, start, t)
    expected = kind.loss(output, v, t, labels, start, path)
    close(kind.loss(moved, v, t, labels, start, path), expected, 1e-12)
    close(kind.field(moved, v, t, path), kind.field(output, v, t, path), 1e-12)


@pytest.mark.parametrize("horizon", HORIZONS)
def test_losses_by_their_definitions(horizon):
    counts = (2, 3)
    path = path_of(counts, horizon)
    labels = torch.tensor([[0, 2], [1, 1], [1, 0]])
    start, t = logits(path.simplices, 3, 1.0), torch.tensor([0.0, 0.4, 0.8], dtype=DOUBLE)
    output = torch.randn(3, 2, 3, dtype=DOUBLE)
    field = AssignmentField(FieldOf(lambda x, at: output[: len(x)]), path, Velocity())
    v = path.logits(labels, start, t)
    error = output - path.velocity(labels, start)
    by_rows = path.simplices.replicator(path.simplices.weights(v), error)
    close(field.loss(labels, start, t), (error * by_rows).sum((1, 2)), 1e-12)
    field = AssignmentField(FieldOf(lambda x, at: output[: len(x)]), path, Classifier())
    s = 1 - path.horizon.contraction * t.view(-1, 1, 1)
    distances = (v.unsqueeze(2) - centres(path.horizon, counts, t)).square().sum(-1)
    scores = output - 0.5 * distances / s**2
    expected = sum(
        nn.functional.cross_entropy(scores[:, i, :c], labels[:, i], reduction="none")
        for i, c in enumerate(counts)
    )
    close(field.loss(labels, start, t), expected, 1e-12)


@pytest.mark.parametrize("parametrisation", ["velocity", "classifier"])
def test_the_exact_field_minimises_the_loss(parametrisation):
    law = coupled()
    flow = exact_flow(law, "infinite", parametrisation)
    labels = law.states[law.probabilities.multinomial(20_000, replacement=True)]
    manual_seed(1)
    best = flow.loss_terms(labels)
    for factor in (0.6, 1.6):
        inner = flow.field.net
        flow.field.net = FieldOf(lambda x, t, f=factor, net=inner: f * net(x, t))
        manual_seed(1)
        excess = flow.loss_terms(labels) - best
        flow.field.net = inner
        # Paired by equal noise: more than four of its standard errors above.
        assert float(excess.mean()) > 4 * float(excess.std()) / math.sqrt(20_000)


def test_times_of_training():
    like = torch.zeros((), dtype=DOUBLE)
    t = InfiniteHorizon(time_shape=1.0, time_rate=0.25).draw_times(40_000, like)
    # Gamma(1, .25) has mean 4 and deviation 4: a standard error of .02.
    assert abs(float(t.mean()) - 4) < 0.08
    t = FiniteHorizon(end=0.8).draw_times(40_000, like)
    assert 0.799 < float(t.max()) <= 0.8
    # Uniform to .8: a deviation of .23, a standard error of .0012.
    assert abs(float(t.mean()) - 0.4) < 0.005
    assert t.dtype == DOUBLE


# --- samples -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("horizon", "parametrisation", "features"), WAYS)
def test_samples_of_the_exact_field_have_the_law(horizon, parametrisation, features):
    law = ragged() if parametrisation == "classifier" else coupled()
    flow = exact_flow(law, horizon, parametrisation, features=features, behind=1e6)
    labels = flow.sample(4000, steps=20)
    assert labels.shape == (4000, 2)
    assert labels.dtype == torch.long
    # Pearson's statistic at the floor of sampling; an error of .01 in total would add 10 and more.
    assert law.chi_square(labels) < law.chi_square_limit()


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "steps"), [("euler", 400), ("midpoint", 60), ("rk4", 15)])
def test_solvers_reproduce_the_law(solver, steps):
    law = coupled()
    flow = exact_flow(law, parametrisation="velocity")
    labels = flow.sample(10_000, steps, solver)
    assert law.chi_square(labels) < law.chi_square_limit()
    shares = law.histogram(labels)
    divergence = float((shares * (shares / law.probabilities).log()).sum())
    # 2 N KL is about chi-square with three degrees of freedom: a mean of 3, a deviation of 2.4.
    assert divergence < 13 / (2 * 10_000)


@pytest.mark.slow
def test_a_single_variable_recovers_its_law():
    law = Law((4,), [0.1, 0.2, 0.3, 0.4])
    labels = exact_flow(law, parametrisation="velocity").sample(10_000, steps=20)
    assert law.chi_square(labels) < law.chi_square_limit()


def test_the_default_number_of_steps_follows_the_horizon():
    def steps(horizon, num_classes=2):
        flow = nfi.AssignmentFlow(DenseField(2, num_classes, (4,)), 2, num_classes, horizon)
        assert flow.layer().times == flow.path.times()
        return len(flow.path.times()) - 1

    assert steps("infinite") == steps("finite") == 50
    # 75 deviations in steps of half of one; with more classes the others are nearer.
    assert steps(InfiniteHorizon(scale=5.0)) == 150
    assert steps(InfiniteHorizon(scale=5.0), 50) == math.ceil(150 * math.sqrt(50 / 98))
    # The noise shrinks to a thousandth of what it was.
    assert steps(FiniteHorizon(end=0.999)) == 1998


def test_the_loss_of_other_models_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"flow_matching_loss\(labels\)"):
        dense_flow().forward_kld(torch.zeros(4, 2))


@pytest.mark.slow
def test_times_of_the_steps_may_be_given():
    law = coupled()
    flow = exact_flow(law, parametrisation="velocity")
    times = 15 * torch.linspace(0, 1, 21, dtype=DOUBLE) ** 1.5
    assert law.chi_square(flow.sample(5000, times)) < law.chi_square_limit()
    assert torch.equal(*(_seeded(flow, steps=steps) for steps in (3, [0.0, 5.0, 10.0, 15.0])))


def _seeded(flow, seed=3, **options):
    manual_seed(seed)
    return flow.sample(50, **options)


@pytest.mark.slow
@pytest.mark.parametrize("horizon", [InfiniteHorizon(end=4.0), FiniteHorizon(end=0.5)])
def test_readings_of_weights_that_are_not_decided(horizon):
    law = ragged()
    flow = exact_flow(law, horizon, "velocity")
    # By simulation of the channel: labels first, then their logits at the end.
    rows = law.probabilities.multinomial(200_000, replacement=True)
    start = flow.path.draw_start(200_000, law.probabilities)
    end = torch.full((200_000,), horizon.end, dtype=DOUBLE)
    v = flow.path.logits(law.states[rows], start, end)
    weights = flow.simplices.weights(v)
    mixture = torch.stack([weights[:, [0, 1], s].prod(1).mean() for s in law.states])
    rounded = law.histogram(flow.simplices.round(v))
    for reading, p in (("mixture", mixture), ("rounding", rounded)):
        shares = law.histogram(flow.sample(8000, 30, reading=reading))
        # Standard errors of at most sqrt(.25 / 8000) = .0056.
        close(shares, p, 0.02)
    assert float((mixture - law.probabilities).abs().max()) > 0.03


def test_samples_are_reproducible():
    flow = dense_flow()
    assert torch.equal(_seeded(flow, steps=3), _seeded(flow, steps=3))
    assert not torch.equal(_seeded(flow, steps=3), _seeded(flow, 4, steps=3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The . steps of the solver are too few")
@pytest.mark.parametrize(("solver", "cost"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_evaluations_of_the_network(solver, cost):
    flow = exact_flow(coupled(), leave_one_out=True)
    net = flow.field.net
    net.counted[0] = 0
    flow.sample(3, 7, solver)
    assert net.calls == 7 * cost
    net.counted[0] = 0
    # One draw in five is followed again in half as many steps and, as that changes much, in twice
    # as many, in each part of the paths.
    flow.log_prob(coupled().states, 5, steps=7, solver=solver)
    assert net.calls == (7 + 4 + 14) * cost
    net.counted[0] = 0
    flow.log_prob(coupled().states, 5, steps=7, solver=solver, max_rows=10)
    assert net.calls == 2 * (7 + 4 + 14) * cost
    net.counted[0] = 0
    flow.flow_matching_loss(coupled().states)
    assert net.calls == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The . steps of the solver are too few")
def test_progress_is_shown_on_demand_only(capsys):
    flow = dense_flow()
    labels = torch.zeros(1, 2, dtype=torch.long)
    flow.sample(2, 3)
    flow.log_prob(labels, 2, steps=2)
    shown = capsys.readouterr()
    assert shown.err == shown.out == ""
    flow.sample(2, 3, progress=True)
    assert "3/3" in capsys.readouterr().err
    flow.log_prob(labels, 2, steps=2, progress=True)
    shown = capsys.readouterr()
    assert "2/2" in shown.err
    assert shown.out == ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The . steps of the solver are too few")
def test_dtypes_are_those_of_the_network():
    for dtype in (torch.float32, DOUBLE):
        flow = dense_flow().to(dtype)
        assert flow.field.dtype == dtype
        labels = flow.sample(4, 2)
        assert flow.flow_matching_loss(labels).dtype == dtype
        assert {part.dtype for part in flow.log_prob(labels, 2, steps=2)} == {dtype}
        narrow = labels.to(torch.uint8)
        assert flow.flow_matching_loss(narrow).dtype == dtype


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The . steps of the solver are too few")
def test_inputs_are_not_mutated():
    flow = nfi.AssignmentFlow(DenseField(2, 2, (4,), 1, True), 2, 2, missing=True).double()
    labels, mask = torch.tensor([[0, 1], [7, 0]]), torch.tensor([[True, True], [False, True]])
    context = torch.randn(2, 1, dtype=DOUBLE)
    copies = [x.clone() for x in (labels, mask, context)]
    flow.flow_matching_loss(labels, context, mask)
    flow.log_prob(labels, 2, steps=2, context=context, mask=mask)
    flow.sample(2, 2, context=context)
    for given, before in zip((labels, mask, context), copies, strict=True):
        assert torch.equal(given, before)


# --- when to stop --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "end", "bound"),
    [
        (2, 2, 0.1587),
        (2, 4, 0.0228),
        (5, 4, 0.228),
        (20, 6, 0.280),
        (2, 10, 2.9e-7),
        (8, 15, 5.0e-8),
        (91, 15, 4.4e-6),
        (160, 15, 8.3e-6),
    ],
)
def test_rounding_errors_of_the_infinite_horizon(classes, end, bound):
    found = rounding_error(InfiniteHorizon(end=float(end)), 1, classes)
    assert found == pytest.approx(bound, rel=0.02)
    assert rounding_error(InfiniteHorizon(end=float(end)), 3, classes) == min(1, 3 * found)


@pytest.mark.parametrize(
    ("counts", "horizon"),
    [
        ((2,), InfiniteHorizon(end=2.0)),
        ((2,), InfiniteHorizon(end=4.0)),
        ((2,), FiniteHorizon(end=0.3)),
        ((5,), InfiniteHorizon(end=4.0)),
        ((3, 2, 4), FiniteHorizon(end=0.4)),
        ((3, 2), InfiniteHorizon(scale=2.0, end=1.5)),
    ],
)
def test_rounding_errors_by_simulation_of_the_channel(counts, horizon):
    num = 200_000
    path = path_of(counts, horizon)
    labels = torch.stack([torch.randint(c, (num,)) for c in counts], 1)
    end = torch.full((num,), horizon.end, dtype=DOUBLE)
    v = path.logits(labels, path.draw_start(num, end), end)
    share = float((path.simplices.round(v) != labels).any(1).double().mean())
    bound = rounding_error(horizon, len(counts), list(counts))
    error = math.sqrt(bound * (1 - bound) / num)  # at most .0009
    assert share < bound + 4 * error
    if counts == (2,):
        assert abs(share - bound) < 4 * error
    # The bound is a sum over other classes, so not far above.
    assert bound < 2 * share


@pytest.mark.parametrize("error", [1e-2, 1e-6])
@pytest.mark.parametrize("horizon", ["infinite", FiniteHorizon(smoothing=0.1)])
@pytest.mark.parametrize("counts", [(2,) * 9, (2, 7, 3)])
def test_the_chosen_end_is_the_earliest(counts, horizon, error):
    choice = choose_horizon(len(counts), list(counts), error, horizon)
    assert choice.rounding_error <= error
    assert choice.rounding_error == pytest.approx(error, rel=1e-3)
    assert choice.rounding_error == rounding_error(choice.horizon, len(counts), list(counts))
    if horizon != "infinite":
        assert choice.horizon.smoothing == 0.1


@pytest.mark.slow
@pytest.mark.parametrize("horizon", HORIZONS)
def test_the_chosen_steps_misplace_few_labels(horizon):
    law, num = ising(), 400
    path = AssignmentPath(Simplices(9, 2), choose_horizon(9, 2, 1e-2, horizon).horizon)
    net = ExactField(law, path.horizon, "velocity")
    field = AssignmentField(net, path, Velocity(), "scaled_logits")
    start = path.draw_start(num, law.probabilities)

    def labels(steps, solver):
        def rate(v, t):
            return field(v, v.new_full((len(v),), t))

        with torch.no_grad():
            end = integrate(rate, start, time_grid(steps, path.horizon.end), solver)
        return path.simplices.round(end)

    right = labels(24, "rk4")
    for solver in ("rk4", "midpoint"):
        steps = choose_horizon(9, 2, 1e-2, horizon, solver).steps
        share = float((labels(steps, solver) != right).any(1).double().mean())
        # A share of .01 has the standard error .005.
        assert share < 0.05
    assert choose_horizon(9, 2, 1e-2, horizon).steps < 10


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
    # By the density: the host's loss is added up in float32.
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            weight[index] += step
        values.append(-float(model.log_prob(x).mean().detach()))
    assert float(weight.grad[index]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


@pytest.mark.slow
def test_density_on_simplices():
    flow = nfi.AssignmentFlow(stirred(DenseField(2, 3, hidden=(8,)), 1.5), 2, [3, 2])
    layer, lift = flow.layer(3), SimplexLift(2, [3, 2])
    base = nf.distributions.DiagGaussian(3, trainable=False)
    model = nfi.InjectiveNormalizingFlow(base, [layer, lift]).double()
    w = torch.tensor([[0.2, 0.5, 0.3, 0.4, 0.6], [0.1, 0.1, 0.8, 0.9, 0.1]], dtype=DOUBLE)
    # By the Jacobian of the two free weights and of the one free weight, by coordinates.
    m = lift.inverse(w)[0]
    jacobian = dense_jacobian(lambda x: lift(x)[0][:, [0, 1, 3]], m)
    expected = nf.NormalizingFlow(base, [layer]).double().log_prob(m)
    expected = expected - torch.linalg.slogdet(jacobian)[1]
    close(model.log_prob(w), expected, 1e-10)


@pytest.mark.slow
def test_density_on_one_simplex_of_two_classes_integrates_to_one():
    flow = nfi.AssignmentFlow(
        stirred(DenseField(1, 2, hidden=(8,)), 2.0), 1, 2, InfiniteHorizon(scale=1.0, end=1.0)
    )
    base = nf.distributions.DiagGaussian(1, trainable=False)
    model = nfi.InjectiveNormalizingFlow(base, [flow.layer(15), SimplexLift(1, 2)]).double()
    # The midpoint rule in logits, where the density is smooth and falls off.
    logit = torch.linspace(-16, 16, 201, dtype=DOUBLE)
    w = torch.stack([logit.sigmoid(), (-logit).sigmoid()], 1)
    with torch.no_grad():
        density = model.log_prob(w).exp() * w.prod(1)
    assert float(density.sum() * 0.16) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("measure", ["lebesgue", "hausdorff"])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_the_lift_of_one_simplex_is_the_isometric_chart(classes, measure):
    lift = SimplexLift(1, classes, measure)
    chart = SimplexStickBreaking(classes, "ilr", measure)
    m = torch.randn(5, classes - 1, dtype=DOUBLE)
    x, log_det = lift(m)
    expected, expected_log_det = chart(m)
    close(x, expected, 1e-15)
    close(log_det, expected_log_det, 1e-14)
    close(lift.inverse(x)[0], m, 1e-13)
    close(lift.inverse(x)[1], -log_det, 1e-13)


def test_the_lift_of_several_simplices_is_that_of_each():
    lift = SimplexLift(3, [2, 4, 3])
    m = torch.randn(5, 6, dtype=DOUBLE)
    parts = [
        SimplexStickBreaking(c, "ilr")(x)
        for c, x in zip((2, 4, 3), m.split([1, 3, 2], 1), strict=True)
    ]
    x, log_det = lift(m)
    close(x, torch.cat([part for part, _ in parts], 1), 1e-15)
    close(log_det, sum(part for _, part in parts), 1e-13)
    free = torch.linalg.slogdet(dense_jacobian(lambda s: lift(s)[0][:, [0, 2, 3, 4, 6, 7]], m))
    close(free[1], log_det, 1e-12)


def test_the_lift_refuses_what_is_no_weights():
    x = torch.tensor([[0.5, 0.5, 0.5, 0.6]], dtype=DOUBLE)
    with pytest.raises(OffManifoldError, match="simplex 1 of x"):
        SimplexLift(2, 2).inverse(x)
    m = SimplexLift(2, 2, off_manifold="project").inverse(x)[0]
    close(m[:, 1], math.log(5 / 6) / math.sqrt(2), 1e-12)
    with pytest.raises(OffManifoldError, match="simplex 0 of x"):
        SimplexLift(2, 2).inverse(torch.tensor([[0.0, 1.0, 0.5, 0.5]]))


# --- masks and contexts --------------------------------------------------------------------------


@pytest.mark.parametrize("parametrisation", ["velocity", "classifier"])
@pytest.mark.parametrize("value", [-1, 1, 99])
def test_labels_of_missing_variables_are_never_read(parametrisation, value):
    net = DenseField(3, 3, hidden=(8,), missing=True)
    flow = nfi.AssignmentFlow(net, 3, 3, parametrisation=parametrisation, missing=True).double()
    mask = torch.tensor([[True, False, True], [False, False, True]])
    labels = torch.tensor([[2, 0, 1], [0, 0, 2]])
    results = []
    for given in (labels, labels.masked_fill(~mask, value)):
        manual_seed(2)
        flow.zero_grad()
        loss = flow.flow_matching_loss(given, mask=mask)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in net.parameters())])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    # Outputs of a variable that is missing everywhere get no gradient.
    last = [p.grad for p in net.parameters() if p.dim() == 1][-1].view(3, 3)
    assert not bool(last[1].any())
    assert bool(last[[0, 2]].any())


@pytest.mark.parametrize("features", ["posterior", "scaled_logits", "weights"])
def test_missing_variables_are_shown_as_such(features):
    seen = []
    path = path_of((3, 3))
    net = FieldOf(lambda x, t: seen.append(x) or x[..., :3])
    field = AssignmentField(net, path, Velocity(), features, missing=True)
    v, t = logits(path.simplices, 2), torch.ones(2, dtype=DOUBLE)
    mask = torch.tensor([[True, False], [True, True]])
    moved = field(v, t, mask=mask)
    shown = seen[-1]
    assert torch.equal(shown[..., 3], (~mask).double())
    assert bool((shown[0, 1, :3] == 0).all())
    assert bool((shown[mask][:, :3] != 0).any(1).all())
    assert bool((moved[0, 1] == 0).all())
    field(v, t)
    assert bool((seen[-1][..., 3] == 0).all())


@pytest.mark.slow
def test_samples_by_context():
    laws = [coupled(), Law((2, 2), [0.1, 0.5, 0.3, 0.1])]
    both = Law((2, 2), torch.stack([law.probabilities for law in laws]))
    flow = exact_flow(both, parametrisation="velocity", by_context=True)
    context = torch.arange(2).repeat_interleave(4000).view(-1, 1)
    labels = flow.sample(8000, 20, context=context.double())
    for law, part in zip(laws, labels.chunk(2), strict=True):
        assert law.chi_square(part) < law.chi_square_limit()


def test_contexts_that_are_missing_or_wrong():
    labels = torch.zeros(3, 2, dtype=torch.long)
    plain, flow = (
        nfi.AssignmentFlow(DenseField(2, 2, (4,), context_dim=dim), 2, 2) for dim in (0, 2)
    )
    calls = (
        lambda model, context: model.flow_matching_loss(labels, context),
        lambda model, context: model.sample(3, 2, context=context),
        lambda model, context: model.log_prob(labels, 2, steps=2, context=context),
    )
    for call in calls:
        with pytest.raises(ContextError, match="was built with a context, but none came"):
            call(flow, None)
        with pytest.raises(ContextError, match="no base, flow or network of this model takes one"):
            call(plain, torch.zeros(3, 2))
        with pytest.raises(ContextError, match="context must have one row per sample, 3 in all"):
            call(flow, torch.zeros(4, 2))
        with pytest.raises(ContextError, match="DenseField with context_dim=2 takes a context"):
            call(flow, torch.zeros(3, 5))


# --- errors --------------------------------------------------------------------------------------


def test_labels_that_are_none():
    flow = nfi.AssignmentFlow(DenseField(2, 3, (4,)), 2, [2, 3])
    for call in (flow.flow_matching_loss, flow.loss_terms, flow.log_prob):
        with pytest.raises(
            OptionError,
            match=r"labels has 2 of 4 entries out of range, the first at index \[0, 0\]: 2, where "
            r"variable 0 has classes 0 to 1\. Count classes from 0, and give missing entries by "
            "mask=",
        ):
            call(torch.tensor([[2, 0], [1, -1]]))
        with pytest.raises(DtypeError, match=r"labels must be integers .*float32\. Convert"):
            call(torch.zeros(2, 2))
        with pytest.raises(ShapeError, match=r"labels must have shape \(B, 2\), got \(2, 3\)"):
            call(torch.zeros(2, 3, dtype=torch.long))
        with pytest.raises(ShapeError, match=r"got \(2, 2, 3\)\. If these are one-hot rows, conv"):
            call(torch.zeros(2, 2, 3))
        with pytest.raises(ShapeError, match="labels is an empty batch"):
            call(torch.zeros(0, 2, dtype=torch.long))
        with pytest.raises(DtypeError, match=r"labels must be a torch\.Tensor, got list"):
            call([[0, 1]])


def test_masks_that_are_none():
    flow = nfi.AssignmentFlow(DenseField(2, 2, (4,), missing=True), 2, 2, missing=True)
    labels = torch.zeros(3, 2, dtype=torch.long)
    with pytest.raises(DtypeError, match=r"mask must be a tensor of booleans, .* torch.int64"):
        flow.flow_matching_loss(labels, mask=labels)
    with pytest.raises(DtypeError, match="true where observed, got list"):
        flow.flow_matching_loss(labels, mask=[[True]])
    with pytest.raises(ShapeError, match=r"shape \(3, 2\) of the labels, got \(3,\)"):
        flow.flow_matching_loss(labels, mask=labels[:, 0].bool())
    with pytest.raises(OptionError, match="Build with missing=True, and the network for one more"):
        dense_flow().flow_matching_loss(labels, mask=labels == 0)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: dense_flow(horizon="open"), "horizon must be one of infinite, finite, an Inf"),
        (lambda: dense_flow(parametrisation="score"), "parametrisation must be one of velocity, "),
        (lambda: dense_flow(features="logits"), "features must be one of posterior, scaled_log"),
        (lambda: nfi.AssignmentFlow(abs, 2, 2), r"net must be a torch\.nn\.Module, got builtin"),
        (lambda: Simplices(2, 1), "at least two classes, got num_classes=1. Leave out"),
        (lambda: Simplices(2, [2, 2, 2]), "num_classes must be one number or 2, one for every"),
        (lambda: Simplices(0, 2), "num_variables must be a positive integer, got 0"),
        (lambda: dense_flow(features=["weights"]), r"features must be one of .*\['weights'\]"),
        (
            lambda: dense_flow(horizon=choose_horizon(2, 2)),
            r"choose_horizon returns, pass \.horiz",
        ),
        (lambda: InfiniteHorizon(scale=0), "scale must be a positive number, got 0"),
        (lambda: InfiniteHorizon(end=math.inf), "end must be a positive number, got inf"),
        (lambda: InfiniteHorizon(time_shape="1"), "time_shape must be a positive number, got '1'"),
        (lambda: FiniteHorizon(end=1.0), r"end must be a number between 0 and 1, got 1\.0"),
        (lambda: FiniteHorizon(smoothing=0), "smoothing must be a number between 0 and 1, got 0"),
        (lambda: choose_horizon(2, 2, 0.0), r"error must be a number between 0 and 1, got 0\.0"),
        (lambda: choose_horizon(2, 2, solver="rk"), "solver must be one of euler, midpoint, rk4"),
        (lambda: dense_flow().sample(0), "num_samples must be a positive integer, got 0"),
        (lambda: dense_flow().sample(2, 0), "steps must be a positive integer, got 0"),
        (lambda: dense_flow().sample(2, [0.0, 9.0]), "times that increase from 0 to 15, got 2"),
        (lambda: dense_flow().sample(2, [1.0, 15.0]), "times that increase from 0 to 15"),
        (lambda: dense_flow().sample(2, [0.0, 9, 8, 15]), "times that increase from 0 to 15"),
        (lambda: dense_flow().sample(2, []), "times that increase from 0 to 15, got 0 times"),
        (lambda: dense_flow().sample(2, solver="dopri5"), "solver must be one of .*'dopri5'"),
        (lambda: dense_flow().sample(2, reading="argmax"), "reading must be one of rounding, mix"),
        (
            lambda: dense_flow().sample(2, reading=["mixture"]),
            "reading must be one of rounding, m",
        ),
        (lambda: dense_flow().layer(divergence="trace"), "divergence must be one of exact, hutch"),
        (lambda: dense_flow().layer(divergence="hutchinson", num_probes=0), "got 0"),
        (lambda: SimplexLift(1, 3, "area"), "measure must be one of"),
        (lambda: SimplexLift(1, 3, off_manifold="ignore"), "off_manifold must be one of"),
    ],
)
def test_options_out_of_range(build, text):
    with pytest.raises(OptionError, match=text):
        build()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_importance_samples": 0}, "num_importance_samples must be a positive integer"),
        ({"max_rows": 0}, "max_rows must be a positive integer"),
        ({"divergence": "trace"}, "divergence must be one of exact, hutchinson, got 'trace'"),
        ({"reading": "argmax"}, "reading must be one of rounding, mixture, got 'argmax'"),
        ({"solver": "dopri5"}, "solver must be one of euler, midpoint, rk4, got 'dopri5'"),
    ],
)
def test_options_of_likelihoods_out_of_range(options, text):
    with pytest.raises(OptionError, match=text):
        dense_flow().log_prob(torch.zeros(1, 2, dtype=torch.long), **options)


def test_networks_that_do_not_fit_are_found_at_construction():
    text = r"one number for every class, shape \(2, 2, 2\) for features of shape \(2, 2, 2\), got "
    with pytest.raises(ShapeError, match=text + r"\(2, 4\)"):
        nfi.AssignmentFlow(FieldOf(lambda x, t: x.flatten(1)), 2, 2)
    with pytest.raises(ShapeError, match=text + "tuple"):
        nfi.AssignmentFlow(FieldOf(lambda x, t: (x, t)), 2, 2)
    with pytest.raises(ShapeError, match=r"built for features of shape \(B, 3, 2\), got \(2, 2,"):
        nfi.AssignmentFlow(DenseField(3, 2, (4,)), 2, 2)
    with pytest.raises(ShapeError, match="missing=True if the model has it"):
        nfi.AssignmentFlow(DenseField(2, 2, (4,)), 2, 2, missing=True)


def test_trying_a_network_changes_nothing_in_it():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(2), nn.Dropout()
            self.drop.eval()

        def forward(self, x, t):
            return self.drop(self.norm(x))

    net = Counting()
    nfi.AssignmentFlow(net, 2, 2)
    assert int(net.norm.num_batches_tracked) == 0
    assert net.norm.training
    assert not net.drop.training


def test_divergence_of_training_is_named():
    flow = nfi.AssignmentFlow(FieldOf(lambda x, t: x / 0), 2, 2)
    with pytest.raises(NonFiniteError, match="flow matching"):
        flow.flow_matching_loss(torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(NonFiniteError, match="the logits at the end .* The network has diverged"):
        flow.sample(2, 2)
    with pytest.raises(ShapeError, match=r"z must have shape \(B, 2\), got \(3, 4\)"):
        flow.layer(2)(torch.zeros(3, 4))


# --- checkpoints and training --------------------------------------------------------------------


def test_save_and_load(tmp_path):
    file = tmp_path / "flow.safetensors"
    saved, loaded = dense_flow(), dense_flow()
    saved.save(file)
    loaded.load(file)
    assert torch.equal(*(_seeded(flow, steps=3) for flow in (saved, loaded)))
    other = nfi.AssignmentFlow(DenseField(2, 2, hidden=(9,)), 2, 2)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(CheckpointError):
        other.load(file)
    for key, value in other.state_dict().items():
        assert torch.equal(value, before[key])


def test_shown_options():
    shown = repr(nfi.AssignmentFlow(DenseField(2, 3, (4,)), 2, [2, 3], "finite"))
    assert "parametrisation=Classifier, features='posterior', missing=False" in shown
    assert "num_variables=2, num_classes=(2, 3)" in shown
    assert "FiniteHorizon(smoothing=0.01, end=0.9)" in shown
    assert "measure='lebesgue'" in repr(SimplexLift(1, 2))


def test_speeds_of_the_horizons():
    counts = (2, 3, 7)
    for horizon in (InfiniteHorizon(scale=0.7), FiniteHorizon(smoothing=0.2)):
        found = horizon.speeds(torch.tensor(counts, dtype=DOUBLE))
        close(found, speeds(horizon, counts), 1e-13)


@pytest.mark.slow
def test_training_learns_the_coupling():
    law = coupled()
    flow = nfi.AssignmentFlow(DenseField(2, 2, hidden=(64,)), 2, 2)
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    for _ in range(1000):
        labels = law.states[law.probabilities.multinomial(256, replacement=True)]
        loss = flow.flow_matching_loss(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    shares = law.histogram(flow.sample(20_000, steps=20))
    # Samples of the law itself are .004 apart from it in the mean.
    assert float((shares - law.probabilities).abs().sum() / 2) < 0.03
    found = flow.log_prob(law.states, 64, steps=20).log_prob.exp()
    close(found, law.probabilities.to(found), 0.03)

"""Logits and weights of several simplices, and their lift to vectors."""

from __future__ import annotations

import math

import normflows as nf
import pytest
import torch
from support.assignment_flows import COUNTS, logits, stirred
from support.assignment_oracles import DOUBLE, corners
from support.comparison import close
from support.dense import dense_jacobian

import normflows_injective as nfi
from normflows_injective.errors import OffManifoldError
from normflows_injective.flows import SimplexLift, SimplexStickBreaking
from normflows_injective.flows.assignment import InfiniteHorizon, Simplices
from normflows_injective.nets.fields import DenseField

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

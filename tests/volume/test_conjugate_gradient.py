"""The matrix-free solver, and the estimator of arXiv 2106.01413 built on it: oracle 13."""

import pytest
import torch
from support.geometry import seeded, tanh_pair
from support.gradients import assert_gradients_close, gradients

from normflows_injective.volume import (
    ConjugateGradient,
    conjugate_gradient,
    draw_probes,
    log_volume,
)


def spd_systems(num_probes: int, batch: int, d: int):
    """Symmetric positive definite matrices (B, d, d) and right-hand sides (K, B, d)."""
    j = torch.randn(batch, d + 3, d, dtype=torch.float64)
    return j.mT @ j, torch.randn(num_probes, batch, d, dtype=torch.float64)


@pytest.mark.parametrize("num_probes", [1, 3])
@pytest.mark.parametrize("d", [1, 2, 6])
@seeded(131)
def test_oracle_13_solver_against_dense_solve(d, num_probes):
    """The systems of a batch are solved at once, each exactly within d iterations."""
    gram, v = spd_systems(num_probes, 5, d)
    result = conjugate_gradient(lambda p: torch.einsum("bij,kbj->kbi", gram, p), v, d, 1e-13)
    expected = torch.linalg.solve(gram, v.unsqueeze(3)).squeeze(3)
    torch.testing.assert_close(result.solution, expected, rtol=1e-8, atol=1e-8)
    assert result.iterations <= d
    assert result.residual.max() < 1e-8


@seeded(132)
def test_oracle_13_solver_stops_within_its_bound():
    """Never more than max_iterations products, and what is left is in the residual."""
    gram, v = spd_systems(2, 4, 8)
    calls = []

    def product(p):
        calls.append(p)
        return torch.einsum("bij,kbj->kbi", gram, p)

    previous = torch.tensor(torch.inf)
    for bound in (1, 2, 4, 8):
        calls.clear()
        result = conjugate_gradient(product, v, bound, 1e-12)
        assert result.iterations == len(calls) - 1 == bound  # one more measures the residual
        left = v - torch.einsum("bij,kbj->kbi", gram, result.solution)
        torch.testing.assert_close(
            result.residual, left.norm(dim=2) / v.norm(dim=2), rtol=1e-4, atol=1e-8
        )
        # The error shrinks in the energy norm, which the residual's norm need not.
        error = result.solution - torch.linalg.solve(gram, v.unsqueeze(3)).squeeze(3)
        energy = torch.einsum("kbi,bij,kbj->kb", error, gram, error)
        assert (energy < previous).all()
        previous = energy


@seeded(133)
def test_oracle_13_solver_stops_at_its_tolerance():
    """A multiple of the identity is solved in one iteration; a loose tolerance stops early."""
    _, v = spd_systems(2, 4, 8)
    found = conjugate_gradient(lambda p: 3 * p, v, 8, 1e-8)
    assert found.iterations == 1
    torch.testing.assert_close(found.solution, v / 3)
    gram, v = spd_systems(2, 4, 8)
    # Of a condition number below four, so that two iterations are enough.
    gram = gram + 20 * torch.eye(8, dtype=gram.dtype)
    loose = conjugate_gradient(lambda p: torch.einsum("bij,kbj->kbi", gram, p), v, 8, 0.5)
    assert loose.iterations < 8
    assert (loose.residual < 0.5).all()


@seeded(134)
def test_oracle_13_solver_leaves_solved_systems_alone():
    """An easy system next to a hard one stays at its solution, without NaN from 0/0."""
    gram, v = spd_systems(1, 2, 6)
    gram[0] = 2 * torch.eye(6)
    v[:, 1, 0] += 1
    found = conjugate_gradient(lambda p: torch.einsum("bij,kbj->kbi", gram, p), v, 6, 1e-10)
    assert found.iterations > 1
    torch.testing.assert_close(found.solution[0, 0], v[0, 0] / 2, rtol=1e-12, atol=1e-12)
    assert found.solution.isfinite().all()


def test_probes_of_width_zero_are_solved():
    solution = conjugate_gradient(lambda p: p, torch.zeros(2, 3, 0), 4, 1e-6)
    assert solution.residual.equal(torch.zeros(2, 3))
    zero = conjugate_gradient(lambda p: p, torch.zeros(1, 1, 2), 4, 1e-6)
    assert zero.residual.equal(torch.zeros(1, 1))


@seeded(135)
def test_oracle_13_average_over_basis_probes_is_exact():
    """E v v' = I over the scaled basis vectors: K = 1 estimates average to the exact gradient."""
    encoder, decoder = tanh_pair(6, 3, torch.device("cpu"), torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    estimator = ConjugateGradient(tolerance=1e-12)
    volumes = []
    for basis in torch.eye(3, dtype=torch.float64):
        probes = (3**0.5 * basis).expand(1, 4, 3)
        volumes.append(estimator(x, encoder, decoder, lambda z, v=probes: v).volume)
    mean = torch.stack(volumes).mean(0)
    torch.testing.assert_close(mean, torch.full_like(mean, 1.5))
    exact = log_volume(decoder, encoder(x)).sum()
    assert_gradients_close(gradients(mean.sum(), parameters), gradients(exact, parameters), 1e-9)


@seeded(136)
def test_oracle_13_truncated_solve_is_biased():
    """With one iteration in three dimensions the gradient is another one: the bound is real."""
    encoder, decoder = tanh_pair(6, 3, torch.device("cpu"), torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)
    probes = draw_probes("orthonormal", 3, encoder(x))
    parameters = list(decoder.parameters())
    exact = gradients(log_volume(decoder, encoder(x)).sum(), parameters)
    errors = []
    for bound in (1, 2, 3):
        estimator = ConjugateGradient(max_iterations=bound, tolerance=1e-12)
        volume = estimator(x, encoder, decoder, lambda z: probes).volume
        found = gradients(volume.sum(), parameters)
        errors.append(
            sum(float((f - e).detach().square().sum()) for f, e in zip(found, exact, strict=True))
        )
    scale = sum(float(e.detach().square().sum()) for e in exact)
    assert errors[0] > 1e-3 * scale
    assert errors[2] < 1e-16 * scale


@seeded(137)
def test_oracle_13_cost_of_an_iteration():
    """The decoder runs once with a graph and once per tangent product, never d * K times."""
    encoder, decoder = tanh_pair(8, 5, torch.device("cpu"), torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64)
    calls = []

    def decode(z):
        calls.append(z.shape)
        return decoder(z)

    probes = draw_probes("orthonormal", 4, encoder(x))
    ConjugateGradient(max_iterations=2)(x, encoder, decode, lambda z: probes)
    # One with a graph, one per iteration, one to measure the residual, one each for J s and J v:
    # all four probes at once.
    assert len(calls) == 1 + 2 + 1 + 2

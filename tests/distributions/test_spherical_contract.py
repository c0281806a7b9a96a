"""Laws on the unit sphere: precision, types, state, use in models, refusals."""

from __future__ import annotations

import copy
import math

import normflows as nf
import pytest
import torch
from support.points import double, on_sphere
from support.spherical_oracles import bessel_ratio, distributions, skewed, von_mises_fisher
from torch.autograd import gradcheck, gradgradcheck

import normflows_injective as nfi
from normflows_injective.distributions.spherical import (
    AngularCentralGaussian,
    UniformSphere,
    log_sphere_area,
)
from normflows_injective.distributions.von_mises_fisher import VonMisesFisher, log_normaliser
from normflows_injective.flows.surfaces.off_manifold import check_policy, unit_vectors

# --- precision, types and state


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 3, 1000])
def test_single_precision(dim):
    scale = torch.eye(dim) + 0.4 * torch.randn(dim, dim) / math.sqrt(dim)
    candidates = [
        UniformSphere(dim),
        AngularCentralGaussian(scale, trainable=True),
        *(VonMisesFisher(torch.randn(dim), kappa, True) for kappa in (0.0, 1.0, 1e5, 1e6)),
    ]
    for distribution in candidates:
        x, log_p = distribution(20)
        assert x.dtype == log_p.dtype == torch.float32
        assert x.isfinite().all()
        precise = copy.deepcopy(distribution).double()
        x = x.detach()
        value = distribution.log_prob(x)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), precise.log_prob(x.double()), rtol=2e-7, atol=0)
        # Between the sample and its rounding the log-density varies by sqrt(D kappa) 1e-7.
        torch.testing.assert_close(log_p, value, rtol=1e-5, atol=5e-3)
        if value.requires_grad:
            (value.sum() + log_p.sum()).backward()
            assert all(p.grad.isfinite().all() for p in distribution.parameters())


def test_dtype_of_the_answer_is_that_of_the_distribution():
    for distribution in distributions(3):
        assert distribution.log_prob(on_sphere(2, 3).float()).dtype == torch.float64
        assert distribution.float().log_prob(on_sphere(2, 3)).dtype == torch.float32
        x, log_p = distribution.double()(2)
        assert x.dtype == log_p.dtype == torch.float64


def test_a_concentration_keeps_the_digits_of_double_precision():
    assert VonMisesFisher(double([1.0, 0.0]), 0.1).concentration.item() == 0.1


def test_state_and_copies():
    x = on_sphere(4, 3)
    fresh = [
        UniformSphere(3).double(),
        AngularCentralGaussian(torch.eye(3, dtype=torch.float64)),
        von_mises_fisher([0.0, 0.0, 1.0], 1.0),
    ]
    for trainable in (False, True):
        for distribution, empty in zip(distributions(3, trainable), fresh, strict=True):
            assert any(True for _ in distribution.parameters()) == (
                trainable and not isinstance(distribution, UniformSphere)
            )
            expected = distribution.log_prob(x)
            empty.load_state_dict(distribution.state_dict())
            assert torch.equal(empty.log_prob(x), expected)
            assert torch.equal(copy.deepcopy(distribution).log_prob(x), expected)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_direction_of_any_length(size):
    loc = VonMisesFisher(torch.tensor([3 * size, 4 * size]), 1.0).loc
    torch.testing.assert_close(loc, torch.tensor([0.6, 0.8]))


def test_the_tensors_of_the_caller_are_copied():
    loc, scale = double([3.0, 4.0]), skewed(2)
    fisher, angular = VonMisesFisher(loc, 1.0), AngularCentralGaussian(scale)
    before = angular.scale.clone()
    loc.zero_()
    scale.zero_()
    torch.testing.assert_close(fisher.loc, double([0.6, 0.8]))
    torch.testing.assert_close(angular.scale, before)


def test_as_base_and_as_target_of_a_flow():
    uniform, fisher = UniformSphere(3).double(), von_mises_fisher([0.0, 0.0, 1.0], 2.0, True)
    for q0 in (uniform, fisher, AngularCentralGaussian(skewed(3), True)):
        model = nf.NormalizingFlow(q0, [], p=uniform)
        x, log_q = model.sample(6)
        torch.testing.assert_close(model.log_prob(x), log_q)
        # normflows adds up in float32 there.
        kld = model.forward_kld(x).double()
        torch.testing.assert_close(kld, -log_q.mean(), rtol=1e-6, atol=1e-6)
        assert isinstance(q0, nf.distributions.BaseDistribution)
        assert q0.on_manifold
        assert q0.shape == (3,)
    # KL(q | p) = log N - log A - kappa E t, exactly zero terms apart, with E t = 0 under q.
    model = nf.NormalizingFlow(uniform, [], p=fisher)
    expected = (log_normaliser(double(2.0), 3) - log_sphere_area(3)).item()
    # 4 standard errors of kappa t, whose standard deviation is 2 / sqrt(3).
    assert model.reverse_kld(10000).item() == pytest.approx(expected, abs=4 * 2 / math.sqrt(3e4))


def test_direction_and_concentration_are_learned():
    target = von_mises_fisher([1.0, -1.0, 0.5, 2.0], 12.0)
    model = von_mises_fisher([1.0, 0.0, 0.0, 0.0], 0.0, trainable=True)
    x = target.sample(4000)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -model.log_prob(x).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    # The maximum of the likelihood is where the mean vectors agree.
    mean = x.mean(0)
    with torch.no_grad():
        direction = torch.nn.functional.normalize(model.loc, dim=0)
    torch.testing.assert_close(direction, mean / mean.norm(), rtol=0, atol=1e-4)
    learned = bessel_ratio(4, model.concentration.item())
    assert learned == pytest.approx(mean.norm().item(), abs=1e-4)


# --- refusals


def test_points_off_the_sphere_are_rejected_by_name():
    x = torch.eye(3, dtype=torch.float64).repeat(2, 1)
    x[1] *= 1.5
    x[4] *= 3
    before = x.clone()
    message = (
        r"x has 2 of 6 rows off the unit sphere, the worst at index \[4\] with norm 3, where "
        r"1 \+- 0.0001 is allowed. Divide the rows by their norms, or build with "
        r"off_manifold='project', which does."
    )
    for distribution in distributions(3):
        with pytest.raises(nfi.errors.OffManifoldError, match=message):
            distribution.log_prob(x)
        near = distribution.log_prob((1 + 9e-5) * x[[0, 2, 3]])
        torch.testing.assert_close(near, distribution.log_prob(x[[0, 2, 3]]), rtol=0, atol=1e-12)
        with pytest.raises(nfi.errors.NonFiniteError, match=r"x has 1 of 6 values NaN"):
            distribution.log_prob(double([[1.0, 0, 0], [0, float("nan"), 1.0]]))
    assert torch.equal(x, before)


def test_points_off_the_sphere_are_projected_where_asked():
    x = torch.randn(4, 3, dtype=torch.float64)
    before = x.clone()
    direction = x / x.norm(dim=1, keepdim=True)
    for build in (
        lambda **options: UniformSphere(3, **options),
        lambda **options: AngularCentralGaussian(torch.diag(double([1.0, 2.0, 3.0])), **options),
        lambda **options: VonMisesFisher(double([1.0, 2.0, 3.0]), 4.0, **options),
    ):
        projecting, rejecting = build(off_manifold="project").double(), build().double()
        torch.testing.assert_close(projecting.log_prob(x), rejecting.log_prob(direction))
        with pytest.raises(nfi.errors.OptionError, match="must be one of reject, project, got 'n"):
            build(off_manifold="nearest")
    assert torch.equal(x, before)


def test_projection_of_awkward_lengths():
    for size in (1e-40, 1.0, 1e30):  # squares of which float32 does not hold
        u = unit_vectors(torch.full((2, 4), size), "project", "x")
        torch.testing.assert_close(u, torch.full((2, 4), 0.5))
    x = torch.zeros(3, 2)
    x[1, 0] = 1.0
    with pytest.raises(
        nfi.errors.OffManifoldError,
        match=r"x has 2 of 3 rows of zeros, the first at index \[0\]: they have no direction",
    ):
        unit_vectors(x, "project", "x")
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: unit_vectors(x, "project", "x"), x)
    assert gradgradcheck(lambda x: unit_vectors(x, "project", "x"), x)


def test_values_are_not_looked_at_inside_a_vmap():
    x = 2 * torch.eye(3)
    reject = torch.func.vmap(lambda v: unit_vectors(v, "reject", "v"))
    torch.testing.assert_close(reject(x), x / x.norm(dim=-1, keepdim=True))
    project = torch.func.vmap(lambda v: unit_vectors(v, "project", "v"))
    assert torch.equal(project(x), torch.eye(3))
    tangents = torch.func.jacfwd(lambda v: unit_vectors(v, "project", "v"))(x[0])
    torch.testing.assert_close(tangents, torch.diag(torch.tensor([0.0, 0.5, 0.5])))
    check_policy("reject")


def test_wrong_shapes():
    for distribution in distributions(3):
        with pytest.raises(nfi.errors.ShapeError, match=r"x must have shape \(B, 3\), got \(2, 4"):
            distribution.log_prob(on_sphere(2, 4))
        assert distribution.log_prob(on_sphere(2, 3)[:0]).shape == (0,)
    with pytest.raises(nfi.errors.ShapeError, match=r"scale must have shape \(D, D\), got \(2, 3"):
        AngularCentralGaussian(torch.ones(2, 3))
    with pytest.raises(nfi.errors.ShapeError, match=r"loc must be a vector of shape \(D,\), got"):
        VonMisesFisher(torch.ones(1, 3), 1.0)
    with pytest.raises(nfi.errors.ShapeError, match=r"concentration must be one number, got sha"):
        VonMisesFisher([1.0, 0.0], torch.ones(1))


def test_wrong_options():
    message = "integer dimension of 2 or more, got 1"
    for build in (
        lambda: UniformSphere(1),
        lambda: AngularCentralGaussian([[1.0]]),
        lambda: VonMisesFisher([1.0], 1.0),
        lambda: log_normaliser(torch.ones(()), 1),
    ):
        with pytest.raises(nfi.errors.OptionError, match=message):
            build()
    with pytest.raises(nfi.errors.OptionError, match="dim must be a positive integer, got 3.0"):
        UniformSphere(3.0)
    with pytest.raises(
        nfi.errors.OptionError, match="must be invertible, got a matrix that is si"
    ):
        AngularCentralGaussian([[1.0, 2.0], [2.0, 4.0]])
    with pytest.raises(nfi.errors.OptionError, match="concentration must not be negative, got -1"):
        VonMisesFisher([1.0, 0.0], -1)
    with pytest.raises(nfi.errors.OptionError, match="loc must have a positive length, got zeros"):
        VonMisesFisher([0.0, 0.0], 1.0)


def test_parameters_that_are_not_finite():
    nan = float("nan")
    with pytest.raises(nfi.errors.NonFiniteError, match="scale has 1 of 4 values NaN"):
        AngularCentralGaussian([[1.0, nan], [0.0, 1.0]])
    with pytest.raises(nfi.errors.NonFiniteError, match="loc has 1 of 2 values NaN"):
        VonMisesFisher([1.0, nan], 1.0)
    with pytest.raises(nfi.errors.NonFiniteError, match="concentration has 1 of 1 values NaN or"):
        VonMisesFisher([1.0, 0.0], float("inf"))
    base = VonMisesFisher([1.0, 0.0], 1.0, trainable=True)
    base.concentration.data.fill_(nan)  # rejection would go on forever
    with pytest.raises(nfi.errors.NonFiniteError, match="lower the step size"):
        base.sample(2)

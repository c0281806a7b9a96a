"""Rotations: forms, the chart, couplings on the sphere, and whole models."""

from __future__ import annotations

import math

import pytest
import torch
from support.dense import dense_jacobian
from support.rotations import about, haar, haar_quadrature, special_rotations
from torch.autograd import gradcheck

import normflows_injective as nfi
from normflows_injective.errors import NonFiniteError, OffManifoldError, OptionError, ShapeError
from normflows_injective.flows import AsRotation, HopfChart, HopfCoupling, SphereLinear
from normflows_injective.flows.surfaces.quaternions import (
    conjugate,
    matrix_from_quaternion,
    multiply,
    nearest_quaternion,
    quaternion_from_matrix,
    symmetric_form,
)

LOG_PI_SQUARED = 2 * math.log(math.pi)


def perturbed(module, size=0.1):
    for parameter in module.parameters():
        parameter.data += size * torch.randn_like(parameter)
    return module


def model_of(size=0.1, **options):
    options = {"num_layers": 2, "width": 8, "num_blocks": 1, **options}
    return perturbed(nfi.flows.rotation_flow(**options).double(), size)


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# --- forms


def test_matrices_of_quaternions_turn_vectors():
    q, v = haar(20), torch.randn(20, 3, dtype=torch.float64)
    turned = multiply(multiply(q, torch.nn.functional.pad(v, (1, 0))), conjugate(q))
    close((matrix_from_quaternion(q) @ v[..., None])[..., 0], turned[:, 1:])
    r = matrix_from_quaternion(q)
    close(r @ r.mT, torch.eye(3).double().expand(20, 3, 3))
    close(torch.linalg.det(r), torch.ones(20).double())
    close(matrix_from_quaternion(multiply(q[:10], q[10:])), r[:10] @ r[10:])
    assert torch.equal(matrix_from_quaternion(-q), r)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quaternions_come_back_from_matrices(dtype):
    q = torch.cat([haar(200), special_rotations()]).to(dtype)
    back = quaternion_from_matrix(matrix_from_quaternion(q))
    assert (back[:, 0] >= 0).all()
    # Turns by pi have w = 0 and both signs.
    error = torch.minimum((back - q).abs().amax(1), (back + q).abs().amax(1))
    assert error.max() < 4 * torch.finfo(dtype).eps
    upper = torch.where(q[:, :1] < 0, -q, q)
    assert (AsRotation().decode(q) - upper).abs().max() < 4 * torch.finfo(dtype).eps


def test_the_quadratic_form_of_a_matrix():
    q, matrix = haar(20), torch.randn(3, 3, dtype=torch.float64)
    form = symmetric_form(matrix)
    close(((q @ form) * q).sum(1), (matrix_from_quaternion(q) * matrix).sum((1, 2)))
    close(form.trace(), torch.zeros(()).double())


def test_the_nearest_rotation_and_its_derivative():
    matrix = matrix_from_quaternion(haar(5)) + 0.2 * torch.randn(5, 3, 3, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix)
    flip = torch.linalg.det(u @ vh)
    u = u * torch.stack([torch.ones_like(flip), torch.ones_like(flip), flip], dim=1)[:, None]
    close(matrix_from_quaternion(nearest_quaternion(matrix)), u @ vh)
    matrix.requires_grad_()
    assert gradcheck(lambda m: matrix_from_quaternion(nearest_quaternion(m)), matrix)
    exact = matrix_from_quaternion(haar(3)).requires_grad_()  # whose other eigenvalues agree
    assert gradcheck(lambda m: matrix_from_quaternion(nearest_quaternion(m)), exact)


def test_what_is_no_rotation_is_refused_by_name_or_moved():
    r = matrix_from_quaternion(haar(4))
    bad = r.clone()
    bad[2] = -bad[2]  # a reflection
    bad[3] *= 1.001
    before = bad.clone()
    layer = AsRotation("matrix")
    message = r"x has 2 of 4 rows that are no rotation matrices, the worst at index \[2\]"
    for refuse in (layer.encode, nfi.distributions.UniformRotation("matrix").log_prob):
        with pytest.raises(OffManifoldError, match=message):
            refuse(bad)
    close(layer.decode(layer.encode(r + 1e-5)), r, 1e-4)
    projecting = AsRotation("matrix", "project")
    close(projecting.decode(projecting.encode(bad))[[0, 1, 3]], r[[0, 1, 3]])
    assert torch.equal(bad, before)
    bad[0, 0, 0] = math.nan
    for encode in (layer.encode, projecting.encode):
        with pytest.raises(NonFiniteError, match="x has 1 of 36 values NaN"):
            encode(bad)
    with pytest.raises(OffManifoldError, match="off the unit sphere"):
        AsRotation().encode(torch.full((1, 4), 0.6))
    close(AsRotation(off_manifold="project").encode(2 * r.new_ones(1, 4)), r.new_full((1, 4), 0.5))
    with pytest.raises(ShapeError, match=r"x must have shape \(B, 3, 3\)"):
        layer.encode(torch.eye(4)[None])
    with pytest.raises(OptionError, match="form must be one of quaternion, matrix, got 'euler'"):
        nfi.flows.rotation_flow(form="euler")


# --- the chart


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_antipodes_have_the_same_coordinates(dtype):
    chart = HopfChart()
    q = torch.cat([haar(200), special_rotations()]).to(dtype)
    z, log_det = chart.inverse(q)
    assert z.isfinite().all()
    assert log_det.isfinite().all()
    assert torch.equal(chart.inverse(-q)[1], log_det)
    # At the circles the one angle that is left is that of the quaternion, of either sign.
    assert torch.equal(chart.inverse(-q)[0][:200], z[:200])
    x = chart.decode(z)
    error = torch.minimum((x - q).abs().amax(1), (x + q).abs().amax(1))
    assert error.max() < 16 * torch.finfo(dtype).eps


def test_the_chart_covers_half_of_the_sphere_once():
    q, weights = haar_quadrature()
    assert float(weights.sum()) == pytest.approx(1, abs=1e-14)
    close(
        weights @ (q[:, :, None] * q[:, None, :]).flatten(1), torch.eye(4).double().flatten() / 4
    )
    # Student's t_2 law times two uniform angles is the uniform law.
    zeta = torch.tensor([[-3.0, 0.1, 0.2], [0.5, 0, 0]]).double()
    student = torch.distributions.StudentT(torch.tensor(2.0).double()).log_prob(zeta[:, 0])
    close(HopfChart()(zeta)[1] - LOG_PI_SQUARED, student - 2 * math.log(2 * math.pi))
    with pytest.raises(OffManifoldError, match=r"angles within \[-pi, pi\], and 4 came"):
        HopfChart()(torch.tensor([[0.0, 4.0, 0.0]]))


# --- couplings


def log_stretch(layer, q, context=None):
    """Log-factor of area of a map of the sphere at one point (4,), from its dense Jacobian."""

    def extended(u):
        return layer(u / u.norm(dim=1, keepdim=True), context)[0]

    image = layer(q[None], context)[0][0]
    bases = [torch.linalg.svd(p[None])[2][1:] for p in (q, image)]
    jacobian = dense_jacobian(extended, q[None])[0]
    return torch.linalg.slogdet(bases[1] @ jacobian @ bases[0].T).logabsdet


@pytest.mark.parametrize(("orders", "axis", "rows"), [(1, 0, True), (2, 1, False), (4, 2, True)])
def test_couplings_against_dense_jacobians(orders, axis, rows):
    layer = HopfCoupling(orders, width=8, context_dim=2, axis=axis, rows=rows)
    layer = perturbed(layer.double(), 0.25)
    q = torch.cat([haar(4), special_rotations()[::7]])
    context = torch.randn(len(q), 2, dtype=torch.float64)
    x, log_det = layer(q, context)
    expected = [log_stretch(layer, q[i], context[i : i + 1]) for i in range(len(q))]
    close(log_det, torch.stack(expected).detach(), 1e-10)
    back, opposite = layer.inverse(x, context)
    close(back, q, 1e-9)
    close(opposite, -log_det, 1e-10)
    ends = [matrix_from_quaternion(point) for point in (x, q)]
    close(*((end.mT if rows else end)[..., axis] for end in ends))
    assert log_det.detach().abs().max() > 0.1


def test_layers_commute_with_the_sign_to_the_last_bit():
    for dtype in (torch.float32, torch.float64):
        q = haar(50).to(dtype)
        for layer in (HopfCoupling(4, width=8, axis=1, rows=True), SphereLinear(4, True)):
            layer = perturbed(layer.to(dtype), 0.5)
            for method in (layer.forward, layer.inverse):
                (x, log_det), (y, other) = method(q), method(-q)
                assert torch.equal(x, -y)
                assert torch.equal(log_det, other)


def test_large_parameters_stay_finite():
    layer = HopfCoupling(3, width=8)
    with torch.no_grad():
        layer.net.output.bias.copy_(1e4 * torch.randn(len(layer.net.output.bias)))
    q = torch.cat([haar(100), special_rotations()]).float()
    for results in (layer(q), layer.inverse(q)):
        assert all(part.isfinite().all() for part in results)


# --- models


def test_a_fresh_model_is_uniform():
    x, log_q = nfi.flows.rotation_flow(num_layers=3).double().sample(40)
    assert (x[:, 0] >= 0).all()
    close(log_q, torch.zeros(40).double())


@pytest.mark.parametrize("form", ["quaternion", "matrix"])
def test_total_mass_is_one(form):
    model = model_of(0.05, form=form)
    # With so many nodes the steepest model of 25 seeds has an error of 2e-10.
    q, weights = haar_quadrature(40, 64)
    x = q if form == "quaternion" else matrix_from_quaternion(q)
    with torch.no_grad():
        log_q = model.log_prob(x)
    assert float(log_q.std()) > 0.1
    assert float(weights @ log_q.exp()) == pytest.approx(1, abs=1e-6)


def test_both_signs_and_both_forms_have_the_same_density():
    model = model_of(0.2)
    other = nfi.flows.rotation_flow(num_layers=2, width=8, num_blocks=1, form="matrix").double()
    other.load_state_dict(model.state_dict())
    x, log_q = model.sample(100)
    x, log_q = x.detach(), log_q.detach()
    log_prob = model.log_prob(x)
    close(log_prob, log_q, 1e-10)
    assert torch.equal(model.log_prob(-x), log_prob)
    close(other.log_prob(matrix_from_quaternion(x)), log_prob, 1e-10)
    close(model.project(-x), x, 1e-10)
    single = model_of(0.0, num_layers=2).float()
    single.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    torch.testing.assert_close(single.log_prob(x.float()).double(), log_prob, rtol=0, atol=2e-3)
    assert torch.equal(single.log_prob(-x.float()), single.log_prob(x.float()))


@pytest.mark.parametrize("axis", [[1, 0, 0], [0, 0, 1], [1, 2, -1]])
def test_no_seam_at_turns_by_pi(axis):
    """Values and slopes agree from both sides, where the quaternion with w >= 0 changes sign."""
    model = model_of(0.2)

    def value(angle):
        q = AsRotation().decode(about(axis, angle))
        return model.log_prob(q)

    sides = []
    for sign in (-1, 1):
        angle = torch.tensor([math.pi + sign * 1e-9], dtype=torch.float64, requires_grad=True)
        found = value(angle)
        sides.append((found.detach(), *torch.autograd.grad(found.sum(), angle)))
    close(sides[0][0], sides[1][0], 1e-7)
    close(sides[0][1], sides[1][1], 1e-6)
    assert sides[0][1].abs() > 1e-3


def test_no_pole_on_the_circles_of_the_chart():
    """Towards a point of either circle the density has one limit from all directions."""
    model = model_of(0.2)
    angles = torch.linspace(0, 2 * math.pi, 13).double()
    for centre in (about([1, 0, 0], 1.0), about([0, 1, 1], math.pi)):
        spreads = []
        for radius in (1e-3, 1e-6):
            ring = torch.stack([0 * angles, 0 * angles, angles.cos(), angles.sin()], dim=1)
            near = multiply(centre.expand(13, 4), ring)
            q = torch.nn.functional.normalize(centre + radius * near)
            values = model.log_prob(q).detach()
            spreads.append(float(values.max() - values.min()))
        assert 0 < spreads[1] < 2e-3 * spreads[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_rotations_have_finite_densities_and_gradients(dtype):
    model = model_of(0.2).to(dtype)
    q = special_rotations().to(dtype).requires_grad_()
    log_prob = model.log_prob(q)
    assert log_prob.isfinite().all()
    gradients = torch.autograd.grad(log_prob.sum(), [q, *model.flows.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    # The density changes by less than rounding allows next to them.
    beside = torch.nn.functional.normalize(q.detach() + 1e-7)
    assert (model.log_prob(beside) - log_prob).abs().max() < 1e-4


def test_a_context_bends_the_density():
    model = model_of(0.3, context_dim=2)
    q = haar(5)
    first, second = (model.log_prob(q, context=torch.full((5, 2), c).double()) for c in (0.0, 1.0))
    assert (first - second).abs().max() > 0.05


def test_a_target_of_another_measure_is_refused():
    sphere = nfi.distributions.UniformSphere(4)
    with pytest.raises(OffManifoldError, match="against the measure 'haar' and p against 'hausd"):
        nfi.flows.rotation_flow(num_layers=1, width=8, p=sphere).reverse_kld(4)


@pytest.mark.slow
def test_a_law_is_learned_from_samples_and_by_reverse_divergence():
    law = nfi.distributions.MatrixFisher(2.0 * matrix_from_quaternion(torch.full((4,), 0.5)))
    model = nfi.flows.rotation_flow(num_layers=2, width=16, num_blocks=1, p=law)
    x = law.sample(4000)

    def gap():
        with torch.no_grad():
            return float((law.log_prob(x) - model.log_prob(x)).mean())

    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    gaps = [gap()]
    for loss in (lambda: model.forward_kld(law.sample(128)), lambda: model.reverse_kld(128)):
        for _ in range(12):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        gaps.append(gap())
    assert gaps[0] > 1
    assert max(gaps[1:]) < 0.3 * gaps[0]

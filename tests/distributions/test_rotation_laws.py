"""Laws of rotations: normalisers, masses, samples, derivatives, refusals."""

from __future__ import annotations

import copy
import math

import mpmath
import numpy as np
import pytest
import scipy.special
import torch
from support.points import double
from support.rotations import about, haar, haar_quadrature, special_rotations

from normflows_injective.distributions import (
    IsotropicGaussianRotation,
    MatrixFisher,
    UniformRotation,
)
from normflows_injective.distributions.isotropic_rotation import (
    SWITCH,
    angle_function,
    log_heat_kernel,
)
from normflows_injective.distributions.matrix_fisher import log_normaliser
from normflows_injective.errors import NonFiniteError, OptionError, ShapeError
from normflows_injective.flows.surfaces.quaternions import (
    matrix_from_quaternion,
    multiply,
    symmetric_form,
)

CENTRE = double([0.5, -0.5, 0.1, 0.7])


def fisher(trainable=False, **options):
    return MatrixFisher(
        double([[3.0, 0.5, 0.0], [-1.0, 2.0, 0.3], [0.2, 0.1, -1.0]]), trainable, **options
    )


def bingham(**options):
    return MatrixFisher(torch.diag(double([1.0, -2.0, 3.0, 0.5])), **options)


def gaussian(scale=0.7, **options):
    return IsotropicGaussianRotation(double(scale), CENTRE, **options)


LAWS = {
    "uniform": lambda **options: UniformRotation(**options).double(),
    "fisher": fisher,
    "bingham": bingham,
    "gaussian": gaussian,
    "wide gaussian": lambda **options: gaussian(1.6, **options),
}

# --- densities


@pytest.mark.parametrize("name", LAWS)
def test_total_mass_is_one_in_both_forms_and_signs(name):
    q, weights = haar_quadrature(24, 40)
    log_p = LAWS[name]().log_prob(q)
    assert float(weights @ log_p.exp()) == pytest.approx(1, abs=1e-12)
    assert torch.equal(LAWS[name]().log_prob(-q), log_p)
    some = slice(0, None, 97)
    other = LAWS[name](form="matrix").log_prob(matrix_from_quaternion(q[some]))
    torch.testing.assert_close(other, log_p[some], rtol=0, atol=1e-11)


def dense_log_normaliser(values):
    """By Gauss-Legendre on cells graded to both ends, with the Bessel functions of scipy."""
    fourth, third, second, first = values
    cells = np.concatenate([[0.0], np.logspace(-16, np.log10(0.5), 500)])
    nodes, weights = np.polynomial.legendre.leggauss(20)
    total = 0.0
    sides = cells[:-1, None] + np.diff(cells)[:, None] * (nodes + 1) / 2
    shares = np.diff(cells)[:, None] * weights / 2
    for h, rest in ((sides, 1 - sides), (1 - sides, sides)):
        bessel = scipy.special.ive(0, rest * (first - second) / 2)
        bessel = bessel * scipy.special.ive(0, h * (third - fourth) / 2)
        total += (shares * np.exp(-h * (first - third)) * bessel).sum()
    return math.log(total)


@pytest.mark.parametrize(
    "values",
    [
        (0.0, 0.0, 0.0, 0.0),
        (-3.0, -1.0, 0.0, 2.0),
        (-1e6, -1e6, -1e6, 0.0),
        (-1e6, -1e3, -1.0, 0.0),
        (-1e6, -1e6, 0.0, 0.0),
        (-1e6, 0.0, 0.0, 0.0),
        (-1e4, -1e-3, -1e-3, 0.0),
        (-40.0, -30.0, -30.0, 0.0),
    ],
)
def test_the_normaliser_against_dense_quadrature(values):
    found = float(log_normaliser(double(values)))
    assert found == pytest.approx(dense_log_normaliser(values), abs=2e-12, rel=0)


@pytest.mark.parametrize("kappa", [1e-3, 1.0, 30.0, 1e4])
def test_the_normaliser_where_it_is_known(kappa):
    # F = kappa I: the integral of e^(kappa (1 + 2 cos w)) (1 - cos w) / pi over the angle.
    values = double([-kappa, -kappa, -kappa, 3 * kappa])
    scaled = scipy.special.ive(0, 2 * kappa) - scipy.special.ive(1, 2 * kappa)
    if kappa > 100:  # where the difference has lost its digits
        with mpmath.workdps(40):
            x = mpmath.mpf(2 * kappa)
            scaled = float(mpmath.exp(-x) * (mpmath.besseli(0, x) - mpmath.besseli(1, x)))
    assert float(log_normaliser(values)) == pytest.approx(math.log(scaled), abs=1e-12)
    # Two pairs of eigenvalues: an elementary integral.
    pairs = double([0.0, 0.0, kappa, kappa])
    expected = math.log(-math.expm1(-kappa) / kappa)
    assert float(log_normaliser(pairs)) == pytest.approx(expected, abs=1e-12)


def test_the_normaliser_by_another_pairing_of_eigenvalues():
    q, weights = haar_quadrature(64, 96)
    values = double([-4.0, -1.5, 0.3, 2.0])
    dense = ((q.square() @ values).exp() * weights).sum().log() - 2.0
    assert float(log_normaliser(values)) == pytest.approx(float(dense), abs=1e-13)


@pytest.mark.parametrize("time", [1e-3, 0.02, 0.4, 0.999, 1.0, 3.0])
def test_the_heat_kernel_against_many_terms(time):
    angles = [1e-9, 0.01, 0.3, 1.0, 2.0, 3.0, math.pi]
    found = log_heat_kernel(double(angles), double(time))
    with mpmath.workdps(60):
        for angle, value in zip(angles, found.tolist(), strict=True):
            terms = int(20 / math.sqrt(time)) + 20
            w = mpmath.mpf(angle)
            total = mpmath.fsum(
                (2 * n + 1)
                * mpmath.exp(-n * (n + 1) * mpmath.mpf(time))
                * mpmath.sin((n + 0.5) * w)
                for n in range(terms)
            )
            expected = float(mpmath.log(total / mpmath.sin(w / 2))) if total > 1e-40 else None
            if expected is not None:
                assert value == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_both_sums_of_the_heat_kernel_meet():
    angles = torch.linspace(1e-12, math.pi, 50).double()
    sides = [log_heat_kernel(angles, double(SWITCH + step)) for step in (-1e-13, 1e-13)]
    torch.testing.assert_close(*sides, rtol=0, atol=1e-11)


def test_a_narrow_gaussian_is_normal_in_the_tangent_space():
    law = IsotropicGaussianRotation(double(1e-3)).double()
    coordinates = 1e-3 * torch.randn(50, 3, dtype=torch.float64)
    q = torch.nn.functional.pad(coordinates / 2, (1, 0), value=1.0)
    q = torch.nn.functional.normalize(q)
    normal = torch.distributions.Normal(0, double(1e-3)).log_prob(coordinates).sum(1)
    # Haar measure is d^3 w / 8 pi^2 next to the identity.
    expected = normal + math.log(8 * math.pi**2)
    torch.testing.assert_close(law.log_prob(q), expected, rtol=0, atol=1e-4)


def test_fisher_and_bingham_are_one_family():
    q, law = haar(20), fisher()
    other = MatrixFisher(symmetric_form(law.matrix))
    torch.testing.assert_close(law.log_prob(q), other.log_prob(q), rtol=0, atol=1e-13)
    shifted = MatrixFisher(symmetric_form(law.matrix) + 5 * torch.eye(4))
    torch.testing.assert_close(law.log_prob(q), shifted.log_prob(q), rtol=0, atol=1e-12)
    uniform = MatrixFisher(torch.zeros(3, 3).double())
    torch.testing.assert_close(uniform.log_prob(q), torch.zeros(20).double(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", LAWS)
def test_no_seam_where_the_sign_changes(name):
    law = LAWS[name]()
    slopes = []
    for side in (-1, 1):
        angle = torch.tensor([math.pi + side * 1e-9], dtype=torch.float64, requires_grad=True)
        value = law.log_prob(multiply(CENTRE / CENTRE.norm(), about([1, 2, 0], angle)))
        slope = torch.autograd.grad(value.sum() + 0 * angle.sum(), angle)[0]
        slopes.append(torch.cat([value.detach(), slope]))
    # The angle from the centre of a Gaussian has its maximum there, a cusp of depth e^(-pi^2/2t).
    tolerance = 60.0 if "gaussian" in name else 1e-6
    torch.testing.assert_close(slopes[0][:1], slopes[1][:1], rtol=0, atol=1e-6)
    torch.testing.assert_close(slopes[0][1:], slopes[1][1:], rtol=0, atol=tolerance)


# --- samples


@pytest.mark.parametrize("name", ["fisher", "bingham"])
def test_moments_of_fisher_samples(name):
    """The mean of qq^T is the derivative of the log-normaliser, within four standard errors."""
    law = LAWS[name]()
    quadratic = law._lifted().requires_grad_()
    values = torch.linalg.eigvalsh(quadratic)
    (expected,) = torch.autograd.grad(values[-1] + log_normaliser(values), quadratic)
    q = law.sample(20000)
    outer = q[:, :, None] * q[:, None, :]
    assert ((outer.mean(0) - expected).abs() <= 4 * outer.std(0) / math.sqrt(20000)).all()
    assert (q[:, 0] >= 0).all()


@pytest.mark.parametrize("spread", [0.0, 1.0, 1e3, 1e6])
def test_sharp_and_flat_samples(spread):
    law = MatrixFisher(spread * torch.diag(double([0.0, -1.0, -0.3, -1e-3])))
    q, log_p = law(4000)
    torch.testing.assert_close(law.log_prob(q), log_p, rtol=0, atol=1e-7 * (1 + spread))
    uniform = torch.linspace(0, 1, 4001).double()[1:]
    if spread == 1e6:  # nearly normal in the second axis, with variance 1 / 2 spread
        scaled = (q[:, 1] * math.sqrt(2 * spread) / q[:, 0].abs().clamp_min(1e-3)).sort().values
        function = torch.special.ndtr(scaled)
        assert (function - uniform).abs().max() < 2.2 / math.sqrt(4000)


@pytest.mark.parametrize("scale", [0.01, 0.3, 0.9, 2.0])
def test_moments_of_gaussian_samples(scale):
    """The mean rotation is e^(-eps^2) times the centre: that of the first character."""
    law = gaussian(scale)
    r = matrix_from_quaternion(law.sample(20000))
    expected = math.exp(-(scale**2)) * matrix_from_quaternion(law.loc)
    error = 4 * r.std(0) / math.sqrt(20000)
    assert ((r.mean(0) - expected).abs() <= error + 1e-12).all()


@pytest.mark.parametrize("time", [1e-4, 0.1, 1.0, 5.0])
def test_the_distribution_function_of_the_angle(time):
    """Straight lines between the knots are within 1e-6 of the integral of the density."""
    angles, function = angle_function(double(time))
    step = (angles[1] - angles[0]) / 8
    fine = angles[0] + step * torch.arange(8 * (len(angles) - 1) + 1)
    middle = (fine[1:] + fine[:-1]) / 2
    density = log_heat_kernel(middle, double(time)).exp() * (1 - middle.cos()) / math.pi
    exact = torch.nn.functional.pad((density * step).cumsum(0), (1, 0))
    assert float(exact[-1]) == pytest.approx(1, abs=1e-6)
    straight = torch.from_numpy(np.interp(fine.numpy(), angles.numpy(), function.numpy()))
    assert (exact - straight).abs().max() < 1e-6


@pytest.mark.parametrize("name", LAWS)
def test_samples_of_both_forms(name):
    for form, shape in (("quaternion", (6, 4)), ("matrix", (6, 3, 3))):
        law = LAWS[name](form=form).float()
        x, log_p = law(6)
        assert x.shape == shape
        assert x.dtype == log_p.dtype == torch.float32
        torch.testing.assert_close(law.log_prob(x), log_p, rtol=1e-4, atol=1e-4)
        precise = copy.deepcopy(law).double()
        torch.testing.assert_close(
            law.log_prob(x).double(), precise.log_prob(x.double()), rtol=2e-7, atol=1e-7
        )


def test_parameters_are_learned():
    """At the maximum of the likelihood the mean vectors and characters agree."""
    x = gaussian(0.5).sample(1000)
    r = matrix_from_quaternion(x).mean(0)
    law = MatrixFisher(torch.zeros(3, 3).double(), trainable=True)
    other = IsotropicGaussianRotation(double(1.0), trainable=True)
    for model in (law, other):
        optimizer = torch.optim.LBFGS(
            model.parameters(), max_iter=30, line_search_fn="strong_wolfe"
        )

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = -model.log_prob(x).mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    values = torch.linalg.eigvalsh(symmetric_form(law.matrix))
    (mean,) = torch.autograd.grad(values[-1] + log_normaliser(values), law.matrix)
    torch.testing.assert_close(mean, r, rtol=0, atol=1e-4)
    assert abs(other.scale.item()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("name", LAWS)
def test_special_rotations(name):
    q = special_rotations().requires_grad_()
    log_p = LAWS[name]().log_prob(q)
    assert log_p.isfinite().all()
    (gradient,) = torch.autograd.grad(log_p.sum() + 0 * q.sum(), q)
    assert gradient.isfinite().all()


# --- refusals


def test_wrong_arguments():
    with pytest.raises(
        ShapeError, match=r"matrix must have shape \(3, 3\), as F of .*, got \(2, 2"
    ):
        MatrixFisher(torch.eye(2))
    with pytest.raises(OptionError, match=r"must be symmetric, .* differs .* by up to 1"):
        MatrixFisher(torch.eye(4) + torch.eye(4).roll(1, 1).triu())
    with pytest.raises(NonFiniteError, match="matrix has 1 of 9 values NaN"):
        MatrixFisher([[math.nan, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    with pytest.raises(OptionError, match="scale must be positive, got 0"):
        IsotropicGaussianRotation(0.0)
    with pytest.raises(ShapeError, match=r"loc must be a quaternion of shape \(4,\), got \(3,\)"):
        IsotropicGaussianRotation(1.0, [1.0, 0.0, 0.0])
    with pytest.raises(OptionError, match="loc must have a positive length, got zeros"):
        IsotropicGaussianRotation(1.0, torch.zeros(4))
    with pytest.raises(OptionError, match="off_manifold must be one of reject, project"):
        UniformRotation(off_manifold="near")
    for law in (fisher(trainable=True), gaussian(trainable=True)):
        with torch.no_grad():
            next(law.parameters()).fill_(math.nan)
        with pytest.raises(NonFiniteError, match="lower the step size"):
            law.sample(2)

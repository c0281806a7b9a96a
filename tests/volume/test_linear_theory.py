"""Oracle 11: what linear free-form injective flows converge to, and what is stable.

For f = W x, g = A z the fields of descent of arXiv 2306.01843 and of maximum likelihood are
polynomials; l_i is the eigenvalue of the kept direction, l_j that of the dropped one.
"""

import math

import normflows as nf
import pytest
import torch
from support.geometry import seeded
from support.gradients import gradients
from torch import Tensor, nn

import normflows_injective as nfi
from normflows_injective.volume import jacobian, log_volume
from normflows_injective.volume.log_volumes import matrix_log_volume


def points(*eigenvalues: float) -> Tensor:
    """2 D points whose second moments are exactly diag(eigenvalues)."""
    d = len(eigenvalues)
    roots = (d * torch.tensor(eigenvalues, dtype=torch.float64)).sqrt().diag()
    return torch.cat([roots, -roots])


def train(model: nfi.InjectiveNormalizingFlow, x: Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, betas=(0.9, 0.9))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        model.forward_kld(x).backward()
        optimizer.step()


def linear_model(estimator: str, beta: float, w: list[float], a: list[float]):
    """Model with f(x) = W x, g(z) = A z from the given start, d = 1."""
    encoder = nn.Linear(len(w), 1, bias=False).double()
    decoder = nn.Linear(1, len(a), bias=False).double()
    with torch.no_grad():
        encoder.weight.copy_(torch.tensor([w]))
        decoder.weight.copy_(torch.tensor([a]).T)
    base = nf.distributions.DiagGaussian(1, trainable=False).double()
    return nfi.InjectiveNormalizingFlow(
        base,
        [nfi.flows.FreeFormInjection(encoder, decoder)],
        nfi.SurrogateLikelihood(beta=beta, estimator=estimator),
    )


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["encoder", "on_manifold"])
@pytest.mark.parametrize(("w", "a"), [([1.0, 0.05], [1.0, 0.05]), ([-0.5, -0.4], [0.3, -0.8])])
def test_oracle_11_training_recovers_the_principal_direction(estimator, w, a):
    """diag(1, 4), beta = 10: |W| = (0, 1/2) and |A| = (0, 2) from near the wrong axis as well."""
    model = linear_model(estimator, 10.0, w, a)
    train(model, points(1.0, 4.0), 600)
    weight, embedding = (p.detach().flatten().abs() for p in model.parameters())
    expected = torch.tensor([0.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-2)
    torch.testing.assert_close(embedding, 4 * expected, rtol=0, atol=1e-2)


@seeded(110)
def test_oracle_11_on_manifold_changes_nothing_for_affine_encoders():
    """An affine encoder has the same Jacobian everywhere: both losses have one gradient."""
    x = points(1.0, 4.0)
    both = []
    for estimator in ("encoder", "on_manifold"):
        model = linear_model(estimator, 3.0, [0.7, 0.2], [0.4, 1.1])
        both.append(gradients(model.forward_kld(x), list(model.parameters())))
    torch.testing.assert_close(both[0], both[1])


class Objective:
    """A field of descent on (w_i, w_j, a_i, a_j) for data of covariance diag(kept, dropped)."""

    def __init__(self, name: str, beta: float, kept: float, dropped: float):
        self.name, self.beta, self.x = name, beta, points(kept, dropped)

    def __call__(self, theta: Tensor) -> Tensor:
        w, a = (part.clone().requires_grad_() for part in theta.split(2))

        def encode(x: Tensor) -> Tensor:
            return x @ w.unsqueeze(1)

        def decode(z: Tensor) -> Tensor:
            return z @ a.unsqueeze(0)

        name = self.name if self.name in ("encoder", "conjugate_gradient") else "encoder"
        likelihood = nfi.SurrogateLikelihood(beta=self.beta, estimator=name)
        terms = likelihood(self.x, encode, decode)
        if self.name == "exact encoder":
            terms = terms._replace(volume=-matrix_log_volume(jacobian(encode, self.x)[1].mT))
        if self.name == "exact decoder":
            terms = terms._replace(volume=log_volume(decode, terms.z))
        loss = likelihood.loss(terms, -0.5 * terms.z.square().sum(1)).mean()
        return torch.cat(gradients(loss, [w, a])).detach()

    def stability(self, theta: Tensor) -> Tensor:
        """Jacobian of the field by central differences.

        Stop-gradients hide part of the field's own dependence on the parameters from autodiff.
        """
        step = 1e-5
        basis = step * torch.eye(4, dtype=torch.float64)
        return torch.stack([(self(theta + e) - self(theta - e)) / (2 * step) for e in basis], 1)


def principal(kept: float) -> Tensor:
    """W = (1/sqrt(kept), 0), A = (sqrt(kept), 0)."""
    return torch.tensor([kept**-0.5, 0, kept**0.5, 0], dtype=torch.float64)


SPECTRA = [(1.0, 0.01), (4.0, 1.0), (1.0, 4.0), (2.0, 1.5)]


@pytest.mark.parametrize(("kept", "dropped"), SPECTRA)
@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_oracle_11_free_form_stability(kept, dropped, beta):
    """det = 4 beta^2 l_j (l_i - l_j) and trace > 0: the larger eigenvalue wins for any beta."""
    field = Objective("encoder", beta, kept, dropped)
    theta = principal(kept)
    torch.testing.assert_close(field(theta), torch.zeros(4).double(), rtol=0, atol=1e-12)
    matrix = field.stability(theta)
    normal = matrix[1::2, 1::2]
    expected = 4 * beta**2 * dropped * (kept - dropped)
    assert float(torch.det(normal)) == pytest.approx(expected, rel=1e-6, abs=1e-8)
    assert normal.trace() > 0
    stable = bool((torch.linalg.eigvals(matrix).real > 0).all())
    assert stable == (kept > dropped)


@pytest.mark.parametrize(("kept", "dropped"), SPECTRA)
@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_oracle_11_exact_encoder_stability(kept, dropped, beta):
    """With the exact -1/2 log det f'f'' instead, det = 2 beta (l_i - l_j)(2 beta l_j - 1)."""
    field = Objective("exact encoder", beta, kept, dropped)
    theta = principal(kept)
    torch.testing.assert_close(field(theta), torch.zeros(4).double(), rtol=0, atol=1e-12)
    normal = field.stability(theta)[1::2, 1::2]
    expected = 2 * beta * (kept - dropped) * (2 * beta * dropped - 1)
    assert float(torch.det(normal)) == pytest.approx(expected, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize(("beta", "smallest"), [(49.0, -0.020), (51.0, 0.020)])
def test_oracle_11_exact_encoder_threshold(beta, smallest):
    """It needs beta > 1 / (2 l_j), here 50; the smallest eigenvalue changes sign there."""
    matrix = Objective("exact encoder", beta, 1.0, 0.01).stability(principal(1.0))
    found = float(torch.linalg.eigvals(matrix).real.min())
    assert found == pytest.approx(smallest, abs=5e-4)


NAIVE = ["conjugate_gradient", "exact decoder"]


def shrunken(kept: float, share: float) -> Tensor:
    """W as the principal solution, A shrunken to W A = share."""
    return principal(kept) * torch.tensor([1, 1, share, share], dtype=torch.float64)


@pytest.mark.parametrize(("beta", "kept"), [(10.0, 1.0), (3.0, 4.0), (2.5, 1.0)])
@pytest.mark.parametrize("name", NAIVE)
def test_oracle_11_naive_shrinkage(name, beta, kept):
    """With the exact log det g''g' the fixed points have W A = (1 +- sqrt(1 - 2/(beta l))) / 2."""
    field = Objective(name, beta, kept, 0.1)
    root = math.sqrt(1 - 2 / (beta * kept))
    for share, stable in (((1 + root) / 2, True), ((1 - root) / 2, False)):
        theta = shrunken(kept, share)
        torch.testing.assert_close(field(theta), torch.zeros(4).double(), rtol=0, atol=1e-9)
        eigenvalues = torch.linalg.eigvals(field.stability(theta)).real
        assert bool((eigenvalues > 0).all()) == stable
    assert field(principal(kept)).abs().max() > 0.01


def pull_on_decoder(name: str, beta: float) -> list[float]:
    """dL/da for unit variance, at the w that is best for every a of a grid."""
    field = Objective(name, beta, 1.0, 0.1)
    pulls = []
    for k in range(1, 60):
        a = k / 40
        w = 2 * beta * a / (2 * beta * a**2 + 1)
        theta = torch.tensor([w, 0, a, 0], dtype=torch.float64)
        gradient = field(theta)
        assert abs(float(gradient[0])) < 1e-12
        pulls.append(float(gradient[2]))
    return pulls


@pytest.mark.slow
@pytest.mark.parametrize("name", NAIVE)
def test_oracle_11_naive_collapse(name):
    """Without beta l > 2 descent shrinks the decoder from everywhere, towards -infinity."""
    assert min(pull_on_decoder(name, 1.9)) > 0
    assert min(pull_on_decoder(name, 2.2)) < 0


@pytest.mark.slow
def test_oracle_11_naive_training():
    """beta = 10 trains to s = 0.9472; beta = 1 collapses, where the free-form loss gives 1."""
    x = points(1.0, 0.01)
    shares, lengths = [], []
    for estimator, beta, steps in [
        ("conjugate_gradient", 10.0, 400),
        ("conjugate_gradient", 1.0, 200),
        ("encoder", 1.0, 400),
    ]:
        model = linear_model(estimator, beta, [0.9, 0.1], [0.9, 0.1])
        train(model, x, steps)
        w, a = (p.detach().flatten() for p in model.parameters())
        shares.append(float(w @ a))
        lengths.append(float(a.norm()))
    assert shares[0] == pytest.approx(0.9472, abs=1e-3)
    assert lengths[1] < 0.1
    assert (shares[2], lengths[2]) == pytest.approx((1, 1), abs=1e-2)

"""Alignment of encoders with tangent spaces, on pairs whose angles are known."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.linalg import subspace_angles
from support.comparison import close
from support.dense import dense_jacobian
from support.models import base, mlp_injection, model, perturbed
from torch import nn

import normflows_injective as nfi
from normflows_injective.diagnostics import alignment, injectivity_report
from normflows_injective.errors import ContextError, NonFiniteError, NotInjectiveError, ShapeError


def linear_pair(encoder, decoder):
    """Networks with the given matrices."""
    pair = nn.Linear(5, 2, bias=False).double(), nn.Linear(2, 5, bias=False).double()
    with torch.no_grad():
        pair[0].weight.copy_(encoder)
        pair[1].weight.copy_(decoder)
    return pair


def frame():
    """An orthonormal basis of R^5 as columns."""
    return torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q


def test_a_pseudo_inverse_is_aligned():
    decoder = torch.randn(5, 2, dtype=torch.float64)
    found = alignment(
        *linear_pair(torch.linalg.pinv(decoder), decoder), torch.randn(4, 5).double()
    )
    close(found.principal_angles, 0.0, 1e-12)
    close(found.left_inverse_error, 0.0, 1e-12)
    close(found.pseudo_inverse_error, 0.0, 1e-12)
    close(found.gradient_cosine, 1.0, 1e-12)


@pytest.mark.parametrize("angles", [(0.0, 1e-9), (1e-5, 0.3), (0.7, math.pi / 2 - 1e-6)])
def test_a_rotated_encoder_has_the_angles_of_the_rotation(angles):
    columns, angles = frame(), torch.tensor(angles, dtype=torch.float64)
    tangents, normals = columns[:, :2], columns[:, 2:4]
    turned = tangents * angles.cos() + normals * angles.sin()
    x = torch.randn(3, 5, dtype=torch.float64)
    found = alignment(*linear_pair(turned.T, tangents), x)
    close(found.principal_angles, angles.expand(3, 2), 1e-9, absolute=1e-13)
    # f'g' = diag(cos), and the pseudo-inverse of orthonormal rows is their transpose.
    left = (1 - angles.cos()).square().sum().div(2).sqrt()
    close(found.left_inverse_error, left, 1e-9)
    close(found.gradient_cosine, angles.cos().mean(), 1e-9)
    close(found.pseudo_inverse_error, (1 - angles.cos().mean()).mul(2).sqrt(), 1e-6, absolute=1e-8)


def test_a_slanted_left_inverse_is_one_but_is_not_aligned():
    columns = frame()
    tangents, normals = columns[:, :2], columns[:, 2:4]
    slopes = torch.tensor([0.5, 2.0], dtype=torch.float64)
    encoder = (tangents + normals * slopes).T
    found = alignment(*linear_pair(encoder, tangents), torch.randn(3, 5).double())
    close(found.left_inverse_error, 0.0, 1e-12)
    close(found.principal_angles, slopes.atan().expand(3, 2), 1e-9)
    # Rows of length sqrt(1 + s^2) along b have the pseudo-inverse b / sqrt(1 + s^2).
    inner, squares = (1 / (1 + slopes**2)).sum(), (1 / (1 + slopes**2)).sum()
    close(found.gradient_cosine, inner / (2 * squares).sqrt(), 1e-9)


def test_bent_pairs_against_dense_jacobians():
    injection = perturbed(mlp_injection()).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    found = alignment(injection.encoder, injection.decoder, x)
    z = injection.encode(x).detach()
    decoder = dense_jacobian(injection.decode, z)
    encoder = dense_jacobian(injection.encode, injection.decode(z).detach())
    for row, angles in enumerate(found.principal_angles):
        spaces = decoder[row].detach().numpy(), encoder[row].detach().T.numpy()
        expected = subspace_angles(*spaces)[::-1].copy()
        close(angles, expected, 1e-8)
    pseudo_inverse = torch.linalg.pinv(encoder)
    cosine = (decoder * pseudo_inverse).sum((1, 2)) / (
        torch.linalg.matrix_norm(decoder) * torch.linalg.matrix_norm(pseudo_inverse)
    )
    close(found.gradient_cosine, cosine, 1e-8)


def test_the_cosine_is_that_of_the_two_gradients_by_the_encoder_jacobian():
    injection = perturbed(mlp_injection()).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    found = alignment(injection.encoder, injection.decoder, x)
    z = injection.encode(x).detach()
    decoder = dense_jacobian(injection.decode, z)
    encoder = dense_jacobian(injection.encode, injection.decode(z).detach())
    encoder = encoder.detach().requires_grad_()
    surrogate = -(encoder * decoder.mT).sum()
    exact = -torch.linalg.slogdet(encoder @ encoder.mT).logabsdet.sum() / 2
    gradients = [torch.autograd.grad(value, encoder)[0].flatten(1) for value in (surrogate, exact)]
    close(found.gradient_cosine, torch.cosine_similarity(*gradients), 1e-8)


def test_the_report_has_the_same_errors():
    ours = model().double().eval()
    x = torch.randn(8, 5, dtype=torch.float64)
    report = injectivity_report(ours, x)
    for pair in ((ours.encode, ours.decode), (ours.flows[0].encoder, ours.flows[0].decoder)):
        found = alignment(*pair, x)
        close(found.left_inverse_error, report.left_inverse_error, 1e-12)
        close(found.pseudo_inverse_error, report.pseudo_inverse_error, 1e-12)


def test_a_rank_deficient_pair_has_no_angles():
    decoder = torch.randn(5, 1).double().expand(5, 2)
    found = alignment(*linear_pair(torch.randn(2, 5), decoder), torch.randn(3, 5).double())
    assert found.principal_angles.isnan().all()


def test_contexts_images_and_modes():
    injection = perturbed(mlp_injection(context_dim=3))
    x, context = torch.randn(4, 5), torch.randn(4, 3)
    found = alignment(injection.encoder, injection.decoder, x, context)
    other = alignment(injection.encoder, injection.decoder, x, -context)
    assert not torch.allclose(found.principal_angles, other.principal_angles)
    with pytest.raises(ContextError):
        alignment(injection.encoder, injection.decoder, x)
    with pytest.raises(ContextError, match="would ignore it"):
        alignment(*linear_pair(torch.randn(2, 5), torch.randn(5, 2)), x.double(), context)
    pair = nfi.nets.conv_autoencoder((1, 6, 6), 3, (8,))
    images = torch.rand(2, 1, 6, 6)
    encoder = nn.Sequential(nn.Dropout(), pair[0])
    with torch.inference_mode():
        found = alignment(encoder, pair[1], images + 0)
    assert found.principal_angles.shape == (2, 3)
    assert encoder.training
    expected = alignment(pair[0], pair[1], images)
    close(found.principal_angles, expected.principal_angles, 1e-5)


def test_what_is_no_pair_is_refused():
    x = torch.randn(3, 5)
    with pytest.raises(NotInjectiveError, match="takes 7 dimensions to 5"):
        alignment(nn.Linear(5, 7), nn.Linear(7, 5), x)
    with pytest.raises(ShapeError, match=r"back to data of shape \(3, 5\), got \(3, 6\)"):
        alignment(nn.Linear(5, 2), nn.Linear(2, 6), x)
    x[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="x has 1 of 15"):
        alignment(nn.Linear(5, 2), nn.Linear(2, 5), x)


@pytest.mark.slow
def test_an_autoencoder_of_ones_own_is_scored():
    """The example of docs/training.md in short: networks trained by somebody, by squared error."""
    z = torch.randn(600, 2)
    x = torch.cat([z, z.sin(), z.prod(1, keepdim=True) / 3], 1) + 0.02 * torch.randn(600, 5)
    encoder = nn.Sequential(nn.Linear(5, 32), nn.SiLU(), nn.Linear(32, 2))
    decoder = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 5))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=0.01)
    for _ in range(300):
        loss = (decoder(encoder(x[:400])) - x[:400]).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = alignment(encoder, decoder, x[:50])
    assert found.left_inverse_error.median() < 0.5
    codes = encoder(x[:400]).detach()
    q0 = base(2)
    q0.loc.copy_(codes.mean(0))
    q0.log_scale.copy_(codes.std(0).log())
    ours = nfi.InjectiveNormalizingFlow(q0, [nfi.flows.FreeFormInjection(encoder, decoder)])
    shifted = x[400:500] + torch.tensor([0.0, 0.0, 2.0, 0.0, 0.0])
    odd = nfi.score(ours, shifted, x[500:])
    usual = nfi.score(ours, x[400:500], x[500:])
    assert odd.p_value.median() < 0.05 < usual.p_value.median()
    assert odd.tube_score.median() < usual.tube_score.median()

"""Surrogates against dense Jacobians: oracles 1, 2, 3, 9, 10 and 18.

The formulas are those of free-form injective flows, arXiv 2306.01843.
"""

import math

import pytest
import torch
from support.dense import dense_jacobian
from support.dense_surrogate import EXACT, dense_surrogate
from support.geometry import TIED_PAIRS, Warp, circle, seeded, tanh_pair, warped
from support.gradients import assert_gradients_close, gradients
from torch import Tensor

import normflows_injective as nfi
from normflows_injective.volume import draw_probes
from normflows_injective.volume.estimators import ESTIMATORS, EncoderSurrogate

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


@pytest.mark.parametrize("num_probes", [1, 3])
@pytest.mark.parametrize("name", ESTIMATORS)
@seeded(1)
def test_oracle_01_value_and_gradients_by_dense_jacobians(name, num_probes, device, dtype):
    """Value and gradient for every parameter are those of the formula with the same probes."""
    encoder, decoder = tanh_pair(5, 3, device, dtype)
    # So that f'g' lies on both sides of one, by which the conditional estimators switch.
    decoder[-1].weight.data.mul_(6)
    x = 2 * torch.randn(40, 5, dtype=torch.float64).to(device, dtype)
    probes = 0.8 * torch.randn(num_probes, 40, 3, dtype=torch.float64).to(device, dtype)
    weights = torch.linspace(0.5, 2, 40, dtype=dtype, device=device)
    terms = EXACT[name](x, encoder, decoder, lambda z: probes)
    expected = dense_surrogate(name, x, encoder, decoder, probes)

    if name.startswith("conditional"):  # Both sides of the switch occur.
        for pure in ("encoder", "decoder"):
            one_sided = dense_surrogate(pure, x, encoder, decoder, probes)
            assert not torch.allclose(one_sided, expected)

    torch.testing.assert_close(terms.z, encoder(x))
    torch.testing.assert_close(terms.reconstruction, decoder(encoder(x)))
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(terms.volume, expected, rtol=tolerance, atol=tolerance)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    # Unequal weights tell the gradients of the samples apart.
    actual = gradients((terms.volume * weights).sum(), parameters)
    assert_gradients_close(actual, gradients((expected * weights).sum(), parameters), tolerance)


@pytest.mark.parametrize("name", ESTIMATORS)
@seeded(2)
def test_oracle_01_event_shapes(name, device):
    """The products contract whole events, whatever their shape: here (2, 3) and (2, 1)."""
    encoder, decoder = tanh_pair(6, 2, device, torch.float64)
    x = torch.randn(8, 2, 3, dtype=torch.float64).to(device)
    probes = torch.randn(2, 8, 2, 1, dtype=torch.float64).to(device)

    def encode(x: Tensor) -> Tensor:
        return encoder(x.flatten(1)).unflatten(1, (2, 1))

    def decode(z: Tensor) -> Tensor:
        return decoder(z.flatten(1)).unflatten(1, (2, 3))

    volume = EXACT[name](x, encode, decode, lambda z: probes).volume
    expected = dense_surrogate(name, x, encode, decode, probes)
    torch.testing.assert_close(volume, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("latent_dim", [1, 3])
@pytest.mark.parametrize("name", ["encoder", "on_manifold", "decoder"])
@seeded(3)
def test_oracle_02_as_many_probes_as_dimensions(name, latent_dim, device):
    """With K = d orthonormal probes the surrogate is the trace of f'g', without randomness."""
    encoder, decoder = tanh_pair(5, latent_dim, device, torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64).to(device)
    likelihood = nfi.SurrogateLikelihood(num_probes=latent_dim, estimator=name)
    volume = likelihood(x, encoder, decoder).volume

    z = encoder(x)
    f = dense_jacobian(encoder, decoder(z) if name == "on_manifold" else x)
    g = dense_jacobian(decoder, z)
    f, g = (f.detach(), g) if name == "decoder" else (f, g.detach())
    sign = 1 if name == "decoder" else -1
    expected = sign * torch.einsum("bij,bji->b", f, g)
    torch.testing.assert_close(volume, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(likelihood(x, encoder, decoder).volume, volume)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    assert_gradients_close(
        gradients(volume.mean(), parameters), gradients(expected.mean(), parameters), 1e-10
    )


@pytest.mark.parametrize("probes", ["orthonormal", "sphere", "rademacher"])
@seeded(4)
def test_oracle_02_one_dimension_is_exact_with_any_probe(probes, device):
    """At d = 1 a probe of unit norm is plus or minus one, so a single one is exact."""
    encoder, decoder = tanh_pair(4, 1, device, torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64).to(device)
    volume = nfi.SurrogateLikelihood(probes=probes)(x, encoder, decoder).volume
    trace = dense_jacobian(encoder, x) @ dense_jacobian(decoder, encoder(x))
    torch.testing.assert_close(volume, -trace[:, 0, 0], rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("manifold", TIED_PAIRS)
@seeded(5)
def test_oracle_03_consistent_pair(manifold):
    """On the manifold f'g' = I, so every probe gives its squared norm, whatever the volume."""
    pair = warped(TIED_PAIRS[manifold](), Warp())
    x = pair.decode(pair.sample(7)).detach()
    for kind in ("orthonormal", "sphere", "rademacher"):
        for num_probes in (1, 2):
            volume = nfi.SurrogateLikelihood(num_probes=num_probes, probes=kind)(
                x, pair.encode, pair.decode
            ).volume
            torch.testing.assert_close(volume, torch.full_like(volume, -2.0))
    gaussian = draw_probes("gaussian", 2, torch.zeros(7, 2, dtype=torch.float64))
    volume = EncoderSurrogate()(x, pair.encode, pair.decode, lambda z: gaussian).volume
    torch.testing.assert_close(volume, -gaussian.square().sum(2).mean(0))
    off_manifold = EncoderSurrogate()(1.5 * x, pair.encode, pair.decode, lambda z: gaussian).volume
    assert ((off_manifold - volume).abs() > 0.01).all()


@seeded(6)
def test_oracle_03_affine_pair_at_any_point():
    """An affine encoder has one Jacobian, so the value is -d off the manifold as well."""
    injection = nfi.flows.LinearInjection(3, 6).double()
    x = 5 * torch.randn(4, 6, dtype=torch.float64)
    volume = nfi.SurrogateLikelihood()(x, injection.encode, injection.decode).volume
    torch.testing.assert_close(volume, torch.full_like(volume, -3.0))


@pytest.mark.parametrize("distance", [0.3, 1.0, 2.5])
@seeded(7)
def test_oracle_09_off_manifold_switch(distance):
    """Circle of radius r, data at distance rho: r/rho with f' at the data, 1 at the projection."""
    radius = 0.7
    pair = circle(radius)
    x = distance * circle(1.0).decode(pair.sample(6))
    at_data = nfi.SurrogateLikelihood()(x, pair.encode, pair.decode).volume
    torch.testing.assert_close(at_data, torch.full_like(at_data, -radius / distance))
    on_manifold = nfi.SurrogateLikelihood(estimator="on_manifold")
    at_projection = on_manifold(x, pair.encode, pair.decode).volume
    torch.testing.assert_close(at_projection, torch.full_like(at_projection, -1.0))


def radius_gradient(estimator: str, beta: float, radius: float, x: Tensor) -> float:
    """Derivative of the training loss of a circle by its radius, for a uniform latent density."""
    r = torch.tensor(radius, dtype=torch.float64, requires_grad=True)
    pair = circle(r)
    likelihood = nfi.SurrogateLikelihood(beta=beta, estimator=estimator)
    terms = likelihood(x, pair.encode, pair.decode)
    log_prob = torch.full((len(x),), -math.log(2 * math.pi), dtype=torch.float64)
    return float(torch.autograd.grad(likelihood.loss(terms, log_prob).mean(), r)[0])


@pytest.mark.parametrize("estimator", ["encoder", "on_manifold", "conjugate_gradient"])
@pytest.mark.parametrize("radius", [0.05, 0.6, 1.0, 2.0])
@seeded(8)
def test_oracle_10_collapsing_circle(estimator, radius):
    """d/dr is -2 beta (m - r), plus the collapsing 1/r if the Jacobian is on the manifold."""
    x = torch.randn(50, 2, dtype=torch.float64)
    mean = float(x.norm(dim=1).mean())
    expected = -2 * 3.0 * (mean - radius)
    if estimator != "encoder":
        expected += 1 / radius
    assert radius_gradient(estimator, 3.0, radius, x) == pytest.approx(expected, rel=1e-10)


@pytest.mark.slow
@seeded(9)
def test_oracle_10_which_radii_attract():
    """Free-form loss: r = m. Naive loss: no minimum but r = 0 unless beta exceeds 2 / m^2."""
    x = torch.randn(50, 2, dtype=torch.float64)
    mean = float(x.norm(dim=1).mean())
    assert radius_gradient("encoder", 1.0, mean, x) == pytest.approx(0, abs=1e-12)
    grid = [mean * k / 40 for k in range(1, 60)]
    threshold = 2 / mean**2
    below = [radius_gradient("on_manifold", 0.95 * threshold, r, x) for r in grid]
    above = [radius_gradient("on_manifold", 1.05 * threshold, r, x) for r in grid]
    assert min(below) > 0  # Descent shrinks the circle from everywhere.
    assert above[0] > 0 > min(above)  # It still does near zero, behind a barrier.


@seeded(10)
def test_oracle_18_gradient_routing():
    """Alone, the encoder form gives the decoder no gradient; reconstruction does."""
    encoder, decoder = tanh_pair(4, 2, torch.device("cpu"), torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64)
    likelihood = nfi.SurrogateLikelihood(beta=0.0)
    terms = likelihood(x, encoder, decoder)
    loss = likelihood.loss(terms, torch.zeros(5, dtype=torch.float64)).sum()
    assert all(bool((g == 0).all()) for g in gradients(loss, list(decoder.parameters())))
    weights = [p for p in encoder.parameters() if p.dim() == 2]
    assert all(bool((g != 0).any()) for g in gradients(loss, weights))
    likelihood.beta = 1.0
    loss = likelihood.loss(terms, torch.zeros(5, dtype=torch.float64)).sum()
    assert all(bool((g != 0).any()) for g in gradients(loss, list(decoder.parameters())))


@pytest.mark.parametrize("name", ["decoder", "conjugate_gradient"])
@seeded(11)
def test_oracle_18_decoder_side_estimators_reach_the_encoder_through_the_latent(name):
    """Their Jacobian sits at z = f(x), a total derivative: zero for affine decoders only."""
    encoder, decoder = tanh_pair(4, 2, torch.device("cpu"), torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64)
    probes = torch.randn(1, 5, 2, dtype=torch.float64)
    affine = torch.nn.Linear(2, 4).double()
    through_curved = EXACT[name](x, encoder, decoder, lambda z: probes).volume.sum()
    through_affine = EXACT[name](x, encoder, affine, lambda z: probes).volume.sum()
    parameters = list(encoder.parameters())
    assert any(bool((g.abs() > 1e-3).any()) for g in gradients(through_curved, parameters))
    for g in gradients(through_affine, parameters):
        torch.testing.assert_close(g, torch.zeros_like(g), rtol=0, atol=1e-12)

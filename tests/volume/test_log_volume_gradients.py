"""When the surrogate's gradient is that of the log-volume: oracles 4, 6, 7, 8, 13, 16 and 17.

Free-form injective flows, arXiv 2306.01843; rectangular flows, arXiv 2106.01413; the case of equal
dimensions, free-form flows, arXiv 2310.16624.
"""

from functools import partial

import pytest
import torch
from support.dense import dense_jacobian
from support.geometry import TIED_PAIRS, Pair, Warp, gram_log_volume, seeded, tanh_pair, warped
from support.gradients import assert_gradients_close, directional_derivatives, gradients
from torch import Tensor, nn

from normflows_injective.volume import ConjugateGradient, draw_probes, log_volume
from normflows_injective.volume.estimators import ESTIMATORS, DecoderSurrogate, EncoderSurrogate

ALL_PROBES = partial(draw_probes, "orthonormal", 2)


def linear_maps(noise: float) -> tuple[Tensor, Tensor]:
    """W and A with W A = I, and W = A^+ up to a part that A does not see."""
    a = torch.randn(5, 2, dtype=torch.float64)
    pseudo_inverse = torch.linalg.pinv(a)
    oblique = torch.randn(2, 5, dtype=torch.float64) @ (torch.eye(5) - a @ pseudo_inverse)
    return (pseudo_inverse + noise * oblique).requires_grad_(), a.requires_grad_()


def linear_surrogate(w: Tensor, a: Tensor, draw=ALL_PROBES) -> Tensor:
    x = torch.randn(3, 5, dtype=torch.float64)
    return EncoderSurrogate()(x, lambda x: x @ w.T, lambda z: z @ a.T, draw).volume


@seeded(40)
def test_oracle_04_linear_gradient():
    """For W = A^+ the expected gradient is -A^T = -grad (1/2) log det W W^T, the volume's."""
    w, a = linear_maps(noise=0.0)
    (gradient,) = gradients(linear_surrogate(w, a).mean(), [w])
    (exact,) = gradients(gram_log_volume(w.mT), [w])
    torch.testing.assert_close(gradient, -a.detach().T, rtol=0, atol=1e-13)
    torch.testing.assert_close(gradient, -exact, rtol=0, atol=1e-13)


@seeded(41)
def test_oracle_04_linear_gradient_in_expectation():
    """One random probe gives it on average: within 4 standard errors of 4000 samples."""
    a = torch.randn(5, 2, dtype=torch.float64)
    w = torch.linalg.pinv(a).expand(4000, 2, 5).clone().requires_grad_()
    volume = EncoderSurrogate()(
        torch.randn(4000, 5, dtype=torch.float64),
        lambda x: torch.einsum("bij,bj->bi", w, x),
        lambda z: z @ a.T,
        partial(draw_probes, "orthonormal", 1),
    ).volume
    (per_sample,) = gradients(volume.sum(), [w])
    standard_error = per_sample.std(0) / 4000**0.5
    assert standard_error.max() < 0.1
    assert ((per_sample.mean(0) + a.T).abs() <= 4 * standard_error).all()


@pytest.mark.parametrize("manifold", TIED_PAIRS)
@seeded(60)
def test_oracle_06_tied_latent_warp(manifold):
    """With f' = g'^+ for every parameter, the surrogate's gradient is the log-volume's."""
    warp = Warp()
    pair = warped(TIED_PAIRS[manifold](), warp)
    x = pair.decode(pair.sample(5)).detach()
    z = pair.encode(x)
    f, g = dense_jacobian(pair.encode, x), dense_jacobian(pair.decode, z)
    torch.testing.assert_close(f, torch.linalg.pinv(g), rtol=0, atol=1e-12)

    volume = EncoderSurrogate()(x, pair.encode, pair.decode, ALL_PROBES).volume
    actual = gradients(volume.sum(), [warp.weights])
    assert_gradients_close(actual, gradients(gram_log_volume(g).sum(), [warp.weights]), 1e-11)
    assert_gradients_close(actual, gradients(-gram_log_volume(f.mT).sum(), [warp.weights]), 1e-11)
    exact = log_volume(pair.decode, pair.encode(x)).sum()
    assert_gradients_close(actual, gradients(exact, [warp.weights]), 1e-11)


@pytest.mark.parametrize("estimator", ["encoder", "decoder", "conjugate_gradient"])
@pytest.mark.parametrize("kind", ["orthonormal", "gaussian", "rademacher"])
@seeded(61)
def test_oracle_06_one_probe_on_average(kind, estimator):
    """One probe gives that gradient on average: within 4 standard errors of 3000 draws.

    The derivative is taken along the gradient itself, so that it is not small by chance.
    """
    warp = Warp()
    pair = warped(TIED_PAIRS["sphere"](), warp)
    point = pair.decode(pair.sample(1)).detach()
    exact = log_volume(pair.decode, pair.encode(point))
    (direction,) = gradients(exact.sum(), [warp.weights])
    draw = partial(draw_probes, kind, 1)
    many = point.expand(3000, 3)
    volume = ESTIMATORS[estimator](many, pair.encode, pair.decode, draw).volume
    draws = directional_derivatives(volume, [warp.weights], [direction])
    expected = direction.square().sum()
    standard_error = draws.std() / 3000**0.5
    assert 0 < standard_error < 0.1 * expected.abs()
    assert (draws.mean() - expected).abs() < 4 * standard_error


@seeded(70)
def test_oracle_07_oblique_graph_embedding():
    """g(z) = (z, h(z)), f(x) = x_1..d: an exact inverse, yet the surrogate is blind to h."""
    h = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    z = torch.randn(4, 2, dtype=torch.float64)

    def decode(z: Tensor) -> Tensor:
        return torch.cat([z, h(z)], dim=1)

    def encode(x: Tensor) -> Tensor:
        return x[:, :2]

    x = decode(z).detach()
    volume = EncoderSurrogate()(x, encode, decode, ALL_PROBES).volume
    torch.testing.assert_close(volume, torch.full_like(volume, -2.0))
    parameters = list(h.parameters())
    assert all(bool((g == 0).all()) for g in gradients(volume.sum(), parameters))
    slope = dense_jacobian(h, z)
    exact = 0.5 * torch.logdet(torch.eye(2) + slope.mT @ slope)
    torch.testing.assert_close(log_volume(decode, z), exact)
    weights = [p for p in gradients(exact.sum(), parameters) if p.dim() == 2]
    assert all(float(g.abs().max()) > 0.01 for g in weights)
    # The estimator without an encoder Jacobian has no such bias.
    unbiased = ConjugateGradient(tolerance=1e-12)(x, encode, decode, ALL_PROBES).volume
    assert_gradients_close(
        gradients(unbiased.sum(), parameters), gradients(exact.sum(), parameters), 1e-9
    )


@seeded(71)
def test_oracle_07_oblique_linear_inverse():
    """For W = A^+ + N the gradient is still -A^T, no longer that of any log-determinant."""
    w, a = linear_maps(noise=0.5)
    torch.testing.assert_close(w @ a, torch.eye(2, dtype=torch.float64))
    (gradient,) = gradients(linear_surrogate(w, a).mean(), [w])
    (exact,) = gradients(gram_log_volume(w.mT), [w])
    torch.testing.assert_close(gradient, -a.detach().T, rtol=0, atol=1e-13)
    assert (gradient + exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@seeded(80)
def test_oracle_08_encoder_likelihood_is_optimistic(share):
    """nll_enc <= nll_dec for every left inverse, with equality iff f' = g'^+."""
    h = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    z = torch.randn(6, 2, dtype=torch.float64)
    slope = dense_jacobian(h, z).detach()
    eye = torch.eye(2, dtype=torch.float64)
    # f(x) = a + share * M (b - h(a)) for x = (a, b) inverts g for every M; this M is g'^+'s.
    matrix = share * torch.linalg.solve(eye + slope.mT @ slope, slope.mT)

    def encode(x: Tensor, m: Tensor) -> Tensor:
        return x[:, :2] + torch.einsum("bij,bj->bi", m, x[:, 2:] - h(x[:, :2]))

    def decode(z: Tensor) -> Tensor:
        return torch.cat([z, h(z)], dim=1)

    x = decode(z).detach()
    torch.testing.assert_close(encode(x, matrix), z)
    f = torch.cat(
        [dense_jacobian(partial(encode, m=matrix[i : i + 1]), x[i : i + 1]) for i in range(len(x))]
    )
    gap = log_volume(decode, z) + gram_log_volume(f.mT)
    if share == 1.0:
        torch.testing.assert_close(gap, torch.zeros_like(gap), rtol=0, atol=1e-12)
        torch.testing.assert_close(f, torch.linalg.pinv(dense_jacobian(decode, z)))
    else:
        assert (gap > 1e-3).all()


@seeded(130)
def test_oracle_13_rectangular_scalar_and_its_factor():
    """<SG[(J'J)^-1 v], J'J v> is d with twice the gradient; the estimator is half of it."""
    _, decoder = tanh_pair(5, 2, torch.device("cpu"), torch.float64)
    encoder = nn.Linear(5, 2).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    parameters = [*decoder.parameters(), *encoder.parameters()]
    j = dense_jacobian(decoder, encoder(x))
    gram = j.mT @ j
    probes = draw_probes("orthonormal", 2, encoder(x))
    solved = torch.linalg.solve(gram.detach(), probes.unsqueeze(3)).squeeze(3)
    scalar = torch.einsum("kbi,bij,kbj->kb", solved, gram, probes).mean(0)
    torch.testing.assert_close(scalar, torch.full_like(scalar, 2.0))
    exact = gradients(gram_log_volume(j).sum(), parameters)
    assert_gradients_close(gradients(scalar.sum() / 2, parameters), exact, 1e-10)

    estimator = ConjugateGradient(tolerance=1e-12)
    volume = estimator(x, encoder, decoder, lambda z: probes).volume
    torch.testing.assert_close(volume, scalar / 2)
    assert_gradients_close(gradients(volume.sum(), parameters), exact, 1e-9)


@seeded(160)
def test_oracle_16_equal_dimensions():
    """At d = D with g = f^-1 the gradient is that of -log|det f'|, as in free-form flows."""
    warp = Warp()
    pair = Pair(warp.inverse, warp, lambda n: torch.randn(n, 2, dtype=torch.float64))
    x = pair.sample(6)
    f = dense_jacobian(pair.encode, x)
    log_det = torch.linalg.slogdet(f).logabsdet
    torch.testing.assert_close(log_volume(pair.decode, pair.encode(x)), -log_det)
    exact = gradients(-log_det.sum(), [warp.weights])
    for estimator in (EncoderSurrogate(), DecoderSurrogate(), ConjugateGradient(tolerance=1e-12)):
        volume = estimator(x, pair.encode, pair.decode, ALL_PROBES).volume
        assert_gradients_close(gradients(volume.sum(), [warp.weights]), exact, 1e-10)


@seeded(161)
def test_oracle_16_equal_dimensions_with_separate_networks():
    """The encoder form is then the free-form flow's: -v'f' SG[g'v] for any two networks."""
    encoder, decoder = tanh_pair(3, 3, torch.device("cpu"), torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64)
    v = draw_probes("orthonormal", 1, x)
    volume = EncoderSurrogate()(x, encoder, decoder, lambda z: v).volume
    f, g = dense_jacobian(encoder, x), dense_jacobian(decoder, encoder(x)).detach()
    expected = -torch.einsum("bi,bij,bjl,bl->b", v[0], f, g, v[0])
    torch.testing.assert_close(volume, expected)
    parameters = list(encoder.parameters())
    assert_gradients_close(
        gradients(volume.sum(), parameters), gradients(expected.sum(), parameters), 1e-10
    )


@pytest.mark.parametrize("manifold", TIED_PAIRS)
@seeded(170)
def test_oracle_17_both_forms_agree_on_tied_pairs(manifold):
    """(df')g' = -f'(dg'): the bare traces have opposite gradients, so the signed forms agree."""
    warp = Warp()
    pair = warped(TIED_PAIRS[manifold](), warp)
    x = pair.decode(pair.sample(5)).detach()
    probes = torch.randn(1, 5, 2, dtype=torch.float64)
    encoder_form, decoder_form = (
        estimator(x, pair.encode, pair.decode, lambda z: probes).volume
        for estimator in (EncoderSurrogate(), DecoderSurrogate())
    )
    torch.testing.assert_close(encoder_form, -decoder_form)
    assert_gradients_close(
        gradients(decoder_form.sum(), [warp.weights]),
        gradients(encoder_form.sum(), [warp.weights]),
        1e-11,
    )


@seeded(171)
def test_oracle_17_forms_differ_off_the_manifold():
    """The agreement is a property of consistency: where f'g' is no multiple of I it is gone."""
    warp = Warp()
    pair = warped(TIED_PAIRS["flat torus"](), warp)
    x = pair.decode(pair.sample(5)).detach()
    x = x * torch.tensor([1.4, 1.4, 1.0, 1.0], dtype=torch.float64)
    probes = torch.randn(1, 5, 2, dtype=torch.float64)
    first, second = (
        gradients(
            estimator(x, pair.encode, pair.decode, lambda z: probes).volume.sum(), [warp.weights]
        )[0]
        for estimator in (EncoderSurrogate(), DecoderSurrogate())
    )
    assert (first - second).norm() > 0.01 * first.norm()

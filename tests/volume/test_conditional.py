"""Oracle 21: the conditional surrogate follows the reconstruction's gradient, probe by probe.

The switch is that of arXiv 2608.12084; inner products of gradients settle its direction here.
"""

from typing import NamedTuple

import pytest
import torch
from support.geometry import seeded
from support.gradients import gradients
from torch import Tensor

from normflows_injective.volume import Conditional
from normflows_injective.volume.estimators import DecoderSurrogate, EncoderSurrogate, Estimator

DRAWS, DATA_DIM, LATENT_DIM = 4000, 6, 3


class LinearPairs(NamedTuple):
    """One linear pair (f', g') and one probe per draw, and c = v'(f'g' - I)v."""

    f: Tensor
    g: Tensor
    v: Tensor
    c: Tensor


def linear_pairs(scale: float, noise: float) -> LinearPairs:
    g = torch.randn(DRAWS, DATA_DIM, LATENT_DIM, dtype=torch.float64)
    f = scale * torch.linalg.pinv(g)
    f = f + noise * torch.randn_like(f)
    v = torch.randn(DRAWS, LATENT_DIM, dtype=torch.float64)
    c = torch.einsum("bi,bij,bjk,bk->b", v, f, g, v) - v.square().sum(1)
    return LinearPairs(f.requires_grad_(), g.requires_grad_(), v, c)


def surrogate_of(estimator: Estimator, pairs: LinearPairs) -> Tensor:
    return estimator(
        torch.randn(DRAWS, DATA_DIM, dtype=torch.float64),
        lambda x: torch.einsum("bij,bj->bi", pairs.f, x),
        lambda z: torch.einsum("bij,bj->bi", pairs.g, z),
        lambda z: pairs.v.unsqueeze(0),
    ).volume


def reconstruction_gradients(pairs: LinearPairs) -> tuple[Tensor, ...]:
    """Those of ||I - g'f'||_F^2, which reconstruction of noisy data adds to the loss."""
    eye = torch.eye(DATA_DIM, dtype=torch.float64)
    return gradients((eye - pairs.g @ pairs.f).square().sum(), [pairs.f, pairs.g])


def alignment(estimator: Estimator, pairs: LinearPairs) -> Tensor:
    """Inner product, per draw, of the surrogate's gradient with the reconstruction's."""
    surrogate = gradients(surrogate_of(estimator, pairs).sum(), [pairs.f, pairs.g])
    reconstruction = reconstruction_gradients(pairs)
    return sum((s * r).sum((1, 2)) for s, r in zip(surrogate, reconstruction, strict=True))


@pytest.mark.slow
@seeded(210)
def test_oracle_21_inner_products_in_closed_form():
    """With R = I - f'g': 2 v'g''g'Rv for S_E, -2 v'Rf'f''v for S_D."""
    pairs = linear_pairs(1.0, 0.3)
    f, g, v = pairs.f.detach(), pairs.g.detach(), pairs.v
    residual = torch.eye(LATENT_DIM, dtype=torch.float64) - f @ g
    encoder = 2 * torch.einsum("bi,bij,bj->b", v, g.mT @ g @ residual, v)
    decoder = -2 * torch.einsum("bi,bij,bj->b", v, residual @ f @ f.mT, v)
    torch.testing.assert_close(alignment(EncoderSurrogate(), pairs), encoder, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(alignment(DecoderSurrogate(), pairs), decoder, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("scale", "below"), [(0.6, True), (1.5, False)])
@seeded(211)
def test_oracle_21_alignment_near_the_pseudo_inverse(scale, below):
    """c < 0: every S_E is aligned and no S_D; c > 0: the other way round."""
    pairs = linear_pairs(scale, 0.02)
    assert ((pairs.c < 0) == below).all()
    right, wrong = (
        (EncoderSurrogate(), DecoderSurrogate())
        if below
        else (DecoderSurrogate(), EncoderSurrogate())
    )
    assert (alignment(right, pairs) > 0).all()
    assert (alignment(wrong, pairs) < 0).all()
    torch.testing.assert_close(alignment(Conditional(), pairs), alignment(right, pairs))


@pytest.mark.parametrize(
    ("below", "encoder_share", "decoder_share"), [(True, 0.84, 0.35), (False, 0.17, 0.92)]
)
@seeded(212)
def test_oracle_21_alignment_with_noise(below, encoder_share, decoder_share):
    """Far from consistency the switch is right for most probes, the opposite one for few."""
    pairs = linear_pairs(1.0, 0.3)
    side = (pairs.c < 0) == below
    for estimator, share in (
        (EncoderSurrogate(), encoder_share),
        (DecoderSurrogate(), decoder_share),
    ):
        aligned = float((alignment(estimator, pairs)[side] > 0).double().mean())
        # The expected shares were found with as many draws, and rounded to a percent.
        standard_error = (2 * share * (1 - share) / int(side.sum())) ** 0.5
        assert abs(aligned - share) < 4 * standard_error + 0.005


@seeded(216)
def test_oracle_21_alignment_of_the_switch():
    """As a whole the switch is aligned far more often than its opposite."""
    pairs = linear_pairs(1.0, 0.3)
    switch, opposite = (
        float((alignment(estimator, pairs) > 0).double().mean())
        for estimator in (Conditional(), Conditional(opposite=True))
    )
    assert switch > 0.84
    assert opposite < 0.35


@seeded(213)
def test_oracle_21_direction_of_the_switch():
    """Descending S_E raises v'f'g'v, descending S_D lowers it; the switch moves it to |v|^2."""
    pairs = linear_pairs(1.0, 0.3)
    for estimator, sign in ((EncoderSurrogate(), 1), (DecoderSurrogate(), -1)):
        df, dg = gradients(surrogate_of(estimator, pairs).sum(), [pairs.f, pairs.g])
        change = torch.einsum("bi,bij,bj->b", pairs.v, -df @ pairs.g - pairs.f @ dg, pairs.v)
        assert (sign * change > 0).all()

    encoder, decoder = (
        surrogate_of(EncoderSurrogate(), pairs),
        surrogate_of(DecoderSurrogate(), pairs),
    )
    torch.testing.assert_close(encoder, -decoder)
    conditional = surrogate_of(Conditional(), pairs)
    opposite = surrogate_of(Conditional(opposite=True), pairs)
    below = pairs.c < 0
    assert 0.1 < below.double().mean() < 0.9
    torch.testing.assert_close(conditional, torch.where(below, encoder, decoder))
    torch.testing.assert_close(opposite, torch.where(below, decoder, encoder))


@seeded(214)
def test_oracle_21_switch_is_made_per_probe():
    """Two probes of one sample on different sides of c = 0 use different surrogates."""
    f = torch.diag(torch.tensor([0.5, 2.0], dtype=torch.float64)).requires_grad_()
    g = torch.eye(2, dtype=torch.float64, requires_grad=True)
    probes = 2**0.5 * torch.eye(2, dtype=torch.float64).unsqueeze(1)
    x = torch.ones(1, 2, dtype=torch.float64)
    volume = Conditional()(x, lambda x: x @ f.T, lambda z: z @ g.T, lambda z: probes).volume
    # -2 * 0.5 from the first probe by S_E, +2 * 2 from the second by S_D; the mean of both.
    assert volume.item() == pytest.approx((-1.0 + 4.0) / 2)
    df, dg = gradients(volume.sum(), [f, g])
    torch.testing.assert_close(df, torch.diag(torch.tensor([-1.0, 0.0], dtype=torch.float64)))
    torch.testing.assert_close(dg, torch.diag(torch.tensor([0.0, 2.0], dtype=torch.float64)))


@seeded(215)
def test_oracle_21_values_at_consistency():
    """At c = 0 the two values are -|v|^2 and +|v|^2, for Gaussian probes of any length."""
    pairs = linear_pairs(1.0, 0.0)
    square = pairs.v.square().sum(1)
    torch.testing.assert_close(surrogate_of(EncoderSurrogate(), pairs), -square)
    torch.testing.assert_close(surrogate_of(DecoderSurrogate(), pairs), square)
    for opposite in (False, True):
        value = surrogate_of(Conditional(opposite), pairs)
        torch.testing.assert_close(value.abs(), square)

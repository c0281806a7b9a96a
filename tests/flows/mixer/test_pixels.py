"""Pixels: noise within their bins, and bits per dimension."""

from __future__ import annotations

import math

import pytest
import torch
from support.comparison import close
from support.points import legendre
from support.seeds import seeded_generator, shifted

from normflows_injective.errors import DtypeError, OptionError
from normflows_injective.flows.mixer import bits_per_dim, dequantise

pytestmark = pytest.mark.usefixtures("float64_by_default")


# --- pixels --------------------------------------------------------------------------------------


def bins_of(x, bits):
    return ((x.double() + 1) * 2 ** (bits - 1)).floor().long()


@pytest.mark.parametrize("bits", [1, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", ["drawn", "least", "most"])
def test_pixels_can_be_told_from_dequantised_ones(noise, dtype, bits, monkeypatch):
    torch.set_default_dtype(dtype)
    # The largest number below one that a generator of this dtype returns.
    extreme = {"least": 0.0, "most": 1 - torch.finfo(dtype).eps / 2}.get(noise)
    if extreme is not None:
        monkeypatch.setattr(
            torch, "rand", lambda size, dtype, **_: torch.full(size, extreme, dtype=dtype)
        )
    pixels = torch.arange(256).repeat(20)
    x = dequantise(pixels, bits)
    assert x.dtype == dtype
    assert float(x.min()) >= -1
    assert float(x.max()) < 1
    assert torch.equal(bins_of(x, bits), pixels // 2 ** (8 - bits))


def test_noise_is_uniform_within_its_bin():
    x = dequantise(torch.full((40_000,), 3), bits=2, stored_bits=2)
    noise = (x - 0.5) / 0.5
    # Standard errors 0.0014 and 0.0004.
    close(noise.mean(), 0.5, 0.006)
    close(noise.var(), 1 / 12, 0.002)
    assert len(noise.unique()) > 39_000
    generator = seeded_generator(3)
    first = dequantise(torch.zeros(5, dtype=torch.int64), generator=generator)
    again = dequantise(
        torch.zeros(5, dtype=torch.int64), generator=generator.manual_seed(shifted(3))
    )
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("dtype", "stored_bits"),
    [(torch.uint8, 8), (torch.int8, 7), (torch.int16, 15), (torch.uint16, 16), (torch.int32, 16)],
)
@pytest.mark.parametrize("bits", [1, 3])
def test_short_integers_do_not_wrap_round(dtype, stored_bits, bits):
    values = torch.tensor([0, 2 ** (stored_bits - 1), 2**stored_bits - 1])
    x = dequantise(values.to(dtype), bits, stored_bits)
    assert bins_of(x, bits).tolist() == [0, 2 ** (bits - 1), 2**bits - 1]


def test_histograms_take_their_entropy():
    bits = 3
    mass = torch.rand(2**bits)
    mass = mass / mass.sum()
    entropy = float(-(mass * mass.log2()).sum())
    pixels = torch.cartesian_prod(*[torch.arange(2**bits)] * 3)
    x = dequantise(pixels, bits, bits)
    # The density of three independent pixels, constant in every bin.
    log_prob = (mass[bins_of(x, bits)] * 2**bits / 2).log().sum(1)
    weights = mass[pixels].prod(1)
    close((weights * bits_per_dim(log_prob, 3, bits)).sum(), entropy, 1e-12)


def test_bits_bound_those_of_the_mass_of_a_bin_and_reach_them_in_the_limit():
    nodes, weights = legendre(20)
    nodes, weights = (nodes + 1) / 2, weights / 2

    def log_density(x):
        # Of tanh(s + 0.3) for a standard normal s.
        s = x.atanh() - 0.3
        return -0.5 * s.square() - 0.5 * math.log(2 * math.pi) - (1 - x.square()).log()

    gaps = []
    for bits in (3, 5, 7):
        edges = torch.linspace(-0.5, 0.5, 2 ** (bits - 1) + 1)
        width = 2 / 2**bits
        x = edges[:-1, None] + width * nodes
        mass = (log_density(x).exp() * weights).sum(1) * width
        exact = torch.special.ndtr(edges.atanh() - 0.3).diff()
        close(mass, exact, 1e-6)
        bound = (bits_per_dim(log_density(x), 1, bits) * weights).sum(1)
        gap = bound + exact.log2()
        assert float(gap.min()) > 0
        gaps.append(float((gap * exact).sum()))
    # Jensen's gap is of the second order in the width of a bin.
    assert gaps[1] < gaps[0] / 8
    assert gaps[2] < gaps[1] / 8


def test_bits_add_the_constant_of_the_formula():
    log_prob = torch.tensor([-100.0, 3.0])
    for bits in (1, 5, 8):
        expected = -(log_prob + 12 * math.log(2 / 2**bits)) / (12 * math.log(2))
        close(bits_per_dim(log_prob, 12, bits), expected, 1e-13)


def test_bad_pixels_are_named_errors():
    with pytest.raises(
        DtypeError, match=r"integers, got torch.float32\. .* multiply by 31, round"
    ):
        dequantise(torch.rand(3, dtype=torch.float32), 5, 5)
    with pytest.raises(DtypeError, match="integers, got torch.bool"):
        dequantise(torch.ones(3, dtype=torch.bool))
    with pytest.raises(DtypeError, match=r"must be a torch.Tensor, got list\. Convert"):
        dequantise([1, 2])
    with pytest.raises(OptionError, match="bits must be at most stored_bits=5, got 8"):
        dequantise(torch.zeros(3, dtype=torch.int64), 8, 5)
    with pytest.raises(OptionError, match="within 0 and 31, got 0 to 40. Set stored_bits"):
        dequantise(torch.tensor([0, 40]), 5, 5)
    with pytest.raises(OptionError, match="within 0 and 255, got -1 to 40"):
        dequantise(torch.tensor([-1, 40]))
    with pytest.raises(OptionError, match="bits must be a positive integer, got 0"):
        dequantise(torch.tensor([0]), 0)
    with pytest.raises(OptionError, match="stored_bits must be a positive integer, got 0"):
        dequantise(torch.tensor([0]), 1, 0)
    with pytest.raises(OptionError, match="num_dims must be a positive integer, got 0"):
        bits_per_dim(torch.zeros(2), 0)
    with pytest.raises(OptionError, match="bits must be a positive integer, got 1.5"):
        bits_per_dim(torch.zeros(2), 3, 1.5)
    assert dequantise(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3)

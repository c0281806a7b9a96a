"""Encoder-decoder pairs with known geometry, and derivatives without the package's own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import normflows as nf
import torch
from torch import Tensor, nn

import normflows_injective as nfi
from normflows_injective.flows.injection import Injection
from support.seeds import manual_seed

Map = Callable[[Tensor], Tensor]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generator, and put it back; as a decorator, for one test."""
    with torch.random.fork_rng():
        manual_seed(seed)
        yield


def gram_log_volume(matrix: Tensor) -> Tensor:
    """Half the log-determinant of the Gram matrix of tall matrices, by its definition."""
    return 0.5 * torch.logdet(matrix.mT @ matrix)


def tanh_pair(
    data_dim: int, latent_dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, nn.Module]:
    """An encoder and a decoder that know nothing of each other."""
    encoder = nn.Sequential(nn.Linear(data_dim, 7), nn.Tanh(), nn.Linear(7, latent_dim))
    decoder = nn.Sequential(nn.Linear(latent_dim, 6), nn.Tanh(), nn.Linear(6, data_dim))
    for parameter in [*encoder.parameters(), *decoder.parameters()]:
        nn.init.normal_(parameter, std=0.7)
    return encoder.to(device, dtype), decoder.to(device, dtype)


class Warp(nn.Module):
    r"""Learnable bijection :math:`h` of the plane whose inverse is in closed form.

    Each of two steps sends :math:`(a, b)` to :math:`(b e^{s(a)} + t(a), a)`.
    """

    def __init__(self, scale: float = 0.4) -> None:
        super().__init__()
        self.weights = nn.Parameter(scale * torch.randn(2, 4, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        for w in self.weights:
            a, b = z[:, :1], z[:, 1:]
            z = torch.cat([b * self._log_scale(w, a).exp() + self._shift(w, a), a], dim=1)
        return z

    def inverse(self, u: Tensor) -> Tensor:
        for w in self.weights.flip(0):
            b, a = u[:, :1], u[:, 1:]
            u = torch.cat([a, (b - self._shift(w, a)) * (-self._log_scale(w, a)).exp()], dim=1)
        return u

    @staticmethod
    def _log_scale(w: Tensor, a: Tensor) -> Tensor:
        return w[0] * torch.tanh(a + w[1])

    @staticmethod
    def _shift(w: Tensor, a: Tensor) -> Tensor:
        return w[2] * torch.sin(a + w[3])


class Pair(NamedTuple):
    """A chart of a manifold: ``encode`` projects orthogonally, ``decode`` embeds."""

    encode: Map
    decode: Map
    sample: Callable[[int], Tensor]  # Chart coordinates that both maps can take.


def mercator_sphere(radius: float = 1.5) -> Pair:
    """Sphere in R^3 in the Mercator chart (longitude, y)."""

    def decode(u: Tensor) -> Tensor:
        longitude, y = u[:, 0], u[:, 1]
        unit = [longitude.cos() / y.cosh(), longitude.sin() / y.cosh(), y.tanh()]
        return radius * torch.stack(unit, dim=1)

    def encode(x: Tensor) -> Tensor:
        unit = x / x.norm(dim=1, keepdim=True)
        return torch.stack([torch.atan2(unit[:, 1], unit[:, 0]), unit[:, 2].atanh()], dim=1)

    return Pair(encode, decode, _coordinates(2, 1.2))


def flat_torus(first: float = 0.8, second: float = 1.7) -> Pair:
    """Product of two circles in R^4, in the chart of its two angles."""

    def decode(u: Tensor) -> Tensor:
        a, b = u[:, 0], u[:, 1]
        return torch.stack(
            [first * a.cos(), first * a.sin(), second * b.cos(), second * b.sin()], dim=1
        )

    def encode(x: Tensor) -> Tensor:
        return torch.stack([torch.atan2(x[:, 1], x[:, 0]), torch.atan2(x[:, 3], x[:, 2])], dim=1)

    return Pair(encode, decode, _coordinates(2, 1.5))


def stereographic_sphere(radius: float = 1.0) -> Pair:
    """Sphere in R^3 in the stereographic chart, which takes the whole plane."""

    def decode(u: Tensor) -> Tensor:
        square = u.square().sum(1, keepdim=True)
        return radius * torch.cat([2 * u, 1 - square], dim=1) / (1 + square)

    def encode(x: Tensor) -> Tensor:
        unit = x / x.norm(dim=1, keepdim=True)
        return unit[:, :2] / (1 + unit[:, 2:])

    return Pair(encode, decode, _coordinates(2, 1.0))


def circle(radius: float | Tensor) -> Pair:
    """Circle in the plane, in the chart of its angle."""

    def decode(u: Tensor) -> Tensor:
        return radius * torch.cat([u.cos(), u.sin()], dim=1)

    def encode(x: Tensor) -> Tensor:
        return torch.atan2(x[:, 1:], x[:, :1])

    return Pair(encode, decode, _coordinates(1, 3.0))


def warped(pair: Pair, warp: Warp) -> Pair:
    """The same manifold and projection in latents that the warp takes to chart coordinates."""

    def sample(num_samples: int) -> Tensor:
        return warp.inverse(pair.sample(num_samples)).detach()

    return Pair(lambda x: warp.inverse(pair.encode(x)), lambda z: pair.decode(warp(z)), sample)


class Chart(Injection):
    """A pair of maps as a layer."""

    def __init__(self, pair: Pair, *modules: nn.Module):
        super().__init__()
        self.pair, self.held = pair, nn.ModuleList(modules)
        # A model takes its dtype from its layers, and a chart may have no parameters.
        self.register_buffer("origin", torch.zeros(0, dtype=torch.float64))

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.pair.encode(x)

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.pair.decode(z)


def flow_on(pair: Pair, dimension: int, *modules: nn.Module) -> nfi.InjectiveNormalizingFlow:
    base = nf.distributions.DiagGaussian(dimension, trainable=False).double()
    return nfi.InjectiveNormalizingFlow(base, [Chart(pair, *modules)])


TIED_PAIRS = {"sphere": mercator_sphere, "flat torus": flat_torus}


def _coordinates(dimension: int, bound: float) -> Callable[[int], Tensor]:
    def sample(num_samples: int) -> Tensor:
        return bound * (2 * torch.rand(num_samples, dimension, dtype=torch.float64) - 1)

    return sample

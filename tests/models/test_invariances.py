"""What a change of coordinates does to densities: oracles 4 and 5."""

import math

import normflows as nf
import pytest
import torch
from support.geometry import Chart, Pair, Warp, flow_on, seeded, stereographic_sphere, warped
from torch import Tensor, nn

import normflows_injective as nfi
from normflows_injective.volume import log_volume


class WarpFlow(nf.flows.Flow):
    """The warp as a latent layer, its log-determinant from the slopes of its two steps."""

    def __init__(self, warp: Warp):
        super().__init__()
        self.warp = warp

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_det, u = torch.zeros(len(z), dtype=z.dtype), z
        for w in self.warp.weights:
            a, b = u[:, :1], u[:, 1:]
            slope = w[0] * torch.tanh(a + w[1])
            log_det = log_det + slope[:, 0]
            u = torch.cat([b * slope.exp() + w[2] * torch.sin(a + w[3]), a], dim=1)
        return u, log_det

    def inverse(self, u: Tensor) -> tuple[Tensor, Tensor]:
        z = self.warp.inverse(u)
        return z, -self.forward(z)[1]


def normal(dimension: int) -> nn.Module:
    return nf.distributions.DiagGaussian(dimension, trainable=False).double()


def rotation(dimension: int) -> Tensor:
    return torch.linalg.qr(torch.randn(dimension, dimension, dtype=torch.float64)).Q


@seeded(50)
def test_oracle_05_isometries_have_no_volume():
    """g''g' = I: padding, orthonormal columns, a torus of unit circles, a curve of unit speed."""
    z = torch.randn(5, 2, dtype=torch.float64)
    columns = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64)).Q
    injection = nfi.flows.LinearInjection(2, 6).double()
    with torch.no_grad():
        injection.weight.copy_(columns)
    speed = math.hypot(1.2, 0.5)

    def helix(z: Tensor) -> Tensor:
        t = z[:, :1] / speed
        return torch.cat([1.2 * t.cos(), 1.2 * t.sin(), 0.5 * t], dim=1)

    for volume in (
        nfi.flows.Pad(2, 5)(z)[1],
        log_volume(nfi.flows.Pad(2, 5).decode, z),
        injection(z)[1],
        log_volume(lambda z: z @ columns.T, z),
        log_volume(lambda z: torch.cat([z.cos(), z.sin()], dim=1), z),
        log_volume(helix, z[:, :1]),
    ):
        torch.testing.assert_close(volume, torch.zeros_like(volume), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 0.3, 4.0])
@seeded(51)
def test_oracle_05_scaling_and_rotation_of_the_data(scale):
    """x -> c Q x + b adds -d log c to the log-density: not D log c, and nothing for Q and b."""
    warp = Warp()
    pair = warped(stereographic_sphere(1.3), warp)
    q, shift = rotation(3), torch.randn(3, dtype=torch.float64)

    def decode(z: Tensor) -> Tensor:
        return scale * pair.decode(z) @ q.T + shift

    def encode(x: Tensor) -> Tensor:
        return pair.encode((x - shift) @ q / scale)

    x = pair.decode(pair.sample(6)).detach()
    moved = scale * x @ q.T + shift
    before = flow_on(pair, 2, warp).log_prob(x)
    after = flow_on(Pair(encode, decode, pair.sample), 2, warp).log_prob(moved)
    torch.testing.assert_close(after, before - 2 * math.log(scale))


@seeded(52)
def test_oracle_05_scaling_by_a_layer_of_the_host():
    """A constant scaling after the injection counts d times, though normflows says D times."""
    warp = Warp()
    chart = Chart(warped(stereographic_sphere(1.3), warp), warp)
    scale = nf.flows.AffineConstFlow((3,)).double()
    nn.init.constant_(scale.s, 0.4)
    x = chart.pair.decode(chart.pair.sample(6)).detach()
    plain = nfi.InjectiveNormalizingFlow(normal(2), [chart])
    scaled = nfi.InjectiveNormalizingFlow(normal(2), [chart, scale])
    torch.testing.assert_close(scaled.log_prob(math.exp(0.4) * x), plain.log_prob(x) - 2 * 0.4)


@seeded(53)
def test_oracle_05_rotation_of_the_latents():
    """z -> Q z leaves the density of a standard normal on the manifold as it is."""
    warp, q = Warp(), rotation(2)
    pair = warped(stereographic_sphere(), warp)
    turned = Pair(lambda x: pair.encode(x) @ q, lambda z: pair.decode(z @ q.T), pair.sample)
    x = pair.decode(pair.sample(6)).detach()
    before, after = flow_on(pair, 2, warp), flow_on(turned, 2, warp)
    torch.testing.assert_close(after.log_prob(x), before.log_prob(x))
    assert (after.encode(x) - before.encode(x)).abs().max() > 0.01


@seeded(54)
def test_oracle_05_latent_reparametrisation():
    """(h^-1 f, g h) with a normal base has the density of (f, g) with h's image of that base."""
    warp = Warp()
    sphere = stereographic_sphere()
    inside = flow_on(warped(sphere, warp), 2, warp)
    in_front = nfi.InjectiveNormalizingFlow(normal(2), [WarpFlow(warp), Chart(sphere)])
    x = sphere.decode(sphere.sample(6))
    torch.testing.assert_close(in_front.log_prob(x), inside.log_prob(x))
    # Leaving the base as it is gives another density: h has to be accounted for.
    assert (flow_on(sphere, 2).log_prob(x) - inside.log_prob(x)).abs().max() > 1e-3


@seeded(40)
def test_oracle_04_linear_density():
    """f = A^+(x - b), g = A z + b: log p = log p_Z(f(x)) - (1/2) log det A'A, off M as well."""
    a, b = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    exact = nfi.flows.LinearInjection(2, 5).double()
    encoder, decoder = nn.Linear(5, 2).double(), nn.Linear(2, 5).double()
    pseudo_inverse = torch.linalg.pinv(a)
    with torch.no_grad():
        exact.weight.copy_(a)
        exact.bias.copy_(b)
        decoder.weight.copy_(a)
        decoder.bias.copy_(b)
        encoder.weight.copy_(pseudo_inverse)
        encoder.bias.copy_(-pseudo_inverse @ b)
    x = torch.randn(6, 5, dtype=torch.float64)
    z = (x - b) @ pseudo_inverse.T
    expected = -z.square().sum(1) / 2 - math.log(2 * math.pi) - torch.logdet(a.T @ a) / 2
    for injection in (exact, nfi.flows.FreeFormInjection(encoder, decoder)):
        model = nfi.InjectiveNormalizingFlow(normal(2), [injection])
        torch.testing.assert_close(model.log_prob(x), expected)
        torch.testing.assert_close(model.encode(x), z)
    # The same law in orthonormal coordinates of the plane, where measures are Lebesgue's.
    q, r = torch.linalg.qr(a)
    in_plane = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=x.dtype), r @ r.T)
    torch.testing.assert_close(in_plane.log_prob(z @ a.T @ q), expected)

"""Flow matching: known fields, the log-det of the map, its loss, and models that hold it."""

from __future__ import annotations

import math

import normflows as nf
import pytest
import torch
from support.comparison import close
from support.dense import dense_jacobian
from support.models import base, mlp_injection
from support.seeds import manual_seed
from torch import nn

import normflows_injective as nfi
from normflows_injective.flows import FlowMatching
from normflows_injective.flows.stack import training_inverse

DOUBLE = {"dtype": torch.float64}


class Gaussian(nn.Module):
    r"""The velocity from a standard normal to :math:`\mathcal N(m, s^2)`, by its closed form.

    The pair :math:`(x - \epsilon, x_t)` is normal, with covariance :math:`t s^2 - (1 - t)` and
    variance :math:`t^2 s^2 + (1 - t)^2` of :math:`x_t`, whose mean is :math:`t m`.
    """

    def __init__(self, mean, scale):
        super().__init__()
        self.mean, self.scale = torch.tensor(mean, **DOUBLE), torch.tensor(scale, **DOUBLE)

    def forward(self, rows):
        y, t = rows[:, :-1], rows[:, -1:]
        variance = t**2 * self.scale**2 + (1 - t) ** 2
        return self.mean + (t * self.scale**2 - (1 - t)) / variance * (y - t * self.mean)


def gaussian(**options):
    return FlowMatching(2, Gaussian([1.0, -2.0], [0.5, 3.0]), **options)


def curved(dim=3, **options):
    """A layer whose field is far from linear, without training."""
    manual_seed(3)
    layer = FlowMatching(dim, hidden=(16, 16), **options).double()
    layer.net.layers[-1].reset_parameters()
    return layer


def test_it_starts_as_the_identity():
    z = torch.randn(4, 3)
    x, log_det = FlowMatching(3)(z)
    assert torch.equal(x, z)
    assert torch.equal(log_det, torch.zeros(4))


def test_a_normal_law_is_reached_by_its_own_field():
    """The flow of one normal law to another along this path is affine, m + s z."""
    z = torch.randn(50, 2, **DOUBLE)
    x, log_det = gaussian(steps=64)(z)
    field = gaussian().net
    torch.testing.assert_close(x, field.mean + field.scale * z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_det, torch.full_like(log_det, math.log(1.5)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_errors_fall_with_the_order_of_the_solver(solver, order):
    z = torch.randn(50, 3, **DOUBLE)
    with torch.no_grad():
        exact = curved(steps=256).decode(z)
        errors = [
            float((curved(steps=steps, solver=solver).decode(z) - exact).abs().max())
            for steps in (8, 16)
        ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.4)


def test_the_log_det_is_that_of_the_map():
    layer, z = curved(steps=32), torch.randn(4, 3, **DOUBLE)
    x, log_det = layer(z)
    expected = dense_jacobian(lambda point: layer(point)[0], z).det().log()
    torch.testing.assert_close(log_det, expected, atol=1e-6, rtol=1e-6)
    back, inverse_log_det = layer.inverse(x)
    torch.testing.assert_close(back, z, atol=1e-6, rtol=0)
    torch.testing.assert_close(inverse_log_det, -log_det, atol=1e-6, rtol=0)
    torch.testing.assert_close(layer.decode(z), x)
    torch.testing.assert_close(layer.encode(x), layer.inverse(x)[0])


def test_probes_estimate_the_log_det():
    manual_seed(0)
    z = torch.randn(1, 3, **DOUBLE).expand(4000, 3)
    exact = float(curved()(z[:1])[1].detach())
    with torch.no_grad():
        estimates = curved(divergence="hutchinson", num_probes=1)(z)[1]
    error = float(estimates.std()) / len(z) ** 0.5
    assert error > 0
    close(estimates.mean(), exact, absolute=4 * error)


def test_the_error_of_a_density_is_measured():
    x, field = torch.randn(20, 2, **DOUBLE), gaussian().net
    exact = torch.distributions.Normal(field.mean, field.scale).log_prob(x).sum(1)
    for steps in (16, 32):
        layer = gaussian(steps=steps)
        z, log_det = layer.inverse(x)
        density = log_det - 0.5 * z.square().sum(1) - math.log(2 * math.pi)
        error, measured = (density - exact).abs().max(), layer.density_error(x).max()
        assert 0.7 * error < measured < 1.4 * error
    steps = gaussian().steps_for(x, tolerance=1e-3)
    assert gaussian(steps=steps).density_error(x).max() <= 1e-3
    assert gaussian(steps=steps // 2).density_error(x).max() > 1e-3


def test_the_loss_is_least_for_the_conditional_mean():
    r"""There it is :math:`\mathbb E \operatorname{Var}(x - \epsilon \mid x_t)`, by quadrature."""
    manual_seed(1)
    layer, field = gaussian(), gaussian().net
    x = field.mean + field.scale * torch.randn(100_000, 2, **DOUBLE)
    t = (torch.arange(2000, **DOUBLE) + 0.5).div(2000).unsqueeze(1)
    variance = t**2 * field.scale**2 + (1 - t) ** 2
    least = 1 + field.scale**2 - (t * field.scale**2 - (1 - t)) ** 2 / variance
    losses = layer.matching_loss(x)
    error = float(losses.std()) / len(losses) ** 0.5
    close(losses.mean(), least.mean(0).sum(), absolute=4 * error)


def test_codes_are_detached_from_the_loss_and_the_injection_sees_the_base():
    layer, codes = curved(), torch.randn(6, 3, requires_grad=True, **DOUBLE)
    z, minus_loss = training_inverse([layer], codes)
    assert torch.equal(z, codes)
    (-minus_loss.sum()).backward()
    assert codes.grad is None
    assert all(p.grad is not None for p in layer.parameters())

    injection = mlp_injection().double()
    models = [
        nfi.InjectiveNormalizingFlow(base(2), [*layers, injection]).double()
        for layers in ([], [curved(2)])
    ]
    x = torch.randn(8, 5, **DOUBLE)
    gradients = []
    for model in models:
        manual_seed(5)
        injection.zero_grad()
        # Probes are drawn before the noise of the loss.
        model.forward_kld(x).backward()
        gradients.append([p.grad.clone() for p in injection.parameters()])
    torch.testing.assert_close(*gradients)


def test_densities_of_a_model_are_exact_in_every_mode():
    model = nfi.InjectiveNormalizingFlow(base(2), [curved(2), mlp_injection()]).double()
    x = torch.randn(5, 5, **DOUBLE)
    model.train()
    in_training = model.log_prob(x).detach()
    model.eval()
    torch.testing.assert_close(model.log_prob(x).detach(), in_training)
    z, _ = model.latent_block[0].inverse(model.flows[1].encode(x))
    volume = nfi.volume.log_volume(lambda v: model(v), z)
    expected = model.q0.log_prob(z) - volume
    torch.testing.assert_close(model.log_prob(x), expected, atol=1e-4, rtol=1e-4)


def test_a_context_reaches_the_velocity():
    layer = curved(2, context_dim=1)
    z, context = torch.zeros(2, 2, **DOUBLE), torch.tensor([[0.0], [2.0]], **DOUBLE)
    x, _ = layer(z, context=context)
    assert not torch.allclose(x[0], x[1])
    torch.testing.assert_close(layer.inverse(x, context=context)[0], z, atol=1e-4, rtol=0)
    with pytest.raises(nfi.errors.ContextError):
        layer.matching_loss(z)


def test_a_network_of_another_width_is_refused():
    with pytest.raises(nfi.errors.ShapeError, match="the velocity that net returns"):
        FlowMatching(2, nn.Linear(3, 5))(torch.zeros(1, 2))


@pytest.mark.slow
def test_two_moons_are_learned_by_fit():
    """Mean log-density of samples under the moons, up to their constant."""
    manual_seed(0)
    moons = nf.distributions.TwoMoons()
    with torch.no_grad():
        x = moons.sample(2000)
    lift = torch.cat([x, x.prod(1, keepdim=True)], 1)
    model = nfi.injective_flow(lift, 2, latent_density="matching")

    def behind():
        samples, _ = model.sample(2000, log_prob=False)
        samples = samples.detach()[:, :2]
        return float(moons.log_prob(x).mean() - moons.log_prob(samples).mean())

    model.eval()
    at_start = behind()
    result = nfi.training.fit(model, lift, steps=900)
    assert [phase.name for phase in result.phases] == ["reconstruction", "latent density"]
    assert math.isfinite(model.validation_score(lift[:100]))
    assert behind() < 0.2 * at_start

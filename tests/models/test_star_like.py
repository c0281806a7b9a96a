"""Whole models on known surfaces: what they start from, what they learn, what they refuse."""

from __future__ import annotations

import math

import normflows as nf
import pytest
import torch
from support.dense import dense_jacobian
from support.points import legendre, log_sphere_area
from support.seeds import manual_seed, seeded_generator

import normflows_injective as nfi
from normflows_injective.errors import ContextError, OffManifoldError, OptionError, ShapeError
from normflows_injective.flows import gauges
from normflows_injective.flows.surfaces.angular_spline import AngularSpline


def perturbed(model, size=0.08, seed=1):
    generator = seeded_generator(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += size * noise.to(parameter)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("chart", ["cot", "stereographic"])
@pytest.mark.parametrize("dim", [2, 3, 7])
def test_a_fresh_model_is_the_uniform_law_of_directions(dim, chart):
    model = nfi.flows.star_like_flow(dim, chart=chart, width=8).double()
    _, log_q = model.sample(50)
    torch.testing.assert_close(log_q, torch.full((50,), -log_sphere_area(dim)).double())


def test_a_fresh_model_of_the_simplex_is_flat_up_to_its_mixing():
    model = nfi.flows.star_like_flow(
        4, gauges.HyperplaneGauge(torch.ones(4)), num_layers=0
    ).double()
    _, log_q = model.sample(20)
    torch.testing.assert_close(
        log_q, torch.full((20,), math.lgamma(4) - 0.5 * math.log(4)).double()
    )


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "gauge"), [(2, None), (3, None), (3, gauges.LpGauge(1.5))])
def test_total_mass_is_one(dim, gauge):
    """Quadrature of a perturbed model over the sphere: trapezoid by Gauss-Legendre."""
    model = perturbed(nfi.flows.star_like_flow(dim, gauge, width=16, num_layers=3).double())
    azimuths = -math.pi + (torch.arange(400).double() + 0.5) * 2 * math.pi / 400
    if dim == 2:
        u = torch.stack([azimuths.cos(), azimuths.sin()], dim=1)
        weights = torch.full((400,), 2 * math.pi / 400).double()
    else:
        heights, shares = legendre(400)
        rings = (1 - heights.square()).sqrt()
        u = torch.stack(
            [
                heights.repeat_interleave(400),
                (rings[:, None] * azimuths.cos()).flatten(),
                (rings[:, None] * azimuths.sin()).flatten(),
            ],
            dim=1,
        )
        weights = (shares[:, None] * (2 * math.pi / 400)).expand(400, 400).flatten()
    x, log_stretch = u, torch.zeros(len(u)).double()
    if gauge is not None:
        x, log_stretch = nfi.flows.RadialSurface(gauge)(u)
    with torch.no_grad():
        mass = ((model.log_prob(x) + log_stretch).exp() * weights).sum()
    # Splines are smooth up to their knots, where the rule loses order.
    assert abs(float(mass) - 1) < 1e-3


@pytest.mark.slow
def test_log_density_of_a_deep_model_against_dense_jacobians():
    model = perturbed(
        nfi.flows.star_like_flow(4, gauges.LpGauge(3.0), level=2.0, width=8).double()
    )
    z, log_p = model.q0(5)
    x, log_det = model.forward_and_log_det(z)
    jacobian = dense_jacobian(model.forward, z)
    expected = 0.5 * torch.logdet(jacobian.mT @ jacobian)
    torch.testing.assert_close(log_det, expected, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(model.log_prob(x), log_p - log_det, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(model.inverse(x), z, atol=1e-7, rtol=1e-7)


def test_the_density_is_continuous_across_the_seam():
    """A circle in place of a box: values meet at phi = pi, where box splines would jump."""
    model = perturbed(nfi.flows.star_like_flow(3, width=16).double())
    step = 1e-7
    latitudes = torch.linspace(-1.2, 1.2, 9).double()
    sides = []
    for azimuth in (math.pi - step, -math.pi + step):
        angle = torch.full_like(latitudes, azimuth)
        ring = latitudes.cos()
        x = torch.stack([latitudes.sin(), ring * angle.cos(), ring * angle.sin()], dim=1)
        sides.append(model.log_prob(x))
    torch.testing.assert_close(*sides, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("num_coordinates", [1, 2, 5])
@pytest.mark.parametrize(("reverse_mask", "frequencies"), [(False, 1), (True, 1), (True, 4)])
def test_angular_splines(num_coordinates, reverse_mask, frequencies):
    circular = [num_coordinates - 1]
    spline = AngularSpline(
        num_coordinates, circular, 8, num_frequencies=frequencies, reverse_mask=reverse_mask
    ).double()
    z = 3 * torch.randn(6, num_coordinates).double()
    z[:, -1] = z[:, -1].remainder(2 * math.pi) - math.pi
    same, zero = spline(z)
    torch.testing.assert_close(same, z)
    torch.testing.assert_close(zero, torch.zeros(6).double(), atol=1e-12, rtol=0)
    perturbed(spline)
    moved, log_det = spline(z)
    assert not torch.allclose(moved, z)
    assert moved[:, -1].abs().max() <= math.pi
    expected = torch.linalg.slogdet(dense_jacobian(lambda s: spline(s)[0], z))[1]
    torch.testing.assert_close(log_det, expected)
    back, back_log_det = spline.inverse(moved)
    torch.testing.assert_close(back, z, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(back_log_det, -log_det, atol=1e-8, rtol=1e-8)
    point = z[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: spline(s), (point,))
    assert torch.autograd.gradgradcheck(lambda s: spline(s), (point,))


def test_linear_coordinates_beyond_the_bound_are_kept():
    """normflows' circular couplings send them to zero: their list form has no tails."""
    host = nf.flows.CircularCoupledRationalQuadraticSpline(
        3, 1, 8, [2], tail_bound=math.pi, init_identity=True
    )
    z = torch.tensor([[9.0, 9.0, 1.0]])
    assert (host(z)[0][:, :2] == 0).any()
    ours = AngularSpline(3, [2], width=8)
    torch.testing.assert_close(ours(z)[0], z)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["reverse_kld", "reverse_alpha_div", "forward_kld"])
def test_learning_a_von_mises_fisher_law(method):
    """The divergence from 10^4 samples of the model, whose standard error is below 0.005 nat.

    It begins at 7 nats, or 1.6 of Renyi, and by seeds and machines it ends between 0.01 and 0.13.
    """
    manual_seed(0)
    target = nfi.distributions.VonMisesFisher([1.0, -1.0, 0.5], 10.0)
    model = nfi.flows.star_like_flow(3, num_layers=4, width=32, p=target)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    assert divergence(model, target, method) > 1
    for step in range(300):
        annealed = min(1.0, 0.3 + step / 150)
        if method == "forward_kld":
            loss = model.forward_kld(target(256)[0])
        elif method == "reverse_kld":
            loss = model.reverse_kld(256, beta=annealed)
        else:
            loss = model.reverse_alpha_div(256, alpha=0.5, beta=annealed)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    assert divergence(model, target, method) < 0.5


def divergence(model, target, method):
    """What a method minimises, from samples of the model; for alpha of one half Renyi's."""
    with torch.no_grad():
        x, log_q = model.sample(10_000)
    log_w = target.log_prob(x) - log_q
    if method == "reverse_alpha_div":
        return -2 * float((0.5 * log_w).exp().mean().log())
    return -float(log_w.mean())


@pytest.mark.slow
def test_one_flow_for_a_path_of_levels():
    class Target:
        on_manifold = True

        def log_prob(self, x, context=None):
            assert context is not None
            return -(x[:, 0] - context[:, 0]).square()

    model = nfi.flows.star_like_flow(
        4,
        gauges.LpGauge(1.0),
        level_from_context=0,
        context_dim=1,
        width=8,
        num_layers=2,
        p=Target(),
    )
    context = torch.linspace(0.1, 4.0, 8).unsqueeze(1)
    x, log_q = model.sample(8, context)
    torch.testing.assert_close(x.abs().sum(1), context[:, 0])
    torch.testing.assert_close(model.log_prob(x.detach(), context), log_q, atol=1e-4, rtol=0)
    model.reverse_kld(8, context=context).backward()
    model.reverse_alpha_div(8, alpha=2, context=context).backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ContextError, match="built with a context"):
        model.sample(3)
    with pytest.raises(ContextError, match="Levels must be positive"):
        model.sample(8, context - 1)


@pytest.mark.slow
def test_data_off_the_surface():
    on, off = torch.eye(3), 1.1 * torch.eye(3)
    model = nfi.flows.star_like_flow(3, width=8, num_layers=1)
    model.log_prob(on)
    with pytest.raises(OffManifoldError, match="3 of 3 rows off the unit sphere"):
        model.log_prob(off)
    with pytest.raises(OffManifoldError, match="off the unit sphere"):
        model.forward_kld(off)
    surface = nfi.flows.star_like_flow(3, gauges.LpGauge(1.0), width=8, num_layers=1)
    with pytest.raises(OffManifoldError, match="off the surface of LpGauge"):
        surface.log_prob(off)
    for gauge in (None, gauges.LpGauge(1.0)):
        projecting = nfi.flows.star_like_flow(
            3, gauge, width=8, num_layers=1, off_manifold="project"
        )
        torch.testing.assert_close(projecting.log_prob(off), projecting.log_prob(on))
        torch.testing.assert_close(projecting.project(off), on)


def test_an_angle_beyond_a_turn_is_refused_also_where_jacobians_are_taken():
    """Inside the vmap over tangents, whose points can be looked at."""
    for behind in ([], [nf.flows.LULinearPermute(3)]):
        model = nfi.InjectiveNormalizingFlow(
            nf.distributions.DiagGaussian(2), [nfi.flows.SphereChart(3), *behind]
        )
        with pytest.raises(OffManifoldError, match=r"an angle within \[-pi, pi\]"):
            model.forward_and_log_det(torch.tensor([[0.0, 3.3]]))


def test_options_that_do_not_fit_are_refused():
    simplex = gauges.HyperplaneGauge(torch.ones(3))
    with pytest.raises(OptionError, match="chart='cot' does not fit a surface over the orthant"):
        nfi.flows.star_like_flow(3, simplex, chart="cot")
    with pytest.raises(OptionError, match="chart='angles' does not fit"):
        nfi.flows.star_like_flow(3, chart="angles")
    with pytest.raises(OptionError, match=r"belong to a gauge.*LpGauge\(2\)"):
        nfi.flows.star_like_flow(3, level=2.0)
    with pytest.raises(OptionError, match="dim must be an integer of at least 2"):
        nfi.flows.star_like_flow(1)
    with pytest.raises(ShapeError, match="must have shape"):
        nfi.flows.star_like_flow(4, simplex)


def test_a_target_that_broadcasts_is_refused():
    class Target:
        on_manifold = True

        def log_prob(self, x):
            return x[:, :1]

    model = nfi.flows.star_like_flow(3, width=8, num_layers=1, p=Target())
    with pytest.raises(ShapeError, match=r"one value per sample, shape \(5,\), got \(5, 1\)"):
        model.reverse_kld(5)


@pytest.mark.slow
def test_score_free_gradients_agree_with_full_ones_on_average():
    """Path and score gradients have one mean: 200 batches of 16, six standard errors.

    One of hundreds of parameters exceeds that once in a million times.
    """
    target = nfi.distributions.VonMisesFisher([0.0, 0.0, 1.0], 3.0)
    model = perturbed(nfi.flows.star_like_flow(3, width=4, num_layers=1, p=target), 0.1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    means, errors = [], []
    for score_fn in (True, False):
        gradients = []
        for _ in range(200):
            loss = model.reverse_kld(16, score_fn=score_fn)
            found = torch.autograd.grad(loss, parameters, materialize_grads=True)
            gradients.append(torch.cat([g.flatten() for g in found]))
        stacked = torch.stack(gradients)
        means.append(stacked.mean(0))
        errors.append(stacked.std(0) / 200**0.5)
    allowed = 6 * (errors[0].square() + errors[1].square()).sqrt()
    assert bool(((means[0] - means[1]).abs() <= allowed + 1e-6).all())
    assert float((means[1].abs() / errors[1].clamp(min=1e-6)).max()) > 8


@pytest.mark.slow
def test_save_and_load(tmp_path):
    model = perturbed(nfi.flows.star_like_flow(3, gauges.LpGauge(1.5), width=8))
    model.save(tmp_path / "model.safetensors")
    twin = nfi.flows.star_like_flow(3, gauges.LpGauge(1.5), width=8)
    twin.load(tmp_path / "model.safetensors")
    x, log_q = model.sample(5)
    torch.testing.assert_close(twin.log_prob(x.detach()), log_q, atol=1e-4, rtol=0)


# Found by a reader who tried to break it


def test_points_off_the_orthant_are_no_points_of_the_simplex():
    law = nfi.distributions.UniformOnSurface(gauges.HyperplaneGauge(torch.ones(3)))
    off = torch.tensor([[1.5, -0.3, -0.2]])
    with pytest.raises(OffManifoldError, match="1 of 1 points lie outside the positive orthant"):
        law.log_prob(off)
    with pytest.raises(OffManifoldError, match="outside the positive orthant"):
        law.surface(-torch.eye(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_stereographic_chart_near_and_at_its_pole(dtype):
    model = nfi.flows.star_like_flow(4, chart="stereographic", num_layers=0).to(dtype)
    for distance in (1e-3, 1e-9, 1e-18):
        x = torch.tensor([[distance, -distance, 0.0, 1.0]], dtype=dtype)
        expected = torch.full((1,), -log_sphere_area(4), dtype=dtype)
        tolerance = 1e-10 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(model.log_prob(x), expected, atol=tolerance, rtol=0)
    with pytest.raises(OffManifoldError, match="the pole that the stereographic chart misses"):
        model.log_prob(torch.eye(4, dtype=dtype))


def test_values_with_a_superfluous_dimension_are_named():
    class Careless(gauges.HomogeneousGauge):
        def value(self, x, context=None):
            return x.abs().sum(1, keepdim=True)

    with pytest.raises(ShapeError, match="Careless must give one value per direction"):
        nfi.flows.RadialSurface(Careless())(torch.eye(3))

    class Circle(nfi.flows.Chart):
        codomain = "sphere"

        def forward(self, z, context=None):
            return torch.cat([z.cos(), z.sin()], dim=1), torch.zeros_like(z)

        def inverse(self, x, context=None):
            return torch.atan2(x[:, 1:], x[:, :1]), torch.zeros_like(x[:, :1])

    model = nfi.InjectiveNormalizingFlow(nf.distributions.DiagGaussian(1), [Circle()])
    with pytest.raises(ShapeError, match=r"Circle must return a log_det of shape \(2,\)"):
        model.log_prob(torch.eye(2))


def test_measures_are_not_mixed():
    cone = nfi.distributions.UniformOnSurface(gauges.LpGauge(3.0), measure="cone", dim=3)
    model = nfi.flows.star_like_flow(3, gauges.LpGauge(3.0), width=8, num_layers=1, p=cone)
    with pytest.raises(OffManifoldError, match="the measure 'hausdorff' and p against 'cone'"):
        model.reverse_kld(4)
    simplex = nfi.distributions.UniformOnSurface(gauges.HyperplaneGauge(torch.ones(3)))
    with pytest.raises(OptionError, match="against the measure 'hausdorff' and the chart against"):
        nfi.distributions.Pullback(simplex, nfi.flows.SimplexStickBreaking(3))
    with pytest.raises(nfi.errors.UnsupportedLayerError, match="one of them declares another"):
        nfi.InjectiveNormalizingFlow(
            nf.distributions.DiagGaussian(1),
            [nfi.flows.Pad(1, 2), nfi.flows.SimplexStickBreaking(3)],
        )


def test_a_loaded_surface_has_the_mass_of_what_was_loaded():
    laws = [
        nfi.distributions.UniformOnSurface(gauges.EllipsoidGauge(size * torch.ones(3)))
        for size in (1.0, 2.0)
    ]
    laws[0].load_state_dict(laws[1].state_dict())
    x = 2 * torch.eye(3)
    torch.testing.assert_close(laws[0].log_prob(x), laws[1].log_prob(x))


def test_path_gradients_where_the_surface_is_trained():
    """Trained axes keep their score term, so that both ways agree on them, sample by sample."""

    class Target:
        on_manifold = True

        def log_prob(self, x):
            return -(x - 1).square().sum(1)

    gauge = gauges.EllipsoidGauge(torch.tensor([2.0, 1.0, 0.5]), trainable=True)
    model = nfi.flows.star_like_flow(3, gauge, num_layers=1, width=4, p=Target()).double()
    gradients = []
    for score_fn in (True, False):
        manual_seed(0)
        loss = model.reverse_kld(200, score_fn=score_fn)
        gradients.append(torch.autograd.grad(loss, gauge.axes)[0])
    torch.testing.assert_close(*gradients)
    with pytest.raises(OptionError, match="Freeze the layers from the injection on"):
        model.reverse_alpha_div(8, alpha=2, dreg=True)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_doubly_reparametrised_gradients_agree_on_average(alpha):
    """With those of the plain estimate: 200 batches of 64, five standard errors."""
    target = nfi.distributions.VonMisesFisher([0.0, 0.0, 1.0], 1.0)
    model = perturbed(nfi.flows.star_like_flow(3, width=4, num_layers=1, p=target), 0.05)
    parameter = next(p for n, p in model.named_parameters() if n.endswith("log_diagonal"))
    means, errors = [], []
    for dreg in (False, True):
        gradients = [
            torch.autograd.grad(model.reverse_alpha_div(64, alpha, dreg), parameter)[0]
            for _ in range(200)
        ]
        stacked = torch.stack(gradients)
        means.append(stacked.mean(0))
        errors.append(stacked.std(0) / 200**0.5)
    allowed = 5 * (errors[0].square() + errors[1].square()).sqrt()
    assert bool(((means[0] - means[1]).abs() < allowed).all())
    assert float(means[1].abs().max()) > 5 * float(errors[1].max())


@pytest.mark.slow
def test_a_trained_layer_behind_a_known_surface_has_the_exact_gradient():
    behind = nf.flows.AffineConstFlow(3)
    model = nfi.InjectiveNormalizingFlow(
        nfi.distributions.Pullback(nfi.distributions.UniformSphere(3), nfi.flows.SphereChart(3)),
        [
            nfi.flows.SphereChart(3),
            nfi.flows.RadialSurface(gauges.LpGauge(3.0), off_manifold="project"),
            behind,
        ],
    ).double()
    assert model.likelihood.beta == 100.0
    x = model.sample(50)[0].detach()
    loss = model.forward_kld(x)
    torch.testing.assert_close(loss, -model.log_prob(x).mean())
    loss.backward()
    step = 1e-5
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            behind.s[0, 0] += sign * step
            losses.append(float(model.forward_kld(x)))
            behind.s[0, 0] -= sign * step
    numerical = (losses[0] - losses[1]) / (2 * step)
    assert abs(float(behind.s.grad[0, 0]) - numerical) < 1e-6


@pytest.mark.slow
def test_masses_that_few_directions_decide_are_said():
    with pytest.warns(nfi.errors.NumericalWarning, match="directions count"):
        nfi.distributions.UniformOnSurface(gauges.ElasticNetGauge(1.0, 0.0), dim=100)


def test_levels_are_numbers_of_any_kind_but_only_one():
    assert nfi.flows.RadialSurface(gauges.LpGauge(1.0), torch.tensor(2.0)).level.level == 2.0
    with pytest.raises(OptionError, match="must be a number, got 'two'"):
        nfi.flows.RadialSurface(gauges.LpGauge(1.0), "two")
    with pytest.raises(OptionError, match="Give one of them"):
        nfi.flows.RadialSurface(gauges.LpGauge(1.0), 2.0, level_from_context=0)
    surface = nfi.flows.RadialSurface(gauges.LpGauge(1.0), level_from_context=3)
    with pytest.raises(ContextError, match=r"column 3 of the context, whose shape is \(2, 1\)"):
        surface(torch.eye(2), torch.ones(2, 1))
    assert gauges.HyperplaneGauge([1, 2]).weights.dtype == torch.float32


def test_shapes_of_angular_splines_are_checked_by_any_way_of_calling():
    spline, wrong = AngularSpline(3, [2]), torch.zeros(2, 4)
    for call in (spline, spline.inverse, lambda z: spline(z=z), lambda z: spline.inverse(z=z)):
        with pytest.raises(ShapeError, match=r"z must have shape \(B, 3\), got \(2, 4\)"):
            call(wrong)

"""The guide on a curved sheet: its density, what it remembers, its life inside Pyro."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.infer.reparam import NeuTraReparam
from support.models import perturbed, pickled
from support.pyro_guides import NOISES, Bend, mixed_sites, normals, train
from support.seeds import manual_seed
from torch import nn

import normflows_injective as nfi
from normflows_injective.pyro.guides.auto_injective import AutoInjective
from normflows_injective.pyro.laws.thickened import Thickened

pytestmark = pytest.mark.usefixtures("float64_by_default")


def covariance_of(noise, dim):
    return torch.linalg.inv(noise.gram(torch.eye(dim)))


# What the density is


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("num_aux", [0, 4])
def test_a_linear_guide_is_the_normal_distribution_per_sample(noise, num_aux):
    """For drawn values, for others, and from any start of the reverse model."""
    guide = AutoInjective(normals(6), 2, noise=noise, decoder="linear", num_aux=num_aux)
    guide = perturbed(guide.build())
    law, scale = guide.get_posterior(), guide.frame.scale
    spread = guide.decoder.weight.mT @ guide.decoder.weight + covariance_of(guide.noise, 6)
    exact = dist.MultivariateNormal(guide.frame.loc, scale[:, None] * spread * scale)
    drawn, others = law.rsample((4, 3)), 0.3 * torch.randn(7, 6)
    for value in (drawn, others):
        assert law.log_prob(value).shape == value.shape[:-1]
        assert torch.allclose(law.log_prob(value), exact.log_prob(value), rtol=0, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 3])
def test_tangents_in_closed_form_are_the_jacobian(rank):
    guide = perturbed(AutoInjective(normals(5), rank).build())
    u = torch.randn(7, rank)
    value, tangents = guide.decoder.linearise(u)
    expected = nfi.volume.jacobian(guide.decoder, u)
    assert torch.allclose(value, expected.value, atol=1e-12)
    assert torch.allclose(tangents.mT, expected.jacobian, atol=1e-12)


def test_the_reverse_law_is_drawn_from_its_density():
    """Second moments of 100 000 draws within five standard errors."""
    guide = perturbed(AutoInjective(normals(5), 3).build())
    with torch.no_grad():
        law = guide.reverse(torch.randn(1, 5), guide.decoder, guide.noise)
        draws = law.rsample(100_000)[:, 0]
        precision = law.root[0] @ law.root[0].mT
        exact = dist.MultivariateNormal(law.mean[0], precision_matrix=precision)
        moments = (draws - law.mean).mT @ (draws - law.mean) / len(draws)
    assert torch.allclose(law.log_prob(draws[:9, None])[:, 0], exact.log_prob(draws[:9]))
    spread = exact.covariance_matrix
    error = ((spread.square() + torch.outer(spread.diag(), spread.diag())) / len(draws)).sqrt()
    assert ((moments - spread).abs() < 5 * error).all()


@pytest.mark.parametrize("noise", NOISES)
def test_noise_is_drawn_from_the_covariance_that_it_is_scored_with(noise):
    """Second moments of 200 000 draws within five standard errors."""
    guide = perturbed(AutoInjective(normals(4), 1, noise=noise).build())
    covariance = covariance_of(guide.noise, 4)
    count = 200_000
    with torch.no_grad():
        draws = guide.noise.rsample(torch.Size([count]))
    diagonal = covariance.diagonal()
    error = ((covariance.square() + torch.outer(diagonal, diagonal)) / count).sqrt()
    assert ((draws.mT @ draws / count - covariance).abs() < 5 * error).all()
    exact = dist.MultivariateNormal(torch.zeros(4), covariance)
    points = torch.randn(3, 4)
    assert torch.allclose(guide.noise.log_prob(points), exact.log_prob(points), atol=1e-10)


def marginal_log_prob(guide, value):
    """log q of a guide of rank one, by the trapezoid rule over u."""
    u = torch.linspace(-8, 8, 1001)[:, None]
    e = guide.frame.standardise(value)
    residual = e[:, None] - guide.decoder(u)
    log_joint = dist.Normal(0.0, 1.0).log_prob(u[:, 0]) + guide.noise.log_prob(residual)
    step = float(u[1, 0] - u[0, 0])
    return log_joint.logsumexp(1) + math.log(step) - guide.frame.scale.log().sum()


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISES)
def test_scores_bound_the_marginal_density_from_both_sides(noise):
    """Drawn values from above, others from below, closer with more draws.

    Means over 1000 values, within four standard errors.
    """
    guide = AutoInjective(normals(3), 1, noise=noise, decoder=lambda r, d: Bend(0.7))
    perturbed(guide.build(), 0.1)
    gaps = {}
    with torch.no_grad():
        for count in (0, 3, 30):
            guide.num_aux = count
            law = guide.get_posterior()
            value = law.sample((1000,))
            exact = marginal_log_prob(guide, value)
            for name, scored in (("drawn", value), ("other", value.clone())):
                gap = law.log_prob(scored) - exact
                gaps[name, count] = float(gap.mean()), float(gap.std()) / math.sqrt(1000)
    assert gaps["drawn", 0][0] > 4 * gaps["drawn", 0][1], "the reverse model is exact here"
    for (name, _), (gap, error) in gaps.items():
        assert (gap if name == "drawn" else -gap) > -4 * error
    for name in ("drawn", "other"):
        assert abs(gaps[name, 0][0]) > abs(gaps[name, 30][0])


def spline_flows(rank):
    import normflows as nf

    return [nf.flows.CoupledRationalQuadraticSpline(rank, 1, 4, num_bins=3)]


def reverse_network(rank, latent_dim):
    return nn.Sequential(nn.Linear(latent_dim, 8), nn.Tanh(), nn.Linear(8, 2 * rank))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"noise": "mvn"},
        {"noise": "diagonal", "num_aux": 2},
        {"noise": "low_rank", "noise_rank": 2},
        {"noise": "mvn", "decoder": "linear"},
        {"noise": "diagonal", "latent_flows": spline_flows},
        {
            "noise": "mvn",
            "decoder": lambda r, d: nn.Sequential(
                nn.Linear(r, 4), nn.Tanh(), nn.Linear(4, d), nn.Softmax(-1)
            ),
        },
        {"noise": "low_rank", "reverse": reverse_network, "num_aux": 1},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_gradients_of_the_objective_by_every_parameter(options):
    """Central differences with common random numbers; the reverse model is not detached."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x[..., 1] - x[..., 0] ** 2, 0.3), obs=torch.tensor(0.4))

    # With it gradients are right in the mean, not draw by draw.
    options = options | {"path_gradient": False}
    guide = perturbed(AutoInjective(model, 2, **options).build(), 0.2)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=0)

    def loss():
        manual_seed(1)
        return elbo.differentiable_loss(model, guide)

    parameters = dict(guide.named_parameters())
    gradients = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
    step = 1e-5
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        assert gradient is not None, name
        flat = parameter.data.view(-1)
        for index in range(0, len(flat), max(1, len(flat) // 2)):
            kept = flat[index].item()
            sides = []
            for side in (step, -step):
                flat[index] = kept + side
                sides.append(float(loss().detach()))
            flat[index] = kept
            slope = (sides[0] - sides[1]) / (2 * step)
            assert float(gradient.view(-1)[index]) == pytest.approx(slope, rel=1e-5, abs=2e-6), (
                name
            )


# What is remembered


def test_only_the_last_value_is_recognised_and_by_identity():
    law = perturbed(AutoInjective(normals(3), 1).build()).get_posterior()
    first = law.rsample()
    second = law.rsample()
    assert law._generating(first) is None
    assert law._generating(second) is not None
    for other in (second.detach(), second.clone(), second.view(3), second.expand(1, 3)):
        assert law._generating(other) is None
    assert law.expand((2,))._generating(second) is None
    for copied in (copy.deepcopy(law), pickled(law)):
        assert copied._drawn is None
        assert copied.log_prob(second.detach()).shape == ()


@pytest.mark.slow
def test_what_is_remembered_keeps_no_graph_alive():
    import gc
    import weakref

    law = AutoInjective(normals(3), 1).build().get_posterior()
    value = law.rsample((2,))
    watched = weakref.ref(value)
    assert value.requires_grad
    assert not law._drawn[1].requires_grad
    del value
    gc.collect()
    assert watched() is None


def test_scores_follow_parameters_that_change_after_the_draw():
    guide = perturbed(AutoInjective(normals(3), 1, decoder="linear").build())
    law = guide.get_posterior()
    with torch.no_grad():
        value = law.rsample((4,))
        before = law.log_prob(value)
        perturbed(guide)
        after = law.log_prob(value)
        fresh = guide.get_posterior().log_prob(value)
    assert not torch.allclose(before, after)
    assert torch.allclose(after, fresh, atol=1e-10)  # exact for a linear guide, from either u


@pytest.mark.slow
def test_a_value_drawn_without_gradients_has_the_score_of_its_pair():
    """The gradient at a fixed value has mean zero, as that of any density has.

    Means over 20 000 values within five standard errors, for the parameters of a curved guide.
    """
    guide = perturbed(
        AutoInjective(normals(3), 1, noise="diagonal", decoder=lambda r, d: Bend(0.7)).build(), 0.2
    )
    law = guide.get_posterior()
    value = law.sample((20_000,))
    assert not value.requires_grad
    u = law._generating(value)
    e = guide.frame.standardise(value)
    joint = guide.noise.log_prob(e - guide.decoder(u)) - guide.frame.scale.log().sum()
    reverse = guide.reverse(e, guide.decoder, guide.noise).log_prob(u)
    log_u = dist.Normal(0.0, 1.0).log_prob(u).sum(-1)
    assert torch.allclose(law.log_prob(value), joint + log_u - reverse, atol=1e-10)
    for parameter in (guide.frame.loc, guide.noise.log_scale, guide.decoder.module.bend):
        batches = torch.stack(
            [
                torch.autograd.grad(part.mean(), parameter, retain_graph=True)[0].reshape(-1)
                for part in joint.chunk(20)
            ]
        )
        assert (batches.mean(0).abs() < 5 * batches.std(0) / math.sqrt(20)).all()


def test_in_a_list_of_guides():
    guide = AutoGuideList(mixed_sites)
    guide.append(AutoInjective(pyro.poutine.block(mixed_sites, hide=["scale", "y"]), 2))
    guide.append(AutoNormal(pyro.poutine.block(mixed_sites, expose=["scale"])))
    losses = train(guide, mixed_sites, 3)
    assert all(math.isfinite(loss) for loss in losses)


def test_neutra_is_refused():
    model = normals()
    guide = AutoInjective(model, 1)
    train(guide, model)
    reparameterised = NeuTraReparam(guide).reparam(model)
    with pytest.raises(ValueError, match="only supports guides that implement"):
        reparameterised()


@pytest.mark.slow
def test_a_state_dict_comes_back_through_build():
    model = normals()
    guide = AutoInjective(model, 2, noise="low_rank", latent_flows=spline_flows)
    train(guide, model, 3)
    state = copy.deepcopy(guide.state_dict())
    assert not any("options" in name for name in state)
    pyro.clear_param_store()
    manual_seed(99)
    fresh = AutoInjective(model, 2, noise="low_rank", latent_flows=spline_flows)
    with pytest.raises(RuntimeError, match="Unexpected"):
        fresh.load_state_dict(state)
    fresh.build().load_state_dict(state)
    value = torch.randn(3, 5)
    scores = []
    for each in (guide, fresh):
        manual_seed(0)
        scores.append(each.get_posterior().log_prob(value))
    assert torch.equal(*scores)


def picklable_model():
    pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_after_a_step_and_the_live_guide_keeps_its_model(duplicate):
    guide = AutoInjective(picklable_model, 2, decoder="linear")
    train(guide, picklable_model, 2)
    copied = duplicate(guide)
    value = torch.randn(3, 4)
    scores = [each.get_posterior().log_prob(value) for each in (guide, copied)]
    assert torch.allclose(*scores, atol=1e-12)
    assert callable(guide.model)
    before = guide.frame.loc.detach().clone()
    train(guide, picklable_model)
    assert not torch.equal(before, guide.frame.loc)
    assert torch.equal(before, copied.frame.loc)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_parameters_have_the_dtype_of_the_model(dtype, noise, default):
    torch.set_default_dtype(default)
    loc = torch.zeros(4, dtype=dtype)

    def model():
        pyro.sample("x", dist.Normal(loc, torch.ones_like(loc)).to_event(1))

    guide = AutoInjective(model, 2, noise=noise, latent_flows=spline_flows, num_aux=1)
    train(guide, model)
    assert {p.dtype for p in guide.parameters()} == {dtype}
    law = guide.get_posterior()
    value = law.rsample((2,))
    assert value.dtype == law.log_prob(value).dtype == dtype


def test_it_starts_where_it_is_told_and_nearly_linear():
    guide = AutoInjective(
        normals(50),
        3,
        init_loc_fn=pyro.infer.autoguide.init_to_value(values={"x": torch.ones(50)}),
        init_scale=0.1,
    )
    draws = guide.sample_posterior(4000)["x"]
    assert torch.allclose(draws.mean(0), torch.ones(50), atol=0.02)
    assert float(draws.var(0).mean().sqrt()) == pytest.approx(0.1, rel=0.15)
    u = torch.randn(100, 3)
    curved = guide.decoder(u) - guide.decoder.linear(u)
    assert float(curved.detach().abs().max()) < 0.1


@pytest.mark.parametrize("num_aux", [0, 2])
def test_shapes_in_plates_batches_and_wrappers(num_aux):
    law = AutoInjective(normals(3), 1, num_aux=num_aux).build().get_posterior()
    assert isinstance(law, Thickened)
    wide = law.expand((4, 2))
    value = wide.rsample((5,))
    assert value.shape == (5, 4, 2, 3)
    assert wide.log_prob(value).shape == (5, 4, 2)
    assert wide.log_prob(torch.zeros(3)).shape == (4, 2)
    event = law.expand((2,)).to_event(1)
    assert event.log_prob(event.rsample((6,))).shape == (6,)
    masked = law.expand((2,)).mask(torch.tensor([True, False]))
    assert masked.log_prob(masked.rsample())[1] == 0
    assert not law.sample().requires_grad
    with pytest.raises(ValueError, match="Expected value"):
        law.expand(()).log_prob(torch.full((3,), float("nan")))


# What is refused


@pytest.mark.parametrize("noise", [None, "none", 0, 0.0])
def test_a_guide_without_noise_is_refused(noise):
    with pytest.raises(ValueError, match="not a bound on the evidence") as caught:
        AutoInjective(normals(), 1, noise=noise)
    assert isinstance(caught.value, nfi.errors.OptionError)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"rank": 1.5}, "rank must be a positive integer"),
        ({"noise": "full"}, "one of mvn, diagonal, low_rank, got 'full'"),
        ({"noise": ["mvn"]}, "noise must be one of"),
        ({"noise_rank": 2}, "belongs to noise='low_rank'"),
        ({"noise": "low_rank", "noise_rank": 0}, "noise_rank must be a positive integer"),
        ({"num_aux": -1}, "num_aux must be a non-negative integer, got -1"),
        ({"init_scale": 0.0}, "singular"),
        ({"init_scale": -1.0}, "init_scale must be a positive number"),
        ({"init_scale": float("nan")}, "init_scale must be a positive number"),
        ({"decoder": "curved"}, "decoder must be 'linear', None, a module"),
        ({"reverse": "exact"}, "reverse must be 'laplace', a module"),
        ({"reverse": None}, "reverse must be 'laplace', a module"),
        ({"latent_flows": [1]}, "latent_flows must be a callable"),
    ],
)
def test_options_that_are_refused(options, text):
    with pytest.raises(nfi.errors.OptionError, match=text):
        AutoInjective(normals(), **{"rank": 1, **options})


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"rank": 5}, nfi.errors.OptionError, "less than the number of latents, 5, got 5"),
        (
            {"decoder": nn.Linear(1, 3).double()},
            nfi.errors.ShapeError,
            r"decoder must map \(2, 1\) to",
        ),
        (
            {"reverse": nn.Linear(5, 3).double()},
            nfi.errors.ShapeError,
            r"reverse must map \(2, 5\) to",
        ),
        ({"decoder": nn.Linear(1, 5).float()}, nfi.errors.DtypeError, "decoder must have"),
    ],
)
def test_what_only_the_model_can_show(options, error, text):
    model = normals()
    guide = AutoInjective(model, **{"rank": 1, **options})
    for _ in range(2):
        with pytest.raises(error, match=text):
            train(guide, model)


def test_a_module_of_the_callers_is_trained_itself():
    module = nn.Linear(1, 5)
    before = module.weight.detach().clone()
    model = normals()
    train(AutoInjective(model, 1, decoder=module), model)
    assert not torch.equal(before, module.weight)

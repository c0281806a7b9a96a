"""The guide by a stack of normflows layers."""

from __future__ import annotations

import copy
import math

import normflows as nf
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from pyro.infer import autoguide
from support.models import pickled
from support.pyro_guides import couplings
from support.seeds import manual_seed, shifted

import normflows_injective as nfi
import normflows_injective.pyro as nfp

DIM = 4


LOC = torch.tensor([1.0, -2.0, 0.5, 3.0])
FACTOR = torch.tensor(
    [[0.7, 0, 0, 0], [0.5, 0.4, 0, 0], [-0.3, 0.2, 0.6, 0], [0.4, -0.3, 0.1, 0.5]]
)


def gaussian():
    """A normalised correlated law, so that the evidence is one."""
    return pyro.sample("x", dist.MultivariateNormal(LOC, scale_tril=FACTOR))


def sites():
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", 2):
        pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    pyro.sample("y", dist.Normal(0.0, scale), obs=torch.tensor(1.0))


def fit(model, guide, steps, lr=0.02, elbo=infer.Trace_ELBO, **options):
    pyro.set_rng_seed(shifted(0))
    optimizer = pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.05 ** (1 / max(steps, 1))})
    svi = infer.SVI(model, guide, optimizer, elbo(**options))
    return [svi.step() for _ in range(steps)]


def state_of(guide):
    return {name: value.clone() for name, value in guide.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factory", "lr", "bound"), [(None, 0.02, 0.5), (lambda dim: couplings(dim, 5), 0.05, 0.4)]
)
def test_a_correlated_normal_law_is_met(factory, lr, bound):
    guide = nfp.AutoFlow(gaussian, factory, init_scale=0.5)
    options = {"num_particles": 16, "vectorize_particles": True, "max_plate_nesting": 0}
    # By seeds they end at 0.12 to 0.17, and at 0.03 to 0.1.
    fit(gaussian, guide, 300, lr, **options)
    with torch.no_grad():
        loss = infer.Trace_ELBO(**{**options, "num_particles": 2000})
        values = torch.tensor([loss.loss(gaussian, guide) for _ in range(5)])
    assert -4 * float(values.std()) / math.sqrt(5) < float(values.mean()) < bound


# Parameters.


@pytest.mark.slow
def test_dtype_is_that_of_the_model():
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))

    for factory in (None, couplings):
        pyro.clear_param_store()
        guide = nfp.AutoFlow(model, factory)
        fit(model, guide, 2)
        assert {p.dtype for p in guide.parameters()} == {torch.float64}
        assert guide()["x"].dtype == guide.median()["x"].dtype == torch.float64
        assert torch.get_default_dtype() == torch.float32


def test_no_parameter_has_two_names():
    guide = nfp.AutoFlow(gaussian)
    fit(gaussian, guide, 1)
    every = [id(p) for _, p in guide.named_parameters(remove_duplicate=False)]
    assert len(every) == len(set(every)) > 0
    kept = pyro.get_param_store()._params.items()
    stored = [id(p) for name, p in kept if not name.endswith("digest_of_buffers")]
    assert set(stored) == set(every)


def test_build_makes_parameters_for_a_state_dict(tmp_path):
    first = nfp.AutoFlow(gaussian, couplings)
    with pytest.raises(RuntimeError):
        first.load_state_dict({"transform.stack.flows.0.param_map": torch.ones(1)})
    fit(gaussian, first, 3)
    pyro.clear_param_store()
    manual_seed(77)
    second = nfp.AutoFlow(gaussian, couplings).build()
    second.load_state_dict(first.state_dict())
    third = nfp.AutoFlow(gaussian, couplings).build()
    nfp.save(first, tmp_path / "guide.safetensors")
    nfp.load(third, tmp_path / "guide.safetensors")
    point = torch.randn(DIM)
    expected = first.get_posterior().log_prob(point)
    for guide in (second, third):
        torch.testing.assert_close(guide.get_posterior().log_prob(point), expected)


def test_medians_and_quantiles_are_those_of_the_law():
    guide = nfp.AutoFlow(sites, couplings, init_scale=0.5).build()
    median, quantiles = guide.median(), guide.quantiles([0.1, 0.5, 0.9])
    assert {name: tuple(value.shape) for name, value in median.items()} == {
        "scale": (),
        "p": (2, 3),
    }
    assert quantiles["p"].shape == (3, 2, 3)
    # The couplings start as the identity, so that the law of log(scale) is N(loc, 0.5).
    loc = guide.transform.stack.flows[-1].loc.detach()[0]
    expected = (loc + 0.5 * dist.Normal(0.0, 1.0).icdf(torch.tensor([0.1, 0.5, 0.9]))).exp()
    torch.testing.assert_close(quantiles["scale"], expected, rtol=0.12, atol=0)
    draws = guide.sample_posterior(7)
    assert draws["p"].shape == (7, 2, 3)


@pytest.mark.slow
def test_a_single_latent_variable():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(2.0))

    for factory in (None, lambda dim: nf.flows.AffineConstFlow((dim,))):
        pyro.clear_param_store()
        guide = nfp.AutoFlow(model, factory)
        fit(model, guide, 400, num_particles=8, vectorize_particles=True, max_plate_nesting=0)
        x = guide.sample_posterior(1000)["x"]
        assert x.shape == (1000,)
        assert float(x.mean()) == pytest.approx(1.0, abs=0.1)
        assert float(x.std()) == pytest.approx(math.sqrt(0.5), rel=0.15)


def test_layers_that_start_by_data_start_right():
    guide = nfp.AutoFlow(gaussian, lambda dim: [nf.flows.ActNorm((dim,)), *couplings(dim)])
    losses = fit(gaussian, guide, 3)
    assert all(math.isfinite(loss) for loss in losses)


# Refusals and warnings.


def test_subsampled_local_latents_are_refused_by_name():
    def model():
        with pyro.plate("rows", 10, subsample_size=4):
            pyro.sample("local", dist.Normal(0.0, 1.0))

    with pytest.raises(nfi.errors.UnsupportedModelError, match="'local' lies in plate 'rows'"):
        nfp.AutoFlow(model)()
    assert issubclass(nfi.errors.UnsupportedModelError, NotImplementedError)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"init_scale": 0.0}, "init_scale"), ({"flow_factory": couplings(4)}, "flow_factory")],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(nfi.errors.OptionError, match=message):
        nfp.AutoFlow(gaussian, **options)


def unlike_layers():
    """What a factory may give by mistake, with the error and a part of its message."""
    errors = nfi.errors
    splines = nf.flows.CoupledRationalQuadraticSpline

    def whole(dim):
        return nf.NormalizingFlow(nf.distributions.DiagGaussian(dim), couplings(dim))

    return {
        "a whole model": (whole, errors.OptionError, "without a base or a transform"),
        "a transform of ours": (
            lambda dim: nfp.FlowTransform(couplings(dim)),
            errors.OptionError,
            "Give the layers alone",
        ),
        "a transform of Pyro": (
            lambda dim: dist.transforms.affine_coupling(dim),
            errors.OptionError,
            "Give the layers alone",
        ),
        "nothing": (lambda dim: None, errors.OptionError, "got None"),
        "no layers": (lambda dim: [], errors.OptionError, "at least one"),
        "a network": (lambda dim: [torch.nn.Linear(dim, dim)], errors.OptionError, "got"),
        "a string": (lambda dim: "splines", errors.OptionError, "got 'splines'"),
        "a number": (lambda dim: 3, errors.OptionError, "got 3"),
        "the class": (lambda dim: nf.flows.Planar, errors.OptionError, "the class Planar"),
        "a wider end": (
            lambda dim: [nfi.flows.LinearInjection(dim, dim + 1)],
            errors.ShapeError,
            r"lead to shape \(5,\).*AutoInjective",
        ),
        "a narrower start": (
            lambda dim: nfi.flows.LinearInjection(dim - 1, dim),
            errors.ShapeError,
            "3",
        ),
        "layers of another width": (
            lambda dim: couplings(dim + 2),
            errors.ShapeError,
            r"flow_factory\(4\) must take vectors of 4 latents, but fail",
        ),
        "a context layer": (
            lambda dim: [nfi.flows.coupling.NetworkCoupling(dim, context_dim=2)],
            errors.ContextError,
            "NetworkCoupling that needs a context",
        ),
        "a context layer of normflows": (
            lambda dim: [splines(dim, 1, 8, num_context_channels=2)],
            errors.ContextError,
            "Build it without context features",
        ),
        "a stochastic layer": (
            lambda dim: [nf.flows.BatchNorm()],
            errors.UnsupportedLayerError,
            "BatchNorm",
        ),
    }


@pytest.mark.parametrize("name", unlike_layers())
@pytest.mark.parametrize("permute", [True, False])
def test_what_is_no_list_of_layers_is_refused(name, permute):
    factory, error, message = unlike_layers()[name]
    with pytest.raises(error, match=message):
        nfp.AutoFlow(gaussian, factory, permute=permute).build()


def test_errors_of_the_factory_itself_pass():
    def factory(dim):
        raise ZeroDivisionError("of the user")

    with pytest.raises(ZeroDivisionError, match="of the user"):
        nfp.AutoFlow(gaussian, factory).build()


def test_a_module_list_is_a_list_of_layers():
    guide = nfp.AutoFlow(gaussian, lambda dim: torch.nn.ModuleList(couplings(dim)))
    assert guide()["x"].shape == (DIM,)


def test_building_draws_no_numbers_that_the_layers_do_not_draw():
    """The trial of the layers has a generator of its own."""
    guide = nfp.AutoFlow(gaussian, lambda dim: nf.flows.Planar((dim,)))
    manual_seed(0)
    guide.build()
    found = torch.rand(1)
    manual_seed(0)
    other = nfp.AutoFlow(gaussian, lambda dim: nf.flows.Planar((dim,)), permute=False)
    other.build()
    assert torch.equal(found, torch.rand(1))


# Copies.


@pytest.mark.slow
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_after_a_step_and_the_live_guide_keeps_its_model(duplicate):
    guide = nfp.AutoFlow(gaussian, couplings)
    fit(gaussian, guide, 2)
    own = guide.model
    copied = duplicate(guide)
    assert guide.model is own
    point = torch.randn(DIM)
    expected = guide.get_posterior().log_prob(point)
    torch.testing.assert_close(copied.get_posterior().log_prob(point), expected)
    # Both would have the same names in the store.
    with pytest.warns(nfi.errors.ParamStoreWarning):
        copied()
    before = state_of(copied)
    fit(gaussian, guide, 1)
    assert all(torch.equal(value, before[name]) for name, value in copied.state_dict().items())
    if duplicate is copy.deepcopy:
        assert copied.model is own
        pyro.clear_param_store()
        fit(gaussian, copied, 1)
        assert any(not torch.equal(v, before[name]) for name, v in copied.state_dict().items())


# Other parts of Pyro.


def test_in_a_list_of_guides():
    guide = autoguide.AutoGuideList(sites)
    guide.append(nfp.AutoFlow(pyro.poutine.block(sites, expose=["scale"])))
    guide.append(autoguide.AutoNormal(pyro.poutine.block(sites, expose=["p"])))
    losses = fit(sites, guide, 5)
    assert all(math.isfinite(loss) for loss in losses)
    assert set(guide()) == {"scale", "p"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    "factory",
    [pytest.param(None, marks=pytest.mark.slow), couplings],
    ids=["splines", "couplings"],
)
def test_traced_objectives_train_and_agree(factory):
    guide = nfp.AutoFlow(gaussian, factory)
    guide()
    before = state_of(guide)
    fit(gaussian, guide, 10, elbo=infer.JitTrace_ELBO)
    assert any(not torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    values = {}
    for elbo in (infer.JitTrace_ELBO, infer.Trace_ELBO):
        loss = elbo(ignore_jit_warnings=True) if elbo is infer.JitTrace_ELBO else elbo()
        values[elbo] = torch.tensor([loss.loss(gaussian, guide) for _ in range(80)])
    means = [float(v.mean()) for v in values.values()]
    error = math.sqrt(sum(float(v.var()) / len(v) for v in values.values()))
    assert abs(means[0] - means[1]) < 4 * error
